from __future__ import annotations

import pytest
import torch

from i3lm.layers import LowRankLinear
from tests.layers.building import count, draw, with_random_parameters


@pytest.mark.parametrize(("size_in", "size_out", "rank"), [(5, 7, 2), (256, 1024, 64)])
def test_parameter_count(size_in: int, size_out: int, rank: int):
    assert count(LowRankLinear(size_in, size_out, rank)) == rank * (size_in + size_out) + size_out


def test_is_the_product_of_its_factors():
    layer = with_random_parameters(LowRankLinear(5, 7, 2))
    x = draw(2, 3, 5)
    expected = x @ (layer.lora_A @ layer.lora_B).T + layer.bias
    # The same float64 products in another order.
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)


def test_new_factors_are_normal_and_the_bias_zero():
    torch.manual_seed(0)
    layer = LowRankLinear(300, 200, 50)
    assert not layer.bias.any()
    for factor in (layer.lora_A.detach(), layer.lora_B.detach()):
        # At least 10,000 draws: deviation and mean are known to about 1 in 100.
        assert float(factor.std()) == pytest.approx(0.02, rel=0.03)
        assert float(factor.mean()) == pytest.approx(0, abs=1e-3)


def test_shows_its_sizes():
    assert repr(LowRankLinear(5, 7, 2)) == "LowRankLinear(5 -> 2 -> 7)"
