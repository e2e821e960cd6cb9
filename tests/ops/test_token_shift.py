from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from i3lm.ops import token_shift, token_shift_mix
from i3lm.ops.dispatch import FEW_NUMBERS, use_implementation
from i3lm.ops.token_shift import TOKEN_SHIFT_MIX
from tests.ops.drawing import (
    MARKS,
    assert_all_close,
    cases_on_cpu,
    cut_marks,
    draw_marks,
    gradients,
    make_generator,
)


def shift_by_loop(
    inputs: Tensor, state: Tensor | None, reset: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The definition, token by token."""
    B, T, C = inputs.shape
    last = torch.zeros(B, C) if state is None else state.clone()
    shifted = torch.empty_like(inputs)
    for b in range(B):
        for t in range(T):
            starts = reset is not None and bool(reset[b, t])
            shifted[b, t] = 0 if starts else last[b]
            if mask is None or mask[b, t]:
                last[b] = inputs[b, t]
    return shifted, last


@st.composite
def cases(draw: st.DrawFn):
    B, T, C = draw(st.integers(1, 3)), draw(st.integers(0, 12)), draw(st.integers(1, 3))
    generator = make_generator(B, T, C, draw(st.integers(0, 1000)))
    inputs = torch.randn(B, T, C, generator=generator)
    state = torch.randn(B, C, generator=generator) if draw(st.booleans()) else None
    return inputs, state, draw_marks(draw(st.sampled_from(sorted(MARKS))), B, T, generator)


def test_each_token_sees_the_one_before_it():
    inputs = torch.tensor([[[1.0], [2.0], [3.0]]])
    shifted, last = token_shift(inputs)
    assert shifted.tolist() == [[[0.0], [1.0], [2.0]]]
    assert last.tolist() == [[3.0]]


def test_the_state_is_what_the_first_token_sees():
    shifted, last = token_shift(torch.tensor([[[1.0], [2.0]]]), torch.tensor([[9.0]]))
    assert shifted.tolist() == [[[9.0], [1.0]]]
    assert last.tolist() == [[2.0]]


def test_padding_is_nobodys_previous_token():
    inputs = torch.tensor([[[1.0], [7.0], [8.0], [2.0], [9.0]]])
    mask = torch.tensor([[True, False, False, True, False]])
    shifted, last = token_shift(inputs, mask=mask)
    assert shifted[mask].tolist() == [[0.0], [1.0]]
    assert last.tolist() == [[2.0]]


def test_a_document_start_sees_nothing():
    inputs = torch.tensor([[[1.0], [2.0], [3.0]]])
    reset = torch.tensor([[False, True, False]])
    shifted, last = token_shift(inputs, torch.tensor([[9.0]]), reset=reset)
    assert shifted.tolist() == [[[9.0], [0.0], [2.0]]]
    assert last.tolist() == [[3.0]]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(cases())
def test_equals_the_loop(case):
    inputs, state, marks = case
    shifted, last = token_shift(inputs, state, **marks)
    expected, last_expected = shift_by_loop(inputs, state, **marks)
    # Nothing is computed, only moved.
    assert torch.equal(shifted, expected)
    assert torch.equal(last, last_expected)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(cases(), st.data())
def test_pieces_with_the_state_give_the_whole(case, data: st.DataObject):
    inputs, state, marks = case
    whole, last = token_shift(inputs, state, **marks)
    cut = data.draw(st.integers(0, inputs.shape[1]))
    outputs = []
    for piece in (slice(None, cut), slice(cut, None)):
        output, state = token_shift(inputs[:, piece], state, **cut_marks(marks, piece))
        outputs.append(output)
    assert torch.equal(torch.cat(outputs, dim=1), whole)
    assert torch.equal(state, last)


def test_the_output_has_the_dtype_of_the_inputs():
    shifted, last = token_shift(torch.zeros(1, 2, 3, dtype=torch.bfloat16), torch.ones(1, 3))
    assert shifted.dtype == last.dtype == torch.bfloat16


def test_gradients_reach_the_inputs_and_the_state():
    inputs = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    state = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    marks = draw_marks("reset and mask", 2, 5, make_generator(1))
    assert torch.autograd.gradcheck(lambda x, s: token_shift(x, s, **marks), (inputs, state))


MIX_CASES = cases_on_cpu(TOKEN_SHIFT_MIX)
# Sums of up to 36 products in float32; float64 has 16 digits.
TOLERANCES = {torch.float64: 1e-13, torch.float32: 1e-5}
every_implementation = pytest.mark.parametrize(("name", "dtype"), MIX_CASES, ids=str)


def mix_by_equation(x: Tensor, state: Tensor, *shares: Tensor, **marks) -> tuple[Tensor, ...]:
    previous, last = token_shift(x, state, **marks)
    return *(x * share + previous * (1 - share) for share in shares), last


def mix(x: Tensor, state: Tensor | None, *shares: Tensor, **marks) -> tuple[Tensor, ...]:
    mixes, last = token_shift_mix(x, shares, state, **marks)
    return *mixes, last


def draw_mix(B: int, T: int, C: int, M: int, generator: torch.Generator) -> list[Tensor]:
    """Inputs, a state and shares, in float64."""
    shapes = [(B, T, C), (B, C), *[(C,)] * M]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def draw_mix_weights(inputs: list[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Weights of the mixes and of the last state."""
    x, state, *shares = inputs
    return [
        torch.randn(t.shape, generator=generator).double() for t in [*(x for _ in shares), state]
    ]


@every_implementation
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    B=st.integers(0, 3),
    T=st.integers(0, 12),
    C=st.sampled_from([1, 3, 40, 259]),  # 256 channels make a task
    M=st.integers(2, 3),
    kind=st.sampled_from(sorted(MARKS)),
)
def test_the_mixes_and_all_gradients_are_those_of_the_equation(
    name: str, dtype: torch.dtype, B: int, T: int, C: int, M: int, kind: str
):
    generator = make_generator(B, T, C, M)
    inputs = [x.to(dtype) for x in draw_mix(B, T, C, M, generator)]
    weights = draw_mix_weights(inputs, generator)
    marks = draw_marks(kind, B, T, generator)
    with use_implementation(token_shift_mix=name):
        results, grads = gradients(
            lambda *leaves: mix(*leaves, **marks), inputs, [w.to(dtype) for w in weights]
        )
    exact = [x.double() for x in inputs]
    expected, expected_grads = gradients(
        lambda *leaves: mix_by_equation(*leaves, **marks), exact, weights
    )
    names = [*(f"mix {m}" for m in range(M)), "last"]
    assert_all_close(results, expected, names, TOLERANCES[dtype])
    names = ["x", "state", *(f"share {m}" for m in range(M))]
    assert_all_close(grads, expected_grads, names, TOLERANCES[dtype])


