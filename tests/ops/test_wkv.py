from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from i3lm import ops
from i3lm.ops.dispatch import TRITON_INTERPRETS, use_implementation
from i3lm.ops.wkv import WKV
from tests.fixtures.reference import read_tensors
from tests.ops.drawing import (
    LENGTHS,
    MARKS,
    assert_all_close,
    assert_close,
    cases_here,
    cut_marks,
    device_of,
    draw_marks,
    gradients,
    make_generator,
    on_its_device,
)

wkv = on_its_device(ops.wkv)

# Every implementation is held to the truth in every dtype that it computes in.
CASES = cases_here(WKV)
NAMES = list(dict(CASES))
FAST_CASES = [case for case in CASES if case[0] != "reference"]
# float64 has 16 digits; hundreds of steps of sums and exponentials cost some of them. float32 has
# 7, and rounds an exponent of size 100 to about 8e-6, several times over.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 2e-4}
INPUTS = ["key", "value", "time_decay", "time_first", "state"]

every_implementation = pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)


def draw_inputs(
    B: int, T: int, C: int, generator: torch.Generator, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """Keys, values, decays, bonuses, and a state as some tokens would have left it."""
    key = 2 * torch.randn(B, T, C, generator=generator, dtype=torch.float64)
    value = torch.randn(B, T, C, generator=generator, dtype=torch.float64)
    time_decay = -torch.exp(2 * torch.randn(C, generator=generator, dtype=torch.float64) - 2)
    time_first = torch.randn(C, generator=generator, dtype=torch.float64)
    state = torch.randn(B, 3, C, generator=generator, dtype=torch.float64)
    state[:, 1] = state[:, 1].abs() + 0.1
    return [x.to(dtype) for x in (key, value, time_decay, time_first, state)]


def draw(dtype: torch.dtype, B: int, T: int, C: int, *, seed: int) -> list[Tensor]:
    """Inputs for an implementation, in a dtype."""
    return draw_inputs(B, T, C, make_generator(seed), dtype)


def assert_exact(dtype: torch.dtype, got: Tensor, expected: Tensor):
    """Compares within the tolerance of a dtype."""
    assert_close(got, expected, TOLERANCES[dtype])


def sums(state: Tensor) -> Tensor:
    """What a state means, (B, 2, C): the two sums, whatever the scale they are kept at."""
    return state[:, :2] * state[:, 2:].exp()


def run(inputs: list[Tensor], weights: list[Tensor], **options):
    """Output and sums, and the gradients of their weighted sum for all inputs."""

    def function(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        output, state = wkv(*leaves, **options)
        return output, sums(state)

    return gradients(function, inputs, weights)


def draw_weights(B: int, T: int, C: int, generator: torch.Generator) -> list[Tensor]:
    return [
        torch.randn(B, T, C, generator=generator, dtype=torch.float64),
        torch.randn(B, 2, C, generator=generator, dtype=torch.float64),
    ]


@every_implementation
@pytest.mark.parametrize("case", ["small", "long", "extreme", "one"])
def test_numbers_of_the_original(name: str, dtype: torch.dtype, case: str):
    tensors = read_tensors("ops", f"wkv.{case}.")
    leaves = [tensors[n].to(dtype).requires_grad_() for n in INPUTS[:4]]
    key, value, time_decay, time_first = leaves
    output, state = wkv(key, value, -torch.exp(time_decay), time_first, implementation=name)
    assert_exact(dtype, output, tensors["y"])
    expected = torch.stack([tensors["numerator"], tensors["denominator"]], dim=1)
    # Both sums relative to their own scale, so that huge exponents compare as well.
    scale = torch.exp(state[:, 2] - tensors["max_exponent"]).unsqueeze(1)
    assert_exact(dtype, state[:, :2] * scale, expected)
    grads = torch.autograd.grad((output * tensors["grad_y"]).sum(), leaves, materialize_grads=True)
    expected_grads = [tensors[f"grad_{n}"] for n in INPUTS[:4]]
    assert_all_close(list(grads), expected_grads, INPUTS[:4], TOLERANCES[dtype])


@every_implementation
def test_two_steps_by_hand(name: str, dtype: torch.dtype):
    # w = ln(1/2), u = ln 3; keys 0 and ln 2; values 1 and 5.
    key = torch.tensor([[[0.0], [math.log(2)]]], dtype=dtype)
    value = torch.tensor([[[1.0], [5.0]]], dtype=dtype)
    time_decay = torch.tensor([math.log(0.5)], dtype=dtype)
    time_first = torch.tensor([math.log(3)], dtype=dtype)
    output, state = wkv(key, value, time_decay, time_first, implementation=name)
    # First step: its own value. Second: (3 * 1 * 1 + 2 * 5) / (3 + 2).
    expected = torch.tensor([[[1.0], [13 / 5]]], dtype=torch.float64)
    assert_exact(dtype, output, expected)
    # The sums after it: 1/2 * 1 * 1 + 2 * 5, and 1/2 * 1 + 2.
    expected = torch.tensor([[[10.5], [2.5]]], dtype=torch.float64)
    assert_exact(dtype, sums(state), expected)


@every_implementation
def test_sign_of_the_bonus_is_the_opposite_of_rwkv_4(name: str, dtype: torch.dtype):
    key, value, time_decay, time_first, _ = draw(dtype, 2, 9, 3, seed=1)
    # arXiv:2305.13048, equation 14, as printed: the bonus weighs the current key.
    published_first = -time_first
    expected = torch.empty_like(value)
    for t in range(9):
        num = torch.exp(published_first + key[:, t]) * value[:, t]
        den = torch.exp(published_first + key[:, t])
        for i in range(t):
            weight = torch.exp((t - 1 - i) * time_decay + key[:, i])
            num = num + weight * value[:, i]
            den = den + weight
        expected[:, t] = num / den
    output, _ = wkv(key, value, time_decay, time_first, implementation=name)
    assert_exact(dtype, output, expected)


@pytest.mark.parametrize(("name", "dtype"), FAST_CASES, ids=str)
@pytest.mark.parametrize("with_state", [False, True], ids=["empty", "state"])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("marks", MARKS)
@pytest.mark.parametrize(
    ("B", "T", "C"),
    [(0, 3, 2), (2, 0, 3), (2, 1, 3), (3, 2, 1), (1, 63, 5), (2, 64, 3), (3, 65, 2)],
)
def test_agrees_with_the_reference(
    name: str,
    dtype: torch.dtype,
    B: int,
    T: int,
    C: int,
    marks: str,
    reverse: bool,
    with_state: bool,
):
    check_against_reference(name, dtype, B, T, C, marks, reverse, with_state)


@pytest.mark.parametrize(("name", "dtype"), FAST_CASES, ids=str)
@pytest.mark.parametrize(
    ("marks", "reverse", "with_state"),
    [("plain", False, False), ("reset and mask", True, True)],
)
def test_agrees_with_the_reference_over_700_steps(
    name: str, dtype: torch.dtype, marks: str, reverse: bool, with_state: bool
):
    check_against_reference(name, dtype, 1, 700, 3, marks, reverse, with_state)


def check_against_reference(
    name: str,
    dtype: torch.dtype,
    B: int,
    T: int,
    C: int,
    marks: str,
    reverse: bool,
    with_state: bool,
):
    generator = make_generator(B, T, C, reverse, with_state)
    inputs = draw_inputs(B, T, C, generator, dtype)[: 5 if with_state else 4]
    options = {**draw_marks(marks, B, T, generator), "reverse": reverse}
    weights = draw_weights(B, T, C, generator)
    truth = [x.double() for x in inputs]
    expected = run(truth, weights, **options, implementation="reference")
    got = run(inputs, weights, **options, implementation=name)
    assert_all_close(got[0], expected[0], ["output", "sums"], TOLERANCES[dtype])
    assert_all_close(got[1], expected[1], INPUTS[: len(inputs)], TOLERANCES[dtype])


@every_implementation
@settings(max_examples=5 if TRITON_INTERPRETS else 25, deadline=None, derandomize=True)
@given(data=st.data())
def test_pieces_with_the_state_give_the_whole(name: str, dtype: torch.dtype, data: st.DataObject):
    B, C = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    T = data.draw(st.integers(0, 40))
    cut = data.draw(st.integers(0, T))
    marks_kind, reverse = data.draw(st.sampled_from(sorted(MARKS))), data.draw(st.booleans())
    generator = make_generator(B, C, T, cut)
    key, value, time_decay, time_first, state = draw_inputs(B, T, C, generator, dtype)
    marks = draw_marks(marks_kind, B, T, generator)
    options = {"reverse": reverse, "implementation": name}

    whole, last = wkv(key, value, time_decay, time_first, state, **marks, **options)
    pieces = [slice(cut), slice(cut, None)]
    outputs = []
    for piece in reversed(pieces) if reverse else pieces:
        output, state = wkv(
            key[:, piece],
            value[:, piece],
            time_decay,
            time_first,
            state,
            **cut_marks(marks, piece),
            **options,
        )
        outputs.append(output)
    assert_exact(dtype, torch.cat(outputs[::-1] if reverse else outputs, dim=1), whole)
    assert_exact(dtype, sums(state), sums(last))


@every_implementation
@pytest.mark.parametrize("reverse", [False, True])
def test_later_steps_do_not_change_earlier_ones(name: str, dtype: torch.dtype, reverse: bool):
    key, value, time_decay, time_first, state = draw_inputs(2, 30, 3, make_generator(2), dtype)
    before, _ = wkv(key, value, time_decay, time_first, state, reverse=reverse, implementation=name)
    changed = slice(None, 11) if reverse else slice(19, None)
    kept = slice(11, None) if reverse else slice(19)
    key[:, changed], value[:, changed] = 5.0, -3.0
    after, _ = wkv(key, value, time_decay, time_first, state, reverse=reverse, implementation=name)
    # Not bit-equal by contract, but no path may exist: the same arithmetic on the same numbers.
    torch.testing.assert_close(after[:, kept], before[:, kept], rtol=0, atol=0)
    assert not torch.equal(after[:, changed], before[:, changed])


@every_implementation
def test_a_packed_document_equals_it_alone(name: str, dtype: torch.dtype):
    key, value, time_decay, time_first, state = draw_inputs(2, 23, 3, make_generator(3), dtype)
    reset = torch.zeros(2, 23, dtype=torch.bool)
    reset[:, 7] = True
    packed, last = wkv(key, value, time_decay, time_first, state, reset=reset, implementation=name)
    alone, last_alone = wkv(key[:, 7:], value[:, 7:], time_decay, time_first, implementation=name)
    assert_exact(dtype, packed[:, 7:], alone)
    assert_exact(dtype, sums(last), sums(last_alone))


@every_implementation
@pytest.mark.parametrize("padded", [range(4), range(9, 14), range(5, 9), range(14)])
def test_padded_steps_leave_no_trace(name: str, dtype: torch.dtype, padded: range):
    key, value, time_decay, time_first, state = draw_inputs(2, 14, 3, make_generator(4), dtype)
    mask = torch.ones(2, 14, dtype=torch.bool)
    mask[:, padded] = False
    key[~mask], value[~mask] = 1e4, 1e6  # whatever stands there
    output, last = wkv(key, value, time_decay, time_first, state, mask=mask, implementation=name)
    real = [t for t in range(14) if t not in padded]
    expected, last_expected = wkv(
        key[:, real], value[:, real], time_decay, time_first, state, implementation=name
    )
    assert torch.equal(output[:, padded], torch.zeros(2, len(padded), 3).to(output))
    assert_exact(dtype, output[:, real], expected)
    assert_exact(dtype, sums(last), sums(last_expected))


@every_implementation
def test_padding_after_a_reset_changes_no_gradient(name: str, dtype: torch.dtype):
    inputs = draw_inputs(2, 9, 3, make_generator(16), dtype)
    reset, mask = torch.zeros(2, 9, dtype=torch.bool), torch.ones(2, 9, dtype=torch.bool)
    reset[:, 5], mask[:, 5:] = True, False
    weights = draw_weights(2, 9, 3, make_generator(17))
    results, grads = run(inputs, weights, reset=reset, mask=mask, implementation=name)
    document = [inputs[0][:, :5], inputs[1][:, :5], *inputs[2:]]
    without_state = [weights[0][:, :5], torch.zeros_like(weights[1])]
    expected, expected_grads = run(document, without_state, implementation="reference")
    assert_exact(dtype, results[0][:, :5], expected[0])
    assert torch.equal(results[1], torch.zeros_like(results[1]))
    assert not any(grad[:, 5:].any() for grad in grads[:2])
    grads = [grads[0][:, :5], grads[1][:, :5], *grads[2:]]
    assert_all_close(grads, expected_grads, INPUTS, TOLERANCES[dtype])


@every_implementation
@pytest.mark.parametrize("marks", MARKS)
def test_reverse_is_the_flipped_sequence(name: str, dtype: torch.dtype, marks: str):
    generator = make_generator(5)
    key, value, time_decay, time_first, state = draw_inputs(2, 20, 3, generator, dtype)
    drawn = draw_marks(marks, 2, 20, generator)
    flipped = {n: None if mark is None else mark.flip(1) for n, mark in drawn.items()}
    output, last = wkv(
        key, value, time_decay, time_first, state, **drawn, reverse=True, implementation=name
    )
    expected, last_expected = wkv(
        key.flip(1), value.flip(1), time_decay, time_first, state, **flipped, implementation=name
    )
    torch.testing.assert_close(output, expected.flip(1), rtol=0, atol=0)
    torch.testing.assert_close(last, last_expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "time_decay",
    [(-1e-9, -1e-6, -1e-3), (-5.0, -50.0, -500.0), (-1e9, -1e30, -3e38), (0.0, -0.0, -1e-30)],
    ids=["tiny", "large", "huge", "none"],
)
@pytest.mark.parametrize(("T", "marks", "reverse"), LENGTHS)
def test_huge_keys_and_decays_stay_exact_in_float32(
    name: str, time_decay: tuple[float, ...], T: int, marks: str, reverse: bool
):
    generator = make_generator(6)
    key = 160 * torch.rand(2, T, 3, generator=generator) - 80
    value = torch.randn(2, T, 3, generator=generator)
    inputs = [key, value, torch.tensor(time_decay), torch.tensor([-30.0, 0.0, 30.0])]
    weights = [torch.randn(2, T, 3, generator=generator), torch.ones(2, 2, 3)]
    options = {**draw_marks(marks, 2, T, generator), "reverse": reverse}
    if options["mask"] is not None:
        options["mask"][:, 0 if reverse else -1] = True  # a last step that leaves something

    def scale_free(state: Tensor) -> Tensor:
        return torch.stack([state[:, 0] / state[:, 1], state[:, 2] + state[:, 1].log()], dim=1)

    def function(*leaves: Tensor, implementation: str) -> tuple[Tensor, Tensor]:
        output, state = wkv(*leaves, **options, implementation=implementation)
        return output, scale_free(state)

    got = gradients(lambda *x: function(*x, implementation=name), inputs, weights)
    expected = gradients(
        lambda *x: function(*x, implementation="reference"),
        [x.double() for x in inputs],
        [w.double() for w in weights],
    )
    for results in got:
        assert all(bool(result.isfinite().all()) for result in results)
    # An exponent of size 100 is rounded to about 8e-6 in float32, so weights are right to 1e-5,
    # and sums of them to a few times that.
    names = ["output", "mean and log of the sums"]
    assert_all_close(got[0], expected[0], names, 1e-4)
    # Gradients of parameters add a term for every step.
    assert_all_close(got[1], expected[1], INPUTS[:4], 1e-3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        # The output is rounded once: half of the dtype's last place, 8, 11 and 24 bits.
        (torch.bfloat16, 2**-8),
        (torch.float16, 2**-10),
        # Sums in float32, of few steps.
        (torch.float32, 1e-5),
    ],
    ids=["bfloat16", "float16", "float32"],
)
@pytest.mark.parametrize(("T", "marks", "reverse"), LENGTHS)
def test_runs_in_float32_whatever_the_inputs(
    name: str, dtype: torch.dtype, tolerance: float, T: int, marks: str, reverse: bool
):
    if TRITON_INTERPRETS and dtype == torch.bfloat16:
        tolerance *= 2  # the interpreter cuts bits off where GPUs round
    generator = make_generator(7)
    key, value, *rest = draw_inputs(2, T, 3, generator, torch.float32)
    inputs = [key.to(dtype), value.to(dtype), *rest]
    # Of few bits, so that no dtype rounds the gradients that come in.
    weights = [w.round() for w in draw_weights(2, T, 3, generator)]
    options = {**draw_marks(marks, 2, T, generator), "reverse": reverse}
    (output, last), grads = run(inputs, weights, **options, implementation=name)
    assert [x.dtype for x in (output, last)] == [dtype, torch.float32]
    assert [x.dtype for x in grads] == [x.dtype for x in inputs]
    expected, expected_grads = run(
        [x.double() for x in inputs], weights, **options, implementation="reference"
    )
    more = 1 if T < 100 else 2
    assert_close(output, expected[0], more * tolerance)
    assert_close(last, expected[1], more * 1e-5)
    assert_all_close(grads[:2], expected_grads[:2], INPUTS[:2], max(tolerance, 2e-5))
    # In float32 in all cases; sums over all steps.
    assert_all_close(grads[2:], expected_grads[2:], INPUTS[2:], more * 5e-5)


@pytest.mark.parametrize("name", [name for name in NAMES if WKV.named(name).reads_bfloat16])
@pytest.mark.parametrize("marks", ["plain", "reset and mask"])
def test_bfloat16_read_as_it_is_gives_the_numbers_of_float32(
    name: str, marks: str, monkeypatch: pytest.MonkeyPatch
):
    generator = make_generator(7)
    key, value, *rest = draw_inputs(2, 40, 130, generator, torch.float32)
    inputs = [key.bfloat16(), value.bfloat16(), *rest]
    weights = [w.float() for w in draw_weights(2, 40, 130, generator)]
    options = {"implementation": name, **draw_marks(marks, 2, 40, generator)}
    results, grads = run(inputs, weights, **options)
    converting = replace(WKV.named(name), reads_bfloat16=False)
    monkeypatch.setattr(WKV, "implementations", [converting])
    expected, expected_grads = run(inputs, weights, **options)
    for got, wanted in zip([*results, *grads], [*expected, *expected_grads], strict=True):
        assert got.dtype == wanted.dtype
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("name", ["scan", "reference"])
@pytest.mark.parametrize("is_differentiated", [False, True])
def test_shapes_without_numbers_come_out_on_meta(name: str, is_differentiated: bool):
    inputs = [
        x.float().to("meta").requires_grad_(is_differentiated)
        for x in draw(torch.float32, 2, 5, 3, seed=8)
    ]
    output, state = ops.wkv(*inputs, implementation=name)
    assert (output.device.type, output.shape, state.shape) == ("meta", (2, 5, 3), (2, 3, 3))
    if is_differentiated:
        assert torch.autograd.grad(output.sum(), inputs)[0].shape == (2, 5, 3)


@pytest.mark.parametrize("name", [name for name, dtype in CASES if dtype == torch.float64])
def test_float64_inputs_have_a_float64_state(name: str):
    output, last = wkv(*draw(torch.float64, 2, 5, 3, seed=8), implementation=name)
    assert output.dtype == last.dtype == torch.float64


@every_implementation
def test_strides_do_not_matter(name: str, dtype: torch.dtype):
    generator = make_generator(9)
    inputs = draw_inputs(2, 30, 4, generator, dtype)
    weights = draw_weights(2, 30, 4, generator)
    expected = run(inputs, weights, implementation=name)

    def strided(x: Tensor) -> Tensor:
        return torch.stack([x, torch.full_like(x, 7.0)], dim=-1)[..., 0].mT.contiguous().mT

    def function(key: Tensor, value: Tensor, decay: Tensor, first: Tensor, state: Tensor):
        wide = [torch.stack([p, p], dim=1)[:, 0] for p in (decay, first)]
        output, last = wkv(strided(key), strided(value), *wide, strided(state), implementation=name)
        return output.mT.contiguous().mT, sums(last.mT.contiguous().mT)

    assert not strided(inputs[0]).is_contiguous()
    got = gradients(function, inputs, weights)
    assert_all_close(got[0], expected[0], ["output", "sums"], 0)
    assert_all_close(got[1], expected[1], INPUTS, TOLERANCES[dtype])


@every_implementation
def test_broadcast_gradients_are_accepted(name: str, dtype: torch.dtype):
    inputs = draw(dtype, 2, 30, 4, seed=10)
    ones = [torch.ones(2, 30, 4, dtype=torch.float64), torch.zeros(2, 2, 4, dtype=torch.float64)]
    _, expected = run(inputs, ones, implementation=name)
    leaves = [x.requires_grad_() for x in inputs]
    output, _ = wkv(*leaves, implementation=name)
    got = torch.autograd.grad(output.sum(), leaves)  # sum() hands down one number, expanded
    assert_all_close(list(got), expected, INPUTS, TOLERANCES[dtype])


@pytest.mark.parametrize("name", NAMES)
def test_autocast_does_not_reach_the_recurrence(name: str):
    inputs = [x.float() for x in draw(torch.float32, 2, 30, 4, seed=11)]
    plain, last_plain = wkv(*inputs, implementation=name)
    with torch.autocast(device_of(name).type, torch.bfloat16):
        output, last = wkv(*inputs, implementation=name)
    assert torch.equal(output, plain)
    assert torch.equal(last, last_plain)


# Not for the reference, whose backward pass is autograd's own and follows autocast.
@pytest.mark.parametrize("name", list(dict(FAST_CASES)))
def test_autocast_does_not_reach_the_backward_pass(name: str):
    inputs = [t.float().requires_grad_() for t in draw(torch.float32, 2, 30, 4, seed=14)]
    plain = torch.autograd.grad(wkv(*inputs, implementation=name)[0].sum(), inputs)
    with torch.autocast(device_of(name).type, torch.bfloat16):
        output, _ = wkv(*inputs, implementation=name)
        grads = torch.autograd.grad(output.sum(), inputs)
    # The same arithmetic; kernels with threads may add up in another order.
    assert_all_close(list(grads), list(plain), INPUTS, 1e-5)


@pytest.mark.parametrize("name", [name for name, dtype in CASES if dtype == torch.float64])
@pytest.mark.parametrize("marks", ["plain", "reset and mask"])
def test_gradients_are_those_of_finite_differences(name: str, marks: str):
    generator = make_generator(12)
    inputs = [x.requires_grad_() for x in draw_inputs(2, 6, 2, generator)]
    drawn = draw_marks(marks, 2, 6, generator)

    def output(*leaves: Tensor) -> Tensor:
        return wkv(*leaves, **drawn, implementation=name)[0]

    # gradcheck's own tolerances for float64 differences: 1e-5 absolute, 1e-3 relative.
    assert torch.autograd.gradcheck(output, inputs)


@pytest.mark.parametrize(("name", "dtype"), FAST_CASES, ids=str)
def test_is_one_well_behaved_operator_for_pytorch(name: str, dtype: torch.dtype):
    generator = make_generator(15)
    inputs = [x.to(device_of(name)).requires_grad_() for x in draw(dtype, 2, 9, 3, seed=15)]
    marks = [m.to(device_of(name)) for m in draw_marks("reset and mask", 2, 9, generator).values()]
    torch.library.opcheck(torch.ops.i3lm.wkv.default, (*inputs, *marks, name))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": (2, 5, 4)}, r"key \(2, 5, 3\) and value \(2, 5, 4\) must share one shape"),
        ({"key": (5, 3), "value": (5, 3)}, r"key \(5, 3\) and value \(5, 3\) must share .*B, T, C"),
        ({"time_decay": (4,)}, r"time_decay \(4,\) must have shape \(3,\)"),
        ({"time_first": (1, 3)}, r"time_first \(1, 3\) must have shape \(3,\)"),
        ({"state": (2, 2, 3)}, r"state \(2, 2, 3\) must have shape \(2, 3, 3\)"),
        ({"reset": (2, 4)}, r"reset \(2, 4\) must have shape \(2, 5\)"),
        ({"mask": (2, 5, 1)}, r"mask \(2, 5, 1\) must have shape \(2, 5\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change: dict[str, tuple[int, ...]], message: str):
    shapes = {"key": (2, 5, 3), "value": (2, 5, 3), "time_decay": (3,), "time_first": (3,)}
    with pytest.raises(ValueError, match=message):
        wkv(**{name: torch.zeros(shape) for name, shape in (shapes | change).items()})


def test_implementations_are_named_and_chosen():
    inputs = draw_inputs(1, 3, 2, make_generator(13))
    assert WKV.names[-1] == "reference"
    assert "scan" in WKV.names
    with pytest.raises(ValueError, match=r"wkv has no implementation 'fast'; it has .*reference"):
        wkv(*inputs, implementation="fast")
    with (
        use_implementation(wkv="slow"),
        pytest.raises(ValueError, match=r"wkv has no implementation 'slow'; it has .*reference"),
    ):
        wkv(*inputs)
