"""What the layers with a carried state have in common."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from i3lm.layers import ChannelMix, HybridMixer, TimeMix
from tests.layers.building import draw, with_random_parameters

# Sums of a dozen steps in float64.
EXACT = {"rtol": 1e-10, "atol": 1e-10}
LAYERS = {
    "time_mix": lambda: TimeMix(6),
    "channel_mix": lambda: ChannelMix(6, 10),
    "hybrid": lambda: HybridMixer(6, 4),
}


@pytest.fixture(params=LAYERS)
def layer(request: pytest.FixtureRequest) -> nn.Module:
    return with_random_parameters(LAYERS[request.param]())


@pytest.mark.parametrize("cuts", [(1,), (5,), (3, 4, 9)])
def test_pieces_with_the_state_give_the_whole(layer: nn.Module, cuts: tuple[int, ...]):
    x = draw(2, 11, 6)
    mask = draw(2, 11, seed=2) < 0.7
    reset = draw(2, 11, seed=3) > 1
    whole, _ = layer(x, reset=reset, mask=mask)
    outputs, state = [], None
    for start, stop in zip((0, *cuts), (*cuts, 11), strict=True):
        piece = slice(start, stop)
        output, state = layer(x[:, piece], state, reset=reset[:, piece], mask=mask[:, piece])
        outputs.append(output)
    joined = torch.cat(outputs, dim=1)
    torch.testing.assert_close(joined[mask], whole[mask], **EXACT)


def test_padding_on_the_left_changes_nothing(layer: nn.Module):
    x = draw(2, 7, 6)
    padded = torch.cat([draw(2, 3, 6, seed=4), x], dim=1)
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[:, :3] = False
    expected, last_expected = layer(x)
    output, last = layer(padded, mask=mask)
    torch.testing.assert_close(output[:, 3:], expected, **EXACT)
    x = draw(2, 1, 6, seed=5)
    torch.testing.assert_close(layer(x, last)[0], layer(x, last_expected)[0], **EXACT)


def test_a_packed_document_equals_it_alone(layer: nn.Module):
    x = draw(2, 9, 6)
    reset = torch.zeros(2, 9, dtype=torch.bool)
    reset[:, 4] = True
    torch.testing.assert_close(layer(x, reset=reset)[0][:, 4:], layer(x[:, 4:])[0], **EXACT)


def test_the_future_does_not_change_the_past(layer: nn.Module):
    x = draw(2, 9, 6)
    before, _ = layer(x)
    x[:, 5:] += 1
    after, _ = layer(x)
    torch.testing.assert_close(after[:, :5], before[:, :5], **EXACT)
    assert not torch.allclose(after[:, 5:], before[:, 5:])
