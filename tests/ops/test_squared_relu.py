from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from i3lm.ops import squared_relu
from i3lm.ops.dispatch import FEW_NUMBERS, use_implementation
from i3lm.ops.squared_relu import SQUARED_RELU
from tests.ops.drawing import make_generator

NAMES = SQUARED_RELU.names
DTYPES = [torch.float64, torch.float32, torch.bfloat16]

every_implementation = pytest.mark.parametrize("name", NAMES)


@every_implementation
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(shape=st.lists(st.integers(0, 40), min_size=1, max_size=3), seed=st.integers(0, 100))
def test_square_and_gradient_are_rounded_once(
    name: str, dtype: torch.dtype, shape: list[int], seed: int
):
    generator = make_generator(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weights = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    with use_implementation(squared_relu=name):
        got = squared_relu(x)
    (grad,) = torch.autograd.grad(got, x, weights)
    positive = x.detach().double().clamp_min(0)
    # The products of two float64 are rounded themselves, as there is nothing wider here.
    assert torch.equal(got, positive.square().to(dtype))
    assert torch.equal(grad, (2 * positive * weights.double()).to(dtype))


@every_implementation
def test_all_bfloat16_numbers_have_the_right_gradient(name: str):
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.uint16)
    x = bits.view(torch.bfloat16)
    # Squares of what is left out lie outside the range of the dtype.
    x = x[x.isfinite() & ((x <= 0) | ((x > 2**-60) & (x < 2**60)))].requires_grad_()
    with use_implementation(squared_relu=name):
        (grad,) = torch.autograd.grad(squared_relu(x).sum(), x)
    assert torch.equal(grad, 2 * torch.relu(x.detach()))


@every_implementation
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_shows(name: str, dtype: torch.dtype):
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0], dtype=dtype)
    with use_implementation(squared_relu=name):
        got = squared_relu(x)
    assert got[0].isnan()
    assert got[1:].tolist() == [torch.inf, 0, 0]


@every_implementation
def test_gradients_are_those_of_finite_differences(name: str):
    x = torch.randn(3, 4, generator=make_generator(1), dtype=torch.float64, requires_grad=True)
    with use_implementation(squared_relu=name):
        assert torch.autograd.gradcheck(squared_relu, x)


@every_implementation
def test_strides_do_not_matter(name: str):
    x = torch.randn(5, 6, generator=make_generator(2)).T.requires_grad_()
    with use_implementation(squared_relu=name):
        got = squared_relu(x)
    assert got.shape == (6, 5)
    torch.testing.assert_close(got, F.relu(x) ** 2)
    (grad,) = torch.autograd.grad(got.sum(), x)  # of strides 0
    torch.testing.assert_close(grad, 2 * F.relu(x))


@every_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(name: str, dtype: torch.dtype):
    x = torch.randn(30, generator=make_generator(3)).to(dtype)
    with use_implementation(squared_relu=name):
        plain = squared_relu(x)
        with torch.autocast("cpu", torch.bfloat16):
            got = squared_relu(x)
    assert got.dtype == dtype
    assert torch.equal(got, plain)


def test_the_output_alone_is_kept():
    x = torch.randn(FEW_NUMBERS, generator=make_generator(4), requires_grad=True)
    output = squared_relu(x)
    (kept,) = output.grad_fn.saved_tensors
    assert kept.data_ptr() == output.data_ptr()


def test_an_output_that_was_changed_is_noticed():
    x = torch.randn(FEW_NUMBERS, generator=make_generator(5), requires_grad=True)
    output = squared_relu(x)
    with torch.no_grad():
        output.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
