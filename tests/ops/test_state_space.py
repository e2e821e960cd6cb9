from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from i3lm import ops
from i3lm.ops.dispatch import TRITON_INTERPRETS, use_implementation
from i3lm.ops.state_space import STATE_SPACE
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

state_space = on_its_device(ops.state_space)

# Every implementation is held to the truth in every dtype that it computes in.
CASES = cases_here(STATE_SPACE)
NAMES = list(dict(CASES))
FAST_CASES = [case for case in CASES if case[0] != "reference"]
# float64 has 16 digits and float32 has 7; hundreds of steps of sums, and gradients of parameters
# that add up over all steps, cost some of them.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 2e-5}
INPUTS = ["x", "mix", "A", "B", "C", "D", "state"]

every_implementation = pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)


def draw(
    dtype: torch.dtype, B: int, T: int, C: int, N: int, generator: torch.Generator
) -> list[Tensor]:
    """Inputs, parameters with a transition that neither explodes nor vanishes, and a state."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    transition = normal(N, N)
    transition = 0.97 * transition / torch.linalg.matrix_norm(transition, 2)
    tensors = [
        normal(B, T, C),
        torch.rand(C, generator=generator, dtype=torch.float64),
        transition,
        normal(N, C),
        normal(C, N),
        normal(C),
        normal(B, C + N),
    ]
    return [x.to(dtype) for x in tensors]


def assert_exact(dtype: torch.dtype, got: Tensor, expected: Tensor):
    """Compares within the tolerance of a dtype."""
    assert_close(got, expected, TOLERANCES[dtype])


def draw_weights(inputs: list[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Weights of the output and of the final state, to take gradients of."""
    x, A = inputs[0], inputs[2]
    B, T, C = x.shape
    return [
        torch.randn(B, T, C, generator=generator, dtype=torch.float64),
        torch.randn(B, C + A.shape[0], generator=generator, dtype=torch.float64),
    ]


@every_implementation
@pytest.mark.parametrize("case", ["small", "long", "one"])
def test_numbers_of_the_original(name: str, dtype: torch.dtype, case: str):
    tensors = read_tensors("ops", f"hybrid.{case}.")
    names = ["x", "w_mix", "A", "B", "C", "D"]
    leaves = [tensors[n].to(dtype).requires_grad_() for n in names]
    output, _ = state_space(*leaves, implementation=name)
    assert_exact(dtype, output, tensors["y"])
    grads = torch.autograd.grad((output * tensors["grad_y"]).sum(), leaves, materialize_grads=True)
    expected = [tensors[f"grad_{n}"] for n in names]
    assert_all_close(list(grads), expected, names, TOLERANCES[dtype])


@every_implementation
def test_two_steps_by_hand(name: str, dtype: torch.dtype):
    # One channel, one state: mix 1/4, A 1/2, B 3, C 2, D 10; inputs 4 and 8.
    values = ([[[4.0], [8.0]]], [0.25], [[0.5]], [[3.0]], [[2.0]], [10.0])
    inputs = [torch.tensor(v, dtype=dtype) for v in values]
    output, state = state_space(*inputs, implementation=name)
    # Averages: 3/4 * 4 = 3, then 1/4 * 3 + 3/4 * 8 = 6.75. States: 12, then 6 + 24 = 30.
    # Outputs: 2 * 12 + 10 * 3 and 2 * 30 + 10 * 6.75.
    assert_exact(dtype, output, torch.tensor([[[54.0], [127.5]]]))
    assert_exact(dtype, state, torch.tensor([[6.75, 30.0]]))


@pytest.mark.parametrize(("name", "dtype"), FAST_CASES, ids=str)
@pytest.mark.parametrize("with_state", [False, True], ids=["empty", "state"])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("marks", MARKS)
@pytest.mark.parametrize(
    ("B", "T", "C", "N"),
    [
        (0, 3, 2, 2),
        (2, 0, 3, 2),
        (2, 1, 3, 2),
        (3, 2, 1, 1),
        (1, 63, 5, 3),
        (2, 64, 3, 7),
        (3, 65, 2, 5),
        # More than one block of a kernel's channels and states, and not a whole one.
        (2, 33, 130, 33),
    ],
)
def test_agrees_with_the_reference(
    name: str,
    dtype: torch.dtype,
    B: int,
    T: int,
    C: int,
    N: int,
    marks: str,
    reverse: bool,
    with_state: bool,
):
    check_against_reference(name, dtype, (B, T, C, N), marks, reverse, with_state)


