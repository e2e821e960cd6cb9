from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from i3lm.ops import causal_attention
from i3lm.ops.attention import TILE
from i3lm.ops.dispatch import use_implementation
from tests.ops.drawing import make_generator


def exact_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention as the formula says, with the whole matrix of weights."""
    T = query.shape[2]
    scores = query @ key.mT / query.shape[3] ** 0.5
    later = torch.ones(T, T, dtype=torch.bool).triu(1)
    return torch.softmax(scores.masked_fill(later, float("-inf")), dim=-1) @ value


@pytest.mark.parametrize("name", ["tiles", "torch"])
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    B=st.integers(1, 2),
    H=st.integers(1, 3),
    T=st.sampled_from([1, 2, 17, TILE - 1, TILE, TILE + 1, 2 * TILE + 5]),
    D=st.sampled_from([1, 8, 32]),
)
def test_bfloat16_equals_the_formula(name: str, B: int, H: int, T: int, D: int):
    generator = make_generator(B, H, T, D)
    low = [torch.randn(B, H, T, D, generator=generator).bfloat16().requires_grad_() for _ in "qkv"]
    exact = [x.detach().double().requires_grad_() for x in low]
    weights = torch.randn(B, H, T, D, generator=generator, dtype=torch.float64)
    with use_implementation(causal_attention=name):
        got = causal_attention(*low)
    expected = exact_attention(*exact)
    grads = torch.autograd.grad((got * weights.bfloat16()).sum(), low)
    wanted = torch.autograd.grad((expected * weights).sum(), exact)
    assert got.dtype == torch.bfloat16
    # bfloat16 has 8 bits; a sum of rounded terms of size 1 errs by a few times 2^-8.
    for a, b in zip((got, *grads), (expected, *wanted), strict=True):
        error = (a.double() - b).abs().max() / b.abs().max().clamp_min(1)
        assert error < 2e-2


def test_no_token_sees_a_later_one():
    generator = make_generator(3)
    query, key, value = (torch.randn(1, 2, 300, 8, generator=generator).bfloat16() for _ in "qkv")
    before = causal_attention(query, key, value)
    key[:, :, 200:], value[:, :, 200:] = 9.0, -9.0
    after = causal_attention(query, key, value)
    assert torch.equal(after[:, :, :200], before[:, :, :200])
    assert not torch.equal(after[:, :, 200:], before[:, :, 200:])


def test_other_dtypes_are_pytorchs_own():
    generator = make_generator(4)
    exact = [torch.randn(2, 2, 9, 4, generator=generator, dtype=torch.float64) for _ in "qkv"]
    torch.testing.assert_close(causal_attention(*exact), exact_attention(*exact))
