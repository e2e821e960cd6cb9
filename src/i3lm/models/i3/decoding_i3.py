"""One new token through the layers of a model by kernels, on the states that its cache keeps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from operator import is_
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Cache

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
from i3lm.ops.decoding_step import decoding_kernels

# Where the states of a recurrent module lie in the cache, in the order of its kernel.
_SLOTS: dict[type[nn.Module], tuple[int, ...]] = {
    TimeMix: (RECURRENCE, MIXER_SHIFT),
    HybridMixer: (RECURRENCE,),
    ChannelMix: (FEED_FORWARD_SHIFT,),
}


def next_logits(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | dict[str, Tensor | None] | None,
    position_ids: Tensor | None,
    cache: Cache | None,
) -> Tensor | None:
    """Gives what follows one new token of every sequence, if kernels can do all of it.

    Calling a few small modules between one token's kernels and the next one's takes as long as
    reading many a matrix: the matrices have driven them out of the processor's caches.

    Args:
        model: An `I3ForCausalLM`.
        input_ids: Token ids, shape (B, 1).
        attention_mask: As for `I3Model.forward`, like the others.
        position_ids: Positions, shape (B, 1) or (1, 1).
        cache: States and keys of earlier tokens, which the new one joins.

    Returns:
        Logits, shape (B, 1, V); or None, and nothing has changed, where modules must be called:
        something is padded, watched, replaced, or wrong.
    """
    if not isinstance(cache, I3Cache) or input_ids.dtype != torch.int64 or input_ids.dim() != 2:
        return None
    if isinstance(attention_mask, dict):
        return None
    if attention_mask is not None and not (attention_mask.dim() == 2 and attention_mask.all()):
        return None
    if model.config.output_hidden_states:
        return None
    kernels = decoding_kernels(input_ids, torch.float32)
    plan = None if kernels is None else model.plan_step(kernels)
    if kernels is None or plan is None or plan.ends is None:
        return None
    ids, rotary = input_ids.flatten().tolist(), model.model.rotary_embedding
    if position_ids is None:
        positions = [cache.get_seq_length()]
        position_ids = None if rotary is None else torch.tensor([positions])
    else:
        positions = position_ids.flatten().tolist()
    B = len(ids)
    if len(positions) not in (1, B):
        return None
    positions *= B // len(positions)
    for numbers, size in zip((ids, positions), plan.ends.sizes, strict=False):
        if min(numbers) < 0 or max(numbers) >= size:
            return None
    rotation = None if rotary is None else rotary(position_ids, torch.float32)
    token = begin_token(kernels, plan, cache, (B, plan.ends.channels), None, rotation)
    if token is None:
        return None
    cache.count_tokens(1)
    return token.run_whole(ids, positions)


def begin_token(
    kernels: ModuleType,
    plan: Plan,
    cache: I3Cache,
    shape: tuple[int, int],
    masks: Sequence[Tensor | None] | None,
    rotation: Rotation | None,
) -> TokenByKernels | None:
    """Gives what computes layers for one new token of every sequence.

    From then on, their keys and values in the cache are one longer.

    Args:
        kernels: What `i3lm.ops.decoding_step.decoding_kernels` gives.
        plan: What the kernels compute the layers from.
        cache: The states of the tokens before.
        shape: The number of sequences and the channels of the first layer's inputs.
        masks: What the token may see in each layer, (B, 1, 1, S), or None for everything.
        rotation: What `RotaryEmbedding` gives for the token's positions, or None.

    Returns:
        None where the kernels cannot work on what the cache keeps.
    """
    token: TokenByKernels | None = plan.prepared.get(cache)
    if token is None or not token.continues(cache, shape):
        token = plan.prepared[cache] = TokenByKernels(kernels, plan, cache, shape)
    return token if token.find_keys(cache, masks, rotation) else None


class TokenByKernels:
    """The table of a plan with the places of the states in one cache.

    Recurrent states stay where they are from token to token, and keys and values move rarely.

    Args:
        kernels: As for `begin_token`, like the others.
        plan: What the kernels compute the layers from.
        cache: The states of the tokens before.
        shape: The number of sequences and the channels of the first layer's inputs.
    """

    def __init__(
        self, kernels: ModuleType, plan: Plan, cache: I3Cache, shape: tuple[int, int]
    ) -> None:
        self.plan, self._shape = plan, shape
        ends, B = plan.ends, shape[0]
        records = [ends.embedding, *plan.records, ends.head] if ends else plan.records
        self._table = kernels.Table(records, *shape)
        self._first = 1 if ends else 0  # the number of the first half's record
        self._x = torch.empty(B, 1, shape[1])
        # What is new with every whole token: ids, positions and the address of its logits.
        self._news = np.zeros(2 * B + 1, np.int64)
        self._recurrent = sorted({h.layer for h in plan.halves if type(h.module) in _SLOTS})
        self._states, self._flags = self._recurrent_states(cache)
        # The layer of every attention, and the form of its keys.
        self._attentions: list[tuple[int, Tensor]] = []
        self._attention_numbers: list[int] = []
        self._kept: list[Tensor | None] = []  # the table says where these lie
        self._serves = True
        addresses = self._table.records["states"]
        for number, half in enumerate(plan.halves, start=self._first):
            if isinstance(half.module, CausalSelfAttention):
                keys = self._x.view(B, half.module.num_attention_heads, 1, -1)
                self._attentions.append((half.layer, keys))
                self._attention_numbers.append(number)
            for place, slot in enumerate(_SLOTS.get(type(half.module), ())):
                layer = cache.layers[half.layer]
                state = layer.recurrent_states[slot] if layer.has_previous_state[slot] else None
                if state is None or not self._can_replace(state):
                    self._serves = False
                else:
                    addresses[number, place] = state.data_ptr()
        if ends:
            ids = self._news.__array_interface__["data"][0]
            addresses[0, :2] = ids, ids + self._news.itemsize * B
            addresses[-1, 0] = ids + self._news.itemsize * 2 * B

    def continues(self, cache: I3Cache, shape: tuple[int, int]) -> bool:
        """Whether recurrent states and rows are those that this was made for."""
        states, flags = self._recurrent_states(cache)
        return shape == self._shape and flags == self._flags and all(map(is_, states, self._states))

    def find_keys(
        self, cache: I3Cache, masks: Sequence[Tensor | None] | None, rotation: Rotation | None
    ) -> bool:
        """Makes room for the token's keys and values, and notes where all of them lie.

        Returns:
            Whether the kernels can be run; if not, nothing has changed.
        """
        growing: list[tuple[GrowingKeys, Tensor, Tensor | None]] = []
        for layer, like in self._attentions:
            keys, mask = cache.layers[layer], None if masks is None else masks[layer]
            visible = mask is None or (mask.dtype == torch.bool and mask.shape[1:3] == (1, 1))
            if not (isinstance(keys, GrowingKeys) and keys.grows_in_place(like, like) and visible):
                return False
            growing.append((keys, like, mask))
        if not self._serves or not growing:
            return self._serves
        turned, B = None, self._shape[0]
        if rotation is not None:  # (B or 1, 1, 1, D) each
            turned = torch.stack(rotation).flatten(2).expand(2, B, -1).contiguous()
        self._kept, places = [turned], []
        for room, like, mask in growing:
            keys, values = room.extend(like)
            S = keys.shape[2]
            seen = None if mask is None else mask.view(-1, S).expand(B, S).contiguous()
            lying = (keys, values, seen, turned)
            self._kept += lying
            addresses = [0 if tensor is None else tensor.data_ptr() for tensor in lying]
            places.append([*addresses, keys.stride(1) // keys.shape[3], S])
        # At once: an entry alone costs as much as all.
        self._table.places[self._attention_numbers] = places
        return True

    def run(self, stretch: Stretch, x: Tensor) -> Tensor:
        """Gives the outputs (B, 1, C) of a stretch of layers, and replaces its states."""
        assert stretch.halves is not None
        output = x.clone(memory_format=torch.contiguous_format)
        self._table.run(output, self._first + stretch.halves.start, len(stretch.halves))
        return output

    def run_whole(self, ids: list[int], positions: list[int]) -> Tensor:
        """Gives logits (B, 1, V) of tokens at positions, where the plan has ends."""
        assert self.plan.ends is not None
        logits = torch.empty(len(ids), 1, self.plan.ends.outputs)
        self._news[:] = [*ids, *positions, logits.data_ptr()]
        self._table.run(self._x, 0, len(self._table.records))
        return logits

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