@pytest.mark.parametrize(("name", "dtype"), FAST_CASES, ids=str)
@pytest.mark.parametrize(
    ("marks", "reverse", "with_state"),
    [("plain", False, False), ("reset and mask", True, True)],
)
def test_agrees_with_the_reference_over_700_steps(
    name: str, dtype: torch.dtype, marks: str, reverse: bool, with_state: bool
):
    check_against_reference(name, dtype, (1, 700, 3, 5), marks, reverse, with_state)


def check_against_reference(
    name: str,
    dtype: torch.dtype,
    sizes: tuple[int, int, int, int],
    marks: str,
    reverse: bool,
    with_state: bool,
):
    generator = make_generator(*sizes, reverse, with_state)
    inputs = draw(dtype, *sizes, generator)[: 7 if with_state else 6]
    options = {**draw_marks(marks, *sizes[:2], generator), "reverse": reverse}
    weights = draw_weights(inputs, generator)

    def run(implementation: str, inputs: list[Tensor]):
        return gradients(
            lambda *leaves: state_space(*leaves, **options, implementation=implementation),
            inputs,
            weights,
        )

    expected = run("reference", [x.double() for x in inputs])
    got = run(name, inputs)
    assert_all_close(got[0], expected[0], ["output", "state"], TOLERANCES[dtype])
    assert_all_close(got[1], expected[1], INPUTS[: len(inputs)], TOLERANCES[dtype])


@every_implementation
@settings(max_examples=5 if TRITON_INTERPRETS else 25, deadline=None, derandomize=True)
@given(data=st.data())
def test_pieces_with_the_state_give_the_whole(name: str, dtype: torch.dtype, data: st.DataObject):
    B, C, N = (data.draw(st.integers(1, 4)) for _ in range(3))
    T = data.draw(st.integers(0, 40))
    cut = data.draw(st.integers(0, T))
    marks_kind, reverse = data.draw(st.sampled_from(sorted(MARKS))), data.draw(st.booleans())
    generator = make_generator(B, C, N, T, cut)
    x, *parameters, state = draw(dtype, B, T, C, N, generator)
    marks = draw_marks(marks_kind, B, T, generator)
    options = {"reverse": reverse, "implementation": name}

    whole, last = state_space(x, *parameters, state, **marks, **options)
    pieces = [slice(0, cut), slice(cut, T)]
    outputs = []
    for piece in reversed(pieces) if reverse else pieces:
        output, state = state_space(
            x[:, piece], *parameters, state, **cut_marks(marks, piece), **options
        )
        outputs.append(output)
    assert_exact(dtype, torch.cat(outputs[::-1] if reverse else outputs, dim=1), whole)
    assert_exact(dtype, state, last)


@every_implementation
@pytest.mark.parametrize("reverse", [False, True])
def test_later_steps_do_not_change_earlier_ones(name: str, dtype: torch.dtype, reverse: bool):
    inputs = draw(dtype, 2, 30, 3, 4, make_generator(2))
    before, _ = state_space(*inputs, reverse=reverse, implementation=name)
    changed = slice(None, 11) if reverse else slice(19, None)
    kept = slice(11, None) if reverse else slice(19)
    inputs[0][:, changed] = 5.0
    after, _ = state_space(*inputs, reverse=reverse, implementation=name)
    # The same arithmetic on the same numbers: equal to the last bit.
    assert torch.equal(after[:, kept], before[:, kept])
    assert not torch.equal(after[:, changed], before[:, changed])


@every_implementation
def test_a_packed_document_equals_it_alone(name: str, dtype: torch.dtype):
    x, *parameters, state = draw(dtype, 2, 23, 3, 4, make_generator(3))
    reset = torch.zeros(2, 23, dtype=torch.bool)
    reset[:, 7] = True
    packed, last = state_space(x, *parameters, state, reset=reset, implementation=name)
    alone, last_alone = state_space(x[:, 7:], *parameters, implementation=name)
    assert_exact(dtype, packed[:, 7:], alone)
    assert_exact(dtype, last, last_alone)


