"""One new token through the layers of a model by kernels, on the states that its cache keeps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from operator import is_
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from i3lm.layers import CausalSelfAttention, ChannelMix, HybridMixer, TimeMix
from i3lm.layers.attention import Rotation
from i3lm.layers.decoding_step import Plan, Stretch
from i3lm.models.i3.cache_i3 import (
    FEED_FORWARD_SHIFT,
    MIXER_SHIFT,
    RECURRENCE,
    GrowingKeys,
    I3Cache,
)

# Where the states of a recurrent module lie in the cache, in the order of its kernel.
_SLOTS: dict[type[nn.Module], tuple[int, ...]] = {
    TimeMix: (RECURRENCE, MIXER_SHIFT),
    HybridMixer: (RECURRENCE,),
    ChannelMix: (FEED_FORWARD_SHIFT,),
}


def begin_token(
    kernels: ModuleType,
    plan: Plan,
    cache: I3Cache,
    x: Tensor,
    masks: Sequence[Tensor | None],
    rotation: Rotation | None,
) -> TokenByKernels | None:
    """Gives what computes layers for one new token of every sequence.

    From then on, their keys and values in the cache are one longer.

    Args:
        kernels: What `i3lm.ops.decoding_step.decoding_kernels` gives.
        plan: What the kernels compute the layers from.
        cache: The states of the tokens before.
        x: The inputs of the first layer, shape (B, 1, C).
        masks: What the token may see in each layer, (B, 1, 1, S), or None for everything.
        rotation: What `RotaryEmbedding` gives for the token's positions, or None.

    Returns:
        None where the kernels cannot work on what the cache keeps.
    """
    token: TokenByKernels | None = plan.prepared.get(cache)
    if token is None or not token.continues(cache, x):
        token = plan.prepared[cache] = TokenByKernels(kernels, plan, cache, x)
    return token if token.find_keys(cache, x, masks, rotation) else None


class TokenByKernels:
    """The table of a plan with the places of the states in one cache.

    Recurrent states stay where they are from token to token, and keys and values move rarely.

    Args:
        kernels: As for `begin_token`, like the others.
        plan: What the kernels compute the layers from.
        cache: The states of the tokens before.
        x: The inputs of the first layer, shape (B, 1, C).
    """

    def __init__(self, kernels: ModuleType, plan: Plan, cache: I3Cache, x: Tensor) -> None:
        self.plan, self._shape = plan, x.shape
        self._table = kernels.Table(plan.records, x.shape[0], x.shape[-1])
        self._recurrent = sorted({h.layer for h in plan.halves if type(h.module) in _SLOTS})
        self._states, self._flags = self._recurrent_states(cache)
        # The number, the layer and the heads of every attention.
        self._attentions = [
            (number, half.layer, half.module.num_attention_heads)
            for number, half in enumerate(plan.halves)
            if isinstance(half.module, CausalSelfAttention)
        ]
        self._attention_numbers = [number for number, _, _ in self._attentions]
        self._kept: list[Tensor | None] = []  # the table says where these lie
        self._serves = True
        addresses = self._table.records["states"]
        for number, half in enumerate(plan.halves):
            for place, slot in enumerate(_SLOTS.get(type(half.module), ())):
                layer = cache.layers[half.layer]
                state = layer.recurrent_states[slot] if layer.has_previous_state[slot] else None
                if state is None or not self._can_replace(state):
                    self._serves = False
                else:
                    addresses[number, place] = state.data_ptr()

    def continues(self, cache: I3Cache, x: Tensor) -> bool:
        """Whether recurrent states and rows are those that this was made for."""
        states, flags = self._recurrent_states(cache)
        return (
            x.shape == self._shape and flags == self._flags and all(map(is_, states, self._states))
        )

    def find_keys(
        self,
        cache: I3Cache,
        x: Tensor,
        masks: Sequence[Tensor | None],
        rotation: Rotation | None,
    ) -> bool:
        """Makes room for the token's keys and values, and notes where all of them lie.

        Returns:
            Whether the kernels can be run; if not, nothing has changed.
        """
        growing: list[tuple[GrowingKeys, Tensor]] = []
        for _, layer, heads in self._attentions:
            keys, like, mask = cache.layers[layer], x.view(len(x), heads, 1, -1), masks[layer]
            visible = mask is None or (mask.dtype == torch.bool and mask.shape[1:3] == (1, 1))
            if not (isinstance(keys, GrowingKeys) and keys.grows_in_place(like, like) and visible):
                return False
            growing.append((keys, like))
        if not self._serves or not growing:
            return self._serves
        turned = None
        if rotation is not None:  # (B or 1, 1, 1, D) each
            angles = torch.stack(rotation).flatten(2)
            turned = angles.expand(2, len(x), -1).contiguous()
        self._kept = [turned]
        addresses, counts, rooms = [], [], []
        for (_, layer, _), (room, like) in zip(self._attentions, growing, strict=True):
            keys, values = room.extend(like)
            S, mask = keys.shape[2], masks[layer]
            seen = None if mask is None else mask.view(-1, S).expand(len(x), S).contiguous()
            lying = (keys, values, seen, turned)
            self._kept += lying
            addresses.append([0 if tensor is None else tensor.data_ptr() for tensor in lying])
            counts.append(S)
            rooms.append(keys.stride(1) // keys.shape[3])
        records, numbers = self._table.records, self._attention_numbers
        # At once: an entry alone costs as much as all.
        records["states"][numbers], records["count"][numbers] = addresses, counts
        records["room"][numbers] = rooms
        return True

    def run(self, stretch: Stretch, x: Tensor) -> Tensor:
        """Gives the outputs (B, 1, C) of a stretch of layers, and replaces its states."""
        assert stretch.halves is not None
        output = x.clone(memory_format=torch.contiguous_format)
        self._table.run(output, stretch.halves.start, len(stretch.halves))
        return output

    def _recurrent_states(self, cache: I3Cache) -> tuple[list[Any], list[Any]]:
        """The states in all slots, and whether they are of tokens that were seen."""
        layers: list[Any] = [cache.layers[layer] for layer in self._recurrent]
        states = chain.from_iterable(layer.recurrent_states.values() for layer in layers)
        flags = chain.from_iterable(layer.has_previous_state.values() for layer in layers)
        return list(states), list(flags)

    def _can_replace(self, state: Tensor) -> bool:
        return (
            state.dtype == torch.float32
            and state.device.type == "cpu"
            and state.is_contiguous()
            and len(state) == self._shape[0]
        )
