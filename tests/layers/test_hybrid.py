from __future__ import annotations

import pytest
import torch

from i3lm.layers import HybridMixer
from tests.layers.building import count, draw, with_random_parameters


@pytest.mark.parametrize(("C", "N"), [(6, 4), (512, 32)])
def test_parameter_count(C: int, N: int):
    assert count(HybridMixer(C, N)) == N * N + 2 * N * C + 2 * C


def test_equation():
    layer = with_random_parameters(HybridMixer(3, 2))
    x = draw(2, 6, 3)
    h, s = torch.zeros(2, 3, dtype=x.dtype), torch.zeros(2, 2, dtype=x.dtype)
    rows = []
    for t in range(6):
        h = layer.mix * h + (1 - layer.mix) * x[:, t]
        s = s @ layer.A.T + x[:, t] @ layer.B.T
        rows.append(s @ layer.C.T + layer.D * h)
    output, state = layer(x)
    # Six float64 steps.
    torch.testing.assert_close(output, torch.stack(rows, dim=1), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state, torch.cat([h, s], dim=1), rtol=1e-10, atol=1e-10)