@pytest.mark.parametrize("name", TOKEN_SHIFT_MIX.names)
def test_gradients_of_the_mixes_are_those_of_finite_differences(name: str):
    inputs = [x.requires_grad_() for x in draw_mix(2, 5, 3, 2, make_generator(1))]
    marks = draw_marks("reset and mask", 2, 5, make_generator(1))
    with use_implementation(token_shift_mix=name):
        assert torch.autograd.gradcheck(lambda *leaves: mix(*leaves, **marks), inputs)


@every_implementation
def test_the_last_state_continues_the_mixes(name: str, dtype: torch.dtype):
    x, state, *shares = (t.to(dtype) for t in draw_mix(2, 9, 3, 2, make_generator(2)))
    marks = draw_marks("reset and mask", 2, 9, make_generator(3))
    with use_implementation(token_shift_mix=name):
        *whole, last = mix(x, state, *shares, **marks)
        parts = []
        for piece in (slice(None, 4), slice(4, None)):
            *mixes, state = mix(x[:, piece], state, *shares, **cut_marks(marks, piece))
            parts.append(mixes)
    for all_at_once, pieces in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(torch.cat(pieces, dim=1), all_at_once)
    assert torch.equal(state, last)


@pytest.mark.parametrize("name", TOKEN_SHIFT_MIX.names)
def test_no_state_is_a_state_of_zero(name: str):
    x, state, *shares = draw_mix(2, 5, 3, 2, make_generator(4))
    with use_implementation(token_shift_mix=name):
        for a, b in zip(mix(x, None, *shares), mix(x, 0 * state, *shares), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", TOKEN_SHIFT_MIX.names)
def test_what_stood_before_a_document_does_not_reach_it(name: str):
    x, state, *shares = draw_mix(1, 6, 3, 2, make_generator(5))
    x[:, :3], state[:] = torch.nan, torch.inf
    x.requires_grad_()
    reset = torch.zeros(1, 6, dtype=torch.bool)
    reset[:, 3] = True
    with use_implementation(token_shift_mix=name):
        *mixes, last = mix(x, state, *shares, reset=reset)
    assert all(bool(m[:, 3:].isfinite().all()) for m in mixes)
    (grad,) = torch.autograd.grad(sum(m[:, 3:].sum() for m in mixes), x)
    assert not grad[:, :3].any()
    assert bool(last.isfinite().all())


@pytest.mark.parametrize("name", TOKEN_SHIFT_MIX.names)
def test_strides_of_x_and_of_gradients_do_not_matter(name: str):
    x, state, *shares = draw_mix(2, 5, 3, 2, make_generator(6))
    turned = x.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert not turned.is_contiguous()
    found = []
    with use_implementation(token_shift_mix=name):
        for leaf in (x, turned):
            leaf.requires_grad_()
            first, second, _ = mix(leaf, state, *shares)
            # The gradient of a sum is one number, expanded.
            found.append(torch.autograd.grad(first.sum() + (second.mT @ second).sum(), leaf)[0])
    torch.testing.assert_close(*found, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", TOKEN_SHIFT_MIX.names)
def test_strides_of_the_gradient_of_the_last_state_do_not_matter(name: str):
    x, state, *shares = draw_mix(3, 4, 5, 2, make_generator(6))
    state.requires_grad_()
    mask = torch.tensor([[False] * 4, [True] * 4, [False] * 4])
    weights = torch.randn(5, 3, generator=make_generator(7), dtype=torch.float64)
    with use_implementation(token_shift_mix=name):
        _, last = token_shift_mix(x, shares, state, mask=mask)
    (grad,) = torch.autograd.grad((last.T * weights).sum(), state)
    assert torch.equal(grad, weights.T * torch.tensor([[1], [0], [1]]))


@pytest.mark.parametrize("name", TOKEN_SHIFT_MIX.names)
@pytest.mark.parametrize("autocast", [False, True])
def test_mixes_come_in_the_dtype_of_the_next_product(name: str, autocast: bool):
    inputs = draw_mix(2, 7, 5, 2, make_generator(7))
    kind = torch.float32 if autocast else torch.bfloat16
    leaves = [x.to(kind).requires_grad_() for x in inputs]
    with (
        use_implementation(token_shift_mix=name),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        *mixes, last = mix(*leaves)
    assert {m.dtype for m in mixes} == {torch.bfloat16}
    assert last.dtype == kind
    drawn = draw_mix_weights(inputs, make_generator(8))
    weights = [w.to(m.dtype) for w, m in zip(drawn[:2], mixes, strict=True)]
    total = sum((m * w).sum() for m, w in zip(mixes, weights, strict=True))
    grads = torch.autograd.grad(total, leaves[:1] + leaves[2:])
    exact = [x.detach().double().requires_grad_() for x in leaves]
    *expected, _ = mix_by_equation(*exact)
    total = sum((m * w.double()).sum() for m, w in zip(expected, weights, strict=True))
    expected_grads = torch.autograd.grad(total, exact[:1] + exact[2:])
    for got, wanted in zip((*mixes, *grads), (*expected, *expected_grads), strict=True):
        # Eight bits; PyTorch rounds each of the terms that it adds up.
        tolerance = 2**-8 * (1 if name == "numba" else 4)
        assert (got.double() - wanted).abs().max() <= tolerance * wanted.abs().max()


def test_double_precision_is_kept_under_autocast():
    x, state, *shares = draw_mix(1, 3, 2, 2, make_generator(9))
    with torch.autocast("cpu", torch.bfloat16):
        *mixes, last = mix(x, state, *shares)
    assert {t.dtype for t in (*mixes, last)} == {torch.float64}


def test_half_precision_is_left_to_pytorch():
    x, state, *shares = (t.half() for t in draw_mix(2, 200, 256, 2, make_generator(10)))
    assert {t.dtype for t in mix(x, state, *shares)} == {torch.float16}


@pytest.mark.parametrize("T", [5, 200])  # few numbers, and many
def test_half_precision_is_left_to_pytorch_under_autocast(T: int):
    x, state, *shares = (t.half() for t in draw_mix(2, T, 256, 2, make_generator(10)))
    with torch.autocast("cpu", torch.bfloat16):
        *mixes, last = mix(x, state, *shares)
    assert ({m.dtype for m in mixes}, last.dtype) == ({torch.bfloat16}, torch.float16)


@pytest.mark.parametrize("name", TOKEN_SHIFT_MIX.names)
def test_marks_may_be_numbers(name: str):
    x, state, *shares = draw_mix(2, 9, 3, 2, make_generator(13))
    marks = draw_marks("reset and mask", 2, 9, make_generator(13))
    numbers = {key: mark.long() for key, mark in marks.items()}
    with use_implementation(token_shift_mix=name):
        for got, expected in zip(
            mix(x, state, *shares, **numbers), mix(x, state, *shares, **marks), strict=True
        ):
            assert torch.equal(got, expected)
    assert torch.equal(token_shift(x, state, **numbers)[0], token_shift(x, state, **marks)[0])


def test_only_wanted_inputs_are_kept_and_only_x_of_full_size():
    x, *shares = (torch.randn(s, requires_grad=True) for s in ((1, 300, 256), (256,), (256,)))
    assert x.numel() >= FEW_NUMBERS
    with torch.autocast("cpu", torch.bfloat16):
        (first, _), _ = token_shift_mix(x, shares)
    kept = [t for t in first.grad_fn.saved_tensors if t is not None]
    assert sorted(t.shape for t in kept) == [(1, 300, 256), (256,), (256,)]
    assert kept[0].data_ptr() == x.data_ptr()


def test_threads_and_addresses_do_not_change_a_bit():
    B, T, C = 3, 40, 300
    inputs = [t.float() for t in draw_mix(B, T, C, 2, make_generator(11))]
    weights = [w.float() for w in draw_mix_weights(inputs, make_generator(12))]
    threads = torch.get_num_threads()
    found = []
    try:
        for count, shift in ((1, 0), (threads, 1), (2, 3), (1, 16)):
            torch.set_num_threads(count)
            moved = []
            for tensor in inputs:
                memory = torch.empty(tensor.numel() + shift)
                moved.append(memory[shift:].view_as(tensor).copy_(tensor))
            with use_implementation(token_shift_mix="numba"):
                results, grads = gradients(mix, moved, weights)
            found.append([*results, *grads])
    finally:
        torch.set_num_threads(threads)
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((2, 4), (4,), None, None), r"x \(2, 4\) must have shape \(B, T, C\)"),
        (((2, 3, 4), (3,), None, None), r"a share \(3,\) must have shape \(4,\)"),
        (((2, 3, 4), (4,), (2, 3), None), r"state \(2, 3\) must have shape \(2, 4\)"),
        (((2, 3, 4), (4,), None, (2, 4)), r"mask \(2, 4\) must have shape \(2, 3\)"),
    ],
)
def test_what_does_not_fit_is_named(arguments, message: str):
    x, share, state, mask = (None if shape is None else torch.zeros(shape) for shape in arguments)
    with pytest.raises(ValueError, match=message):
        token_shift_mix(x, [share], state, mask=mask)
