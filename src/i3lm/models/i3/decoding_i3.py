"""One new token through the layers of a model by kernels, on the states that its cache keeps."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import ModuleType

import torch
from torch import Tensor, nn

from i3lm.layers import CausalSelfAttention, ChannelMix, HybridMixer, TimeMix
from i3lm.layers.attention import Rotation
from i3lm.layers.decoding_step import Half, LayerStep, Plan
from i3lm.models.i3.cache_i3 import (
    FEED_FORWARD_SHIFT,
    MIXER_SHIFT,
    RECURRENCE,
    GrowingKeys,
    I3Cache,
    read_state,
)

# Where the states of a recurrent module lie in the cache, in the order of its kernel.
_SLOTS: dict[type[nn.Module], tuple[int, ...]] = {
    TimeMix: (RECURRENCE, MIXER_SHIFT),
    HybridMixer: (RECURRENCE,),
    ChannelMix: (FEED_FORWARD_SHIFT,),
}


def layer_steps(
    kernels: ModuleType,
    plan: Plan,
    cache: I3Cache,
    x: Tensor,
    masks: Sequence[Tensor | None],
    rotation: Rotation | None,
) -> list[LayerStep | None]:
    """Gives what computes each layer for one new token of every sequence.

    It replaces the layer's states in the cache, whose keys and values are one longer from now on.

    Args:
        kernels: What `i3lm.ops.decoding_step.decoding_kernels` gives.
        plan: What the kernels compute the layers from.
        cache: The states of the tokens before.
        x: The inputs of the first layer, shape (B, 1, C).
        masks: What the token may see in each layer, (B, 1, 1, S), or None for everything.
        rotation: What `RotaryEmbedding` gives for the token's positions, or None.

    Returns:
        A function from (B, 1, C) to (B, 1, C) for each layer; None where its modules must be
        called, which bring its states up to date themselves.
    """
    token = _Token(kernels, plan, cache, x, rotation)
    steps: list[LayerStep | None] = []
    for layer, (halves, mask) in enumerate(zip(plan.halves, masks, strict=True)):
        states = [token.find_states(layer, half, mask) for half in halves]
        served = bool(halves) and all(found is not None for found in states)
        if served:
            for half, found in zip(halves, states, strict=True):
                token.note_states(layer, half, found or [], mask)
        steps.append(partial(token, halves) if served else None)
    token.complete_table()
    return steps


class _Token:
    """The table of a plan with the states of one token, and what runs on it."""

    def __init__(
        self,
        kernels: ModuleType,
        plan: Plan,
        cache: I3Cache,
        x: Tensor,
        rotation: Rotation | None,
    ) -> None:
        self.cache, self.x, self.tasks = cache, x, kernels.match_threads()
        self.table = plan.table.copy()
        self.table_address = kernels.address_of(self.table)
        self.states: list[list[int]] = [[0] * 4] * len(self.table)
        self.kept: list[Tensor | None] = []  # the table says where these lie
        self.rotation: Tensor | None = None
        if rotation is not None:  # (B or 1, 1, 1, D) each
            angles = torch.stack(rotation).flatten(2)
            self.rotation = angles.expand(2, x.shape[0], -1).contiguous()

    def __call__(self, halves: Sequence[Half], x: Tensor) -> Tensor:
        output = x.clone(memory_format=torch.contiguous_format)
        B, _, C = x.shape
        for half in halves:
            record = self.table_address + half.number * self.table.itemsize
            half.kernel(B, C, output.data_ptr(), record, half.like, self.tasks)
        return output

    def find_states(
        self, layer: int, half: Half, mask: Tensor | None
    ) -> list[Tensor | None] | None:
        """The recurrent states of a half; None where its kernel cannot work with the cache."""
        if isinstance(half.module, CausalSelfAttention):
            keys, like = self.cache.layers[layer], self._heads(half.module)
            seen = mask is None or (mask.dtype == torch.bool and mask.shape[1:3] == (1, 1))
            fits = isinstance(keys, GrowingKeys) and keys.grows_in_place(like, like)
            return [] if seen and fits else None
        states: list[Tensor | None] = []
        for slot in _SLOTS.get(type(half.module), ()):
            state = read_state(self.cache, layer, slot)
            if (
                state is None
                or state.dtype != torch.float32
                or state.device.type != "cpu"
                or not state.is_contiguous()
                or len(state) != len(self.x)
            ):
                return None
            states.append(state)
        return states

    def note_states(
        self, layer: int, half: Half, states: list[Tensor | None], mask: Tensor | None
    ) -> None:
        """Notes where states lie, and for an attention makes room for one key and value more."""
        if isinstance(half.module, CausalSelfAttention):
            keys, values = self.cache.layers[layer].extend(self._heads(half.module))
            B, _, S, D = keys.shape
            self.table["count"][half.number] = S
            self.table["room"][half.number] = keys.stride(1) // D
            seen = None if mask is None else mask.view(-1, S).expand(B, S).contiguous()
            states = [keys, values, seen, self.rotation]
        self.kept += states
        addresses = [0 if state is None else state.data_ptr() for state in states]
        self.states[half.number] = addresses + [0] * (4 - len(addresses))

    def complete_table(self) -> None:
        """Enters what was noted: at once, since an entry alone costs as much as all."""
        if self.states:
            self.table["states"] = self.states

    def _heads(self, attention: CausalSelfAttention) -> Tensor:
        """As many numbers as a token has, in the form of its key: (B, H, 1, D)."""
        return self.x.view(len(self.x), attention.num_attention_heads, 1, -1)