@every_implementation
@pytest.mark.parametrize("padded", [range(4), range(9, 14), range(5, 9), range(14)])
def test_padded_steps_leave_no_trace(name: str, dtype: torch.dtype, padded: range):
    x, *parameters, state = draw(dtype, 2, 14, 3, 4, make_generator(4))
    mask = torch.ones(2, 14, dtype=torch.bool)
    mask[:, padded] = False
    x[~mask] = 1e6  # whatever stands there
    output, last = state_space(x, *parameters, state, mask=mask, implementation=name)
    real = [t for t in range(14) if t not in padded]
    expected, last_expected = state_space(x[:, real], *parameters, state, implementation=name)
    assert torch.equal(output[:, padded], torch.zeros(2, len(padded), 3).to(output))
    assert_exact(dtype, output[:, real], expected)
    assert_exact(dtype, last, last_expected)


@pytest.mark.parametrize("N", [1, 33])
def test_states_that_overflow_are_infinite_as_the_reference_has_them(N: int):
    x = torch.ones(1, 200, 1)
    parameters = [
        torch.zeros(1),
        2 * torch.eye(N),
        torch.ones(N, 1),
        torch.ones(1, N),
        torch.zeros(1),
    ]
    for got, expected in zip(
        state_space(x, *parameters, implementation="numba"),
        state_space(x, *parameters, implementation="reference"),
        strict=True,
    ):
        assert torch.equal(got.isinf(), expected.isinf())
        assert torch.equal(got.isnan(), expected.isnan())


def test_nothing_that_stands_at_padded_steps_reaches_a_gradient():
    """Not even NaN, which times zero is NaN."""
    inputs = draw(torch.float32, 2, 40, 5, 3, make_generator(9))
    weights = [w.float() for w in draw_weights(inputs, make_generator(10))]
    mask = torch.rand(2, 40, generator=make_generator(11)) < 0.7

    def run(filler: float) -> list[Tensor]:
        x, *rest = inputs
        leaves = [x.masked_fill(~mask[..., None], filler), *rest]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        results = state_space(*leaves, mask=mask, implementation="numba")
        of_output = weights[0].masked_fill(~mask[..., None], filler)
        return [*results, *torch.autograd.grad(results, leaves, [of_output, weights[1]])]

    for got, expected in zip(run(torch.nan), run(0.0), strict=True):
        assert torch.equal(got, expected)


