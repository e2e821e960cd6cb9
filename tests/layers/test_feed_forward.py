from __future__ import annotations

import math

import pytest
import torch

from i3lm.layers import FeedForward
from tests.layers.building import count, draw, with_random_parameters


@pytest.mark.parametrize("C", [6, 32])
def test_parameter_count(C: int):
    assert count(FeedForward(C, 4 * C)) == 8 * C * C + 5 * C


@pytest.mark.parametrize(("C", "rank"), [(6, 2), (32, 5)])
def test_parameter_count_of_low_rank(C: int, rank: int):
    assert count(FeedForward(C, 4 * C, rank)) == 2 * rank * (C + 4 * C) + 5 * C


def test_equation_has_the_exact_gelu():
    layer = with_random_parameters(FeedForward(3, 5))
    x = draw(2, 4, 3)
    middle = x @ layer.up.weight.T + layer.up.bias
    middle = middle * 0.5 * (1 + torch.erf(middle / math.sqrt(2)))
    expected = middle @ layer.down.weight.T + layer.down.bias
    # A few float64 products; the tanh approximation of GELU would be off by 1e-4.
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)
