from __future__ import annotations

import pytest
import torch

from i3lm.layers import ChannelMix
from tests.layers.building import count, draw, with_random_parameters


@pytest.mark.parametrize("C", [6, 32])
def test_parameter_count(C: int):
    assert count(ChannelMix(C, 4 * C)) == 9 * C * C + 2 * C


def test_equation():
    layer = with_random_parameters(ChannelMix(4, 7))
    x = draw(2, 5, 4)
    previous = torch.cat([torch.zeros(2, 1, 4, dtype=x.dtype), x[:, :-1]], dim=1)
    mu_k, mu_r = layer.time_mix_key, layer.time_mix_receptance
    k = torch.relu((x * mu_k + previous * (1 - mu_k)) @ layer.key.weight.T) ** 2
    r = torch.sigmoid((x * mu_r + previous * (1 - mu_r)) @ layer.receptance.weight.T)
    expected = r * (k @ layer.value.weight.T)
    output, state = layer(x)
    # A few float64 products.
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(state, x[:, -1])