def test_threads_change_no_bit():
    inputs = [x.requires_grad_() for x in draw(torch.float32, 3, 70, 200, 5, make_generator(12))]

    def run(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        output, last = state_space(*inputs, implementation="numba")
        return [output, last, *torch.autograd.grad(output.sum(), inputs)]

    before = torch.get_num_threads()
    alone, together = run(1), run(2)
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@every_implementation
@pytest.mark.parametrize("marks", MARKS)
def test_reverse_is_the_flipped_sequence(name: str, dtype: torch.dtype, marks: str):
    generator = make_generator(5)
    x, *rest = draw(dtype, 2, 20, 3, 4, generator)
    drawn = draw_marks(marks, 2, 20, generator)
    flipped = {n: None if mark is None else mark.flip(1) for n, mark in drawn.items()}
    output, last = state_space(x, *rest, **drawn, reverse=True, implementation=name)
    expected, last_expected = state_space(x.flip(1), *rest, **flipped, implementation=name)
    assert torch.equal(output, expected.flip(1))
    assert torch.equal(last, last_expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("transition", ["zero", "nilpotent", "rotation", "identity"])
@pytest.mark.parametrize("mix", [0.0, 1e-30, 0.999999, 1.0])
@pytest.mark.parametrize(("T", "marks", "reverse"), LENGTHS)
def test_extreme_memories_stay_exact_in_float32(
    name: str, transition: str, mix: float, T: int, marks: str, reverse: bool
):
    generator = make_generator(6)
    x, _, _, *rest = draw(torch.float32, 2, T, 2, 3, generator)
    options = {**draw_marks(marks, 2, T, generator), "reverse": reverse}
    A = {
        "zero": torch.zeros(3, 3),
        "nilpotent": torch.tensor([[0.0, 1e4, 0.0], [0.0, 0.0, 1e4], [0.0, 0.0, 0.0]]),
        "rotation": torch.tensor([[0.6, -0.8, 0.0], [0.8, 0.6, 0.0], [0.0, 0.0, -1.0]]),
        "identity": torch.eye(3),
    }[transition]
    inputs = [x, torch.full((2,), mix), A, *rest]
    weights = [w.float() for w in draw_weights(inputs, make_generator(7))]

    def run(implementation: str, inputs: list[Tensor], weights: list[Tensor]):
        return gradients(
            lambda *leaves: state_space(*leaves, **options, implementation=implementation),
            inputs,
            weights,
        )

    got = run(name, inputs, weights)
    truth = [x.double() for x in inputs]
    expected = run("reference", truth, [w.double() for w in weights])
    for results in got:
        assert all(bool(result.isfinite().all()) for result in results)
    # Float32 steps that forget nothing, relative to the largest entry.
    assert_all_close(got[0], expected[0], ["output", "state"], 1e-5)
    assert_all_close(got[1], expected[1], INPUTS, 1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        # The output is rounded once: half of the dtype's last place, 8 and 11 bits.
        (torch.bfloat16, 2**-8),
        (torch.float16, 2**-10),
        # Sums in float32.
        (torch.float32, 1e-5),
    ],
    ids=["bfloat16", "float16", "float32"],
)
@pytest.mark.parametrize(("T", "marks", "reverse"), LENGTHS)
def test_runs_in_float32_whatever_the_inputs(
    name: str, dtype: torch.dtype, tolerance: float, T: int, marks: str, reverse: bool
):
    generator = make_generator(8)
    x, *rest = draw(torch.float32, 2, T, 3, 4, generator)
    inputs = [x.to(dtype), *rest]
    # Of few bits, so that no dtype rounds the gradients that come in.
    weights = [w.round() for w in draw_weights(inputs, generator)]
    options = {**draw_marks(marks, 2, T, generator), "reverse": reverse}

    def run(implementation: str, inputs: list[Tensor]):
        return gradients(
            lambda *leaves: state_space(*leaves, **options, implementation=implementation),
            inputs,
            weights,
        )

    (output, last), grads = run(name, inputs)
    assert [t.dtype for t in (output, last)] == [dtype, torch.float32]
    assert [t.dtype for t in grads] == [t.dtype for t in inputs]
    expected, expected_grads = run("reference", [t.double() for t in inputs])
    assert_close(output, expected[0], tolerance)
    assert_close(last, expected[1], 1e-5)  # in float32 in all cases
    assert_all_close(grads[:1], expected_grads[:1], INPUTS[:1], tolerance)
    assert_all_close(grads[1:], expected_grads[1:], INPUTS[1:], 1e-5)


@pytest.mark.parametrize("name", ["scan", "reference"])
@pytest.mark.parametrize("is_differentiated", [False, True])
def test_shapes_without_numbers_come_out_on_meta(name: str, is_differentiated: bool):
    inputs = [
        x.to("meta").requires_grad_(is_differentiated)
        for x in draw(torch.float32, 2, 5, 3, 4, make_generator(9))
    ]
    output, state = ops.state_space(*inputs, implementation=name)
    assert (output.device.type, output.shape, state.shape) == ("meta", (2, 5, 3), (2, 7))
    if is_differentiated:
        assert torch.autograd.grad(output.sum(), inputs)[0].shape == (2, 5, 3)


@pytest.mark.parametrize("name", [name for name, dtype in CASES if dtype == torch.float64])
def test_float64_inputs_have_a_float64_state(name: str):
    output, last = state_space(
        *draw(torch.float64, 2, 5, 3, 4, make_generator(9)), implementation=name
    )
    assert output.dtype == last.dtype == torch.float64


@every_implementation
def test_strides_do_not_matter(name: str, dtype: torch.dtype):
    generator = make_generator(10)
    inputs = draw(dtype, 2, 30, 4, 3, generator)
    weights = draw_weights(inputs, generator)

    def strided(x: Tensor) -> Tensor:
        return torch.stack([x, torch.full_like(x, 7.0)], dim=-1)[..., 0]

    def function(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        views = [strided(leaf) for leaf in leaves]
        output, last = state_space(*views, implementation=name)
        return output.mT.contiguous().mT, last

    expected = gradients(lambda *leaves: state_space(*leaves, implementation=name), inputs, weights)
    assert not any(strided(x).is_contiguous() for x in inputs)
    got = gradients(function, inputs, weights)
    assert_all_close(got[0], expected[0], ["output", "state"], TOLERANCES[dtype])
    assert_all_close(got[1], expected[1], INPUTS, TOLERANCES[dtype])


@pytest.mark.parametrize("name", NAMES)
def test_autocast_does_not_reach_the_recurrence(name: str):
    inputs = [t.float() for t in draw(torch.float32, 2, 30, 4, 3, make_generator(11))]
    plain, last_plain = state_space(*inputs, implementation=name)
    with torch.autocast(device_of(name).type, torch.bfloat16):
        output, last = state_space(*inputs, implementation=name)
    assert torch.equal(output, plain)
    assert torch.equal(last, last_plain)


# Not for the reference, whose backward pass is autograd's own and follows autocast.
@pytest.mark.parametrize("name", list(dict(FAST_CASES)))
def test_autocast_does_not_reach_the_backward_pass(name: str):
    inputs = [
        t.float().requires_grad_() for t in draw(torch.float32, 2, 30, 4, 3, make_generator(14))
    ]
    plain = torch.autograd.grad(state_space(*inputs, implementation=name)[0].sum(), inputs)
    with torch.autocast(device_of(name).type, torch.bfloat16):
        output, _ = state_space(*inputs, implementation=name)
        grads = torch.autograd.grad(output.sum(), inputs)
    # The same arithmetic; kernels with threads may add up in another order.
    assert_all_close(list(grads), list(plain), INPUTS, 1e-5)


@pytest.mark.parametrize("name", [name for name, dtype in CASES if dtype == torch.float64])
@pytest.mark.parametrize("marks", ["plain", "reset and mask"])
def test_gradients_are_those_of_finite_differences(name: str, marks: str):
    generator = make_generator(12)
    inputs = [x.requires_grad_() for x in draw(torch.float64, 2, 6, 2, 2, generator)]
    drawn = draw_marks(marks, 2, 6, generator)

    def function(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        return state_space(*leaves, **drawn, implementation=name)

    # gradcheck's own tolerances for float64 differences: 1e-5 absolute, 1e-3 relative.
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize(("name", "dtype"), FAST_CASES, ids=str)
def test_is_one_well_behaved_operator_for_pytorch(name: str, dtype: torch.dtype):
    generator = make_generator(15)
    inputs = [x.to(device_of(name)).requires_grad_() for x in draw(dtype, 2, 9, 3, 4, generator)]
    marks = [m.to(device_of(name)) for m in draw_marks("reset and mask", 2, 9, generator).values()]
    torch.library.opcheck(torch.ops.i3lm.state_space.default, (*inputs, *marks, name))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (5, 3)}, r"x \(5, 3\) must have shape \(B, T, C\)"),
        ({"mix": (4,)}, r"mix \(4,\) must have shape \(3,\)"),
        ({"A": (4, 5)}, r"A \(4, 5\) must have shape \(4, 4\)"),
        ({"B": (3, 4)}, r"B \(3, 4\) must have shape \(4, 3\)"),
        ({"C": (4, 3)}, r"C \(4, 3\) must have shape \(3, 4\)"),
        ({"D": (1, 3)}, r"D \(1, 3\) must have shape \(3,\)"),
        ({"state": (2, 3)}, r"state \(2, 3\) must have shape \(2, 7\)"),
        ({"reset": (2, 4)}, r"reset \(2, 4\) must have shape \(2, 5\)"),
        ({"mask": (2, 5, 1)}, r"mask \(2, 5, 1\) must have shape \(2, 5\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change: dict[str, tuple[int, ...]], message: str):
    shapes = {"x": (2, 5, 3), "mix": (3,), "A": (4, 4), "B": (4, 3), "C": (3, 4), "D": (3,)}
    with pytest.raises(ValueError, match=message):
        state_space(**{name: torch.zeros(shape) for name, shape in (shapes | change).items()})


def test_implementations_are_named_and_chosen():
    inputs = draw(torch.float64, 1, 3, 2, 2, make_generator(13))
    assert STATE_SPACE.names[-1] == "reference"
    assert "scan" in STATE_SPACE.names
    message = r"state_space has no implementation '{}'; it has .*reference"
    with pytest.raises(ValueError, match=message.format("fast")):
        state_space(*inputs, implementation="fast")
    with (
        use_implementation(state_space="slow"),
        pytest.raises(ValueError, match=message.format("slow")),
    ):
        state_space(*inputs)
