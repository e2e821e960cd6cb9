from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from i3lm.ops import gelu
from i3lm.ops.dispatch import use_implementation
from i3lm.ops.gelu import GELU
from tests.ops.drawing import make_generator

NAMES = [
    i.name for i in GELU.implementations if i.refuses(torch.device("cpu"), torch.bfloat16) is None
]


def all_bfloat16() -> Tensor:
    """Every finite bfloat16, in the order of its bits."""
    x = (torch.arange(2**16, dtype=torch.int32) << 16).view(torch.float32).bfloat16()
    return x[x.isfinite()]


def exact_gelu(x: float) -> tuple[float, float]:
    """Value and derivative in float64, from the distribution's smaller tail."""
    share = math.erfc(-x / math.sqrt(2)) / 2
    return x * share, share + x * math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def test_every_bfloat16_has_the_nearest_value_and_derivative():
    x = all_bfloat16().requires_grad_()
    with use_implementation(gelu="numba"):
        got = gelu(x)
    (grad,) = torch.autograd.grad(got.sum(), x)
    expected = torch.tensor([exact_gelu(v) for v in x.tolist()], dtype=torch.float64)
    # Beside half of the last place, the two float64 computations may differ where they cancel:
    # the derivative passes through zero at -0.75.
    for a, b in zip((got, grad), expected.unbind(1), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2**-8, atol=2.0**-134)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=20, deadline=None, derandomize=True)
@given(shape=st.lists(st.integers(0, 40), max_size=3), scale=st.sampled_from([0.1, 1.0, 10.0]))
def test_value_and_gradient_in_any_shape(name: str, shape: list[int], scale: float):
    generator = make_generator(*shape)
    x = (torch.randn(shape, generator=generator) * scale).bfloat16().requires_grad_()
    exact = x.detach().double().requires_grad_()
    weights = torch.randn(shape, generator=generator).bfloat16()
    with use_implementation(gelu=name):
        got = gelu(x)
    (grad,) = torch.autograd.grad(got, x, weights)
    expected = F.gelu(exact)
    (wanted,) = torch.autograd.grad(expected, exact, weights.double())
    assert got.dtype == grad.dtype == torch.bfloat16
    # Half of the last of 8 bits, twice in the gradient; PyTorch cancels in the negative tail.
    torch.testing.assert_close(got.double(), expected, rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(grad.double(), wanted, rtol=2**-7, atol=1e-5)


def test_without_gradients_the_bits_are_the_same():
    x = all_bfloat16().requires_grad_()
    with use_implementation(gelu="numba"):
        with_graph = gelu(x)
        with torch.no_grad():
            without = gelu(x)
        assert torch.equal(without, with_graph)
        assert torch.equal(gelu(x.detach()[7:]), with_graph[7:])  # nor do addresses matter
    assert without.grad_fn is None


@pytest.mark.parametrize("name", NAMES)
def test_what_diverged_shows(name: str):
    x = torch.tensor([math.nan, math.inf, -math.inf, 1.0], dtype=torch.bfloat16).requires_grad_()
    with use_implementation(gelu=name):
        got = gelu(x)
    (grad,) = torch.autograd.grad(got.sum(), x)
    assert got.isfinite().tolist() == grad.isfinite().tolist() == [False, False, False, True]


@pytest.mark.parametrize("name", NAMES)
def test_strides_do_not_matter(name: str):
    x = torch.randn(7, 30, 3, generator=make_generator(1)).bfloat16().transpose(0, 2)
    leaf = x.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    strided = x.detach().requires_grad_()
    assert not strided.is_contiguous()
    grad = torch.randn(7, 30, 3, generator=make_generator(2)).bfloat16().transpose(0, 2)
    with use_implementation(gelu=name):
        got, expected = gelu(strided), gelu(leaf)
    assert torch.equal(got, expected)
    grads = (torch.autograd.grad(y, x, grad)[0] for y, x in ((got, strided), (expected, leaf)))
    assert torch.equal(*grads)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_other_dtypes_are_pytorchs_own(dtype: torch.dtype):
    x = torch.randn(50, generator=make_generator(3)).to(dtype)
    assert torch.equal(gelu(x), F.gelu(x))


def test_gradients_of_gradients_in_float64():
    x = torch.randn(5, generator=make_generator(4), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradgradcheck(gelu, x)
