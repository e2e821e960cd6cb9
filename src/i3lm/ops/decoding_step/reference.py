"""The halves of a layer for one new token as equations, to hold the kernels against.

`i3lm.layers` has the same equations as modules for whole sequences.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from i3lm.ops.state_space import state_space
from i3lm.ops.wkv import wkv

EPSILON = 1e-5


def half(
    name: str,
    x: Tensor,
    norm: list[Tensor],
    vectors: list[Tensor],
    weights: list[Tensor],
    states: list[Tensor],
) -> list[Tensor]:
    """Gives ``x + module(norm(x))`` and the states after it.

    Args:
        name: The kernel's name.
        x: Inputs, shape (B, C).
        norm: Weight and bias of the LayerNorm.
        vectors: The kernel's vectors, in its order.
        weights: Its matrices, in its order.
        states: Its states, in its order; of an attention keys and values (B, H, S, D) whose last
            token is to be written.
    """
    fresh = F.layer_norm(x, x.shape[-1:], norm[0], norm[1], EPSILON)
    outputs: list[Tensor] = _HALVES[name](x, fresh, vectors, weights, states)
    return outputs


def _time_mix(x, fresh, vectors, weights, states):
    time_decay, time_first, *shares = vectors
    sums, shift = states
    key, value, receptance = (
        torch.lerp(shift, fresh, share) @ weight.T
        for share, weight in zip(shares, weights[:3], strict=True)
    )
    mixed, sums = wkv(key[:, None], value[:, None], -time_decay.exp(), time_first, sums)
    return [x + (receptance.sigmoid() * mixed[:, 0]) @ weights[3].T, sums, fresh]


def _channel_mix(x, fresh, vectors, weights, states):
    key = torch.lerp(states[0], fresh, vectors[0]) @ weights[0].T
    receptance = torch.lerp(states[0], fresh, vectors[1]) @ weights[1].T
    return [x + receptance.sigmoid() * (key.relu().square() @ weights[2].T), fresh]


def _state_space(x, fresh, vectors, weights, states):
    mix, A, B, C, D = vectors
    mixed, state = state_space(fresh[:, None], mix, A, B, C, D, states[0])
    return [x + mixed[:, 0], state]


def _feed_forward(x, fresh, vectors, weights, states):
    return [x + F.gelu(fresh @ weights[0].T) @ weights[1].T]


def _attention(x, fresh, vectors, weights, states):
    keys, values = (state.clone() for state in states)
    B, H, _, D = keys.shape
    query, key, value = (fresh @ weights[0].T).view(B, 3, H, D).unbind(1)
    keys[:, :, -1], values[:, :, -1] = key, value
    scores = (keys @ query[..., None])[..., 0] * D**-0.5  # (B, H, S)
    mixed = (scores.softmax(-1)[..., None] * values).sum(2)
    return [x + mixed.flatten(1) @ weights[1].T, keys, values]


_HALVES: dict[str, Any] = {
    "time_mix": _time_mix,
    "channel_mix": _channel_mix,
    "state_space": _state_space,
    "feed_forward": _feed_forward,
    "attention": _attention,
}
