from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from i3lm.ops import token_shift
from tests.ops.drawing import MARKS, cut_marks, draw_marks, make_generator


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
