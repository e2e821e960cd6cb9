from __future__ import annotations

import pytest
import torch

from i3lm.layers import TimeMix
from tests.layers.building import count, draw, with_random_parameters


@pytest.mark.parametrize("C", [6, 32])
def test_parameter_count(C: int):
    assert count(TimeMix(C)) == 4 * C * C + 5 * C


def test_equation():
    layer = with_random_parameters(TimeMix(4))
    x = draw(1, 5, 4)
    previous = torch.cat([torch.zeros(1, 1, 4, dtype=x.dtype), x[:, :-1]], dim=1)

    def mix(mu: torch.Tensor) -> torch.Tensor:
        return x * mu + previous * (1 - mu)

    k = mix(layer.time_mix_key) @ layer.key.weight.T
    v = mix(layer.time_mix_value) @ layer.value.weight.T
    r = torch.sigmoid(mix(layer.time_mix_receptance) @ layer.receptance.weight.T)
    w, u = -torch.exp(layer.time_decay), layer.time_first
    rows = []
    for t in range(5):
        weights = [torch.exp((t - 1 - i) * w + u + k[:, i]) for i in range(t)]
        weights.append(torch.exp(k[:, t]))
        mean = sum(a * v[:, i] for i, a in enumerate(weights)) / sum(weights)
        rows.append((r[:, t] * mean) @ layer.output.weight.T)
    # Sums of five terms in float64.
    torch.testing.assert_close(layer(x)[0], torch.stack(rows, dim=1), rtol=1e-10, atol=1e-10)


def test_sums_stay_in_float32_under_autocast():
    layer = with_random_parameters(TimeMix(4)).float()
    with torch.autocast("cpu", torch.bfloat16):
        _, state = layer(draw(1, 5, 4).float())
    assert state.sums.dtype == torch.float32
