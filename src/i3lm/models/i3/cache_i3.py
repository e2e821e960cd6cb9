"""Where the states of recurrent layers live between calls.

In generation that is transformers' own cache; in training on streams, a `CarriedState`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, StaticCache
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
)

from i3lm.errors import CheckpointError
from i3lm.models.i3.configuration_i3 import I3Config

# Slots of a recurrent layer in the cache.
RECURRENCE, MIXER_SHIFT, FEED_FORWARD_SHIFT = range(3)
SLOTS = ("recurrence", "mixer_shift", "feed_forward_shift")

# By layer and slot.
_States = dict[tuple[int, int], Tensor]


class GrowingKeys(DynamicLayer):
    """Keys and values of an attention layer with room for more behind them.

    transformers' own layer copies all of them for every token. `keys` and `values` are views of
    what is in use, and whatever else puts other tensors in their place (reordering, cropping) may
    do so: the room belongs to the very tensors that this class has put there.
    """

    _held: tuple[Tensor, Tensor] | None = None
    _spare = 0  # tokens that fit behind what is held

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Adds keys and values (B, H, T, D), and gives those that the new tokens may see."""
        if not self.grows_in_place(key_states, value_states):
            return super().update(key_states, value_states, *args, **kwargs)
        keys, values = self.extend(key_states)
        T = key_states.shape[-2]
        keys[..., -T:, :], values[..., -T:, :] = key_states, value_states
        return keys, values

    def extend(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Makes room for as many tokens as `like` (B, H, T, D) has.

        Returns:
            Keys and values that the new tokens may see, theirs at the end and yet to be written;
            of every head they are contiguous.
        """
        if not self.is_initialized:
            self.lazy_initialization(like, like)
        B, H, T, D = like.shape
        if not self._owns_room() or self._spare < T:
            self._move(like)
        S = self.keys.shape[-2] + T
        keys, values = (x.as_strided((B, H, S, D), x.stride()) for x in (self.keys, self.values))
        self._spare -= T
        self._keep(keys, values, T)
        self._held = self.keys, self.values
        return keys, values

    def grows_in_place(self, keys: Tensor, values: Tensor) -> bool:
        """Whether keys and values (B, H, T, D) can be written behind those that are there."""
        held = self.keys if self._length() else keys
        tracked = torch.is_grad_enabled() and any(x.requires_grad for x in (held, keys, values))
        recording = getattr(self, "record_past", False)  # all are kept until a `crop`
        alike = keys.shape == values.shape and keys.dtype == values.dtype == held.dtype
        fitting = keys.shape[:2] == held.shape[:2] and keys.shape[3] == held.shape[3]
        return (
            alike
            and fitting
            and keys.device == held.device
            and not (tracked or recording or torch.compiler.is_compiling())
        )

    def _keep(self, keys: Tensor, values: Tensor, added: int) -> None:
        self.keys, self.values = keys, values

    def _length(self) -> int:
        """The number of tokens whose keys are kept."""
        return self.keys.shape[-2] if self.is_initialized and self.keys.dim() == 4 else 0

    def _owns_room(self) -> bool:
        if self._held is None or self.keys is not self._held[0] or self.values is not self._held[1]:
            return False
        # Outside of inference mode nothing may be written into what was made inside.
        return torch.is_inference_mode_enabled() or not self.keys.is_inference()

    def _move(self, like: Tensor) -> None:
        """Puts keys and values at the beginning of new memory, with room for those of `like`."""
        (B, H, T, D), S = like.shape, self._length()
        self._spare = T + max(64, (S + T) // 2)  # in proportion: a token costs the same for ever
        moved = []
        for old in (self.keys, self.values):
            memory = like.new_empty(B, H, S + self._spare, D)
            if S:
                memory[:, :, :S] = old
            moved.append(memory[:, :, :S])
        self.keys, self.values = moved


class GrowingSlidingKeys(GrowingKeys, DynamicSlidingWindowLayer):
    """The same for an attention that sees a window: what has left it makes room in time."""

    def _keep(self, keys: Tensor, values: Tensor, added: int) -> None:
        self.cumulative_length += added
        start = -self.sliding_window + 1
        self.keys, self.values = keys[:, :, start:], values[:, :, start:]


class GrowingHybridKeys(GrowingKeys, LinearAttentionAndFullAttentionLayer):
    """The same beside recurrent states."""


_GROWING: dict[type, type] = {
    DynamicLayer: GrowingKeys,
    DynamicSlidingWindowLayer: GrowingSlidingKeys,
    LinearAttentionAndFullAttentionLayer: GrowingHybridKeys,
}


class KnowsLength(Cache):
    """A cache of transformers that also knows its length when no layer is attention.

    The stock ones ask an attention layer how many tokens it has seen; a stack of recurrent layers
    alone has none.
    """

    _has_attention: bool
    _seen_tokens: Any  # a number, or a scalar of int64

    def count_tokens(self, count: int) -> None:
        """Notes that `count` more tokens have passed through the model."""
        self._seen_tokens += count

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """The number of tokens seen so far."""
        return super().get_seq_length(layer_idx) if self._has_attention else self._seen_tokens

    @property
    def is_linear(self) -> list[bool]:
        """Whether each layer is recurrent; False for all where there is no other.

        `generate` takes a cache that is recurrent throughout for one that does not know its
        length, and would read again what this one has read.
        """
        # Not what the class above gives: a property of `super` stops torch.compile.
        return [
            self._has_attention
            and isinstance(layer, LinearAttentionCacheLayerMixin)
            and not isinstance(layer, CacheLayerMixin)
            for layer in self.layers
        ]

    def reset(self) -> None:
        """Forgets everything."""
        super().reset()
        self._seen_tokens *= 0  # in place where it is a tensor


class I3Cache(KnowsLength, DynamicCache):
    """The states, and keys and values that grow in place, see `GrowingKeys`.

    Args:
        config: The model's configuration.
    """

    def __init__(self, config: I3Config, **kwargs) -> None:
        super().__init__(config=config, **kwargs)
        for layer in self.layers:
            layer.__class__ = _GROWING.get(type(layer), type(layer))
        self._has_attention, self._seen_tokens = has_attention(config), 0

    @property
    def is_compileable(self) -> bool:
        """False: keys move as they grow, and `generate` must pass plain masks."""
        return False


class I3StaticCache(KnowsLength, StaticCache):
    """The states, and keys and values with room for a number of tokens from the beginning on.

    All of its tensors keep their size and, from one step to the next, their place, so that a step
    of decoding can be compiled and its kernels launched as one CUDA graph.

    Args:
        config: The model's configuration.
        max_cache_len: The tokens that there is room for, at least a sliding window's.
        device: Where the model is.
    """

    def __init__(self, config: I3Config, max_cache_len: int, device: torch.device) -> None:
        limit, window = config.position_limit, config.sliding_window or 0
        # A layer with a window would forget what does not fit, and see less than its window.
        max_cache_len = max(max_cache_len, window if limit is None else min(window, limit))
        super().__init__(config=config, max_cache_len=max_cache_len)
        # A tensor: every other number would be compiled anew.
        seen = torch.zeros((), dtype=torch.int64, device=device)
        torch._dynamo.mark_static_address(seen)
        self._has_attention, self._seen_tokens = has_attention(config), seen
        keeps_all = {"full_attention", "hybrid"} & set(config.layer_types or ())
        ends = [max_cache_len] if keeps_all else []
        ends += [] if limit is None else [limit]
        self._room = min(ends, default=None)

    def check_room(self, length: int) -> None:
        """Raises a ValueError where a text of so many tokens is too long."""
        if self._room is not None and length > self._room:
            raise ValueError(
                f"a text of {length} tokens, with its padding and all new ones, is longer than a "
                f"static cache of {self._room} can keep: ask for fewer, or leave out "
                "cache_implementation and cache"
            )


def has_attention(config: I3Config) -> bool:
    """Whether any layer keeps keys and values."""
    return any(kind != "linear_attention" for kind in config.layer_types or ())


class CarriedState:
    """The states of recurrent layers from one row of a stream to the next, for training.

    Row b of a batch goes on where row b of the batch before ended: truncated back-propagation
    through time, since no gradient flows into the row before. Give the same object to every
    forward pass, and call `advance` once its backward pass is done::

        carried = CarriedState(model.config)
        for batch in stream:
            model(**batch, carried_state=carried).loss.backward()
            carried.advance()

    Until then a forward pass may be repeated: it reads the same old states. Gradient
    checkpointing does so, and a layer that is computed again still reads what it read.
    Attention layers carry nothing: they see their row alone.

    Args:
        config: The model's configuration.
    """

    def __init__(self, config: I3Config) -> None:
        self._shapes = _state_shapes(config)
        self._before: _States = {}
        self._after: _States = {}

    def begin_row(self, rows: int) -> CarriedRow:
        """Gives a forward pass over a batch of `rows` rows what it reads, and where it writes.

        Raises:
            ValueError: The row before was of a batch of another size.
        """
        for state in self._before.values():
            if len(state) != rows:
                raise ValueError(
                    f"the carried state is of {len(state)} rows and the batch has {rows}: each "
                    "row goes on with the same row of the batch before, so keep their number or "
                    "begin with a new CarriedState"
                )
        self._after = {}
        return CarriedRow(self._before, self._after)

    def advance(self) -> None:
        """Makes the states that the last forward pass wrote those that the next one reads."""
        if self._after:
            self._before, self._after = self._after, {}

    def to(self, device: torch.device | str) -> CarriedState:
        """Moves the states to a device, and gives this object back."""
        self._before = {place: state.to(device) for place, state in self._before.items()}
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """The states that the next row reads, by ``LAYER.SLOT``; empty before the first row."""
        return {f"{layer}.{SLOTS[slot]}": state for (layer, slot), state in self._before.items()}

    def load_state_dict(self, states: Mapping[str, Tensor]) -> None:
        """Takes over what `state_dict` gave.

        Raises:
            CheckpointError: The states are not those of this model.
        """
        expected = {f"{layer}.{SLOTS[slot]}": (layer, slot) for layer, slot in self._shapes}
        if states and states.keys() != expected.keys():
            raise CheckpointError(
                f"carried states ({', '.join(sorted(states))}) are of another model: this one's "
                f"are {', '.join(sorted(expected)) or 'none'}"
            )
        for name, state in states.items():
            shape = self._shapes[expected[name]]
            if state.shape[1:] != shape:
                raise CheckpointError(
                    f"the carried state {name} {tuple(state.shape)} is of another model: this "
                    f"one's has the shape {('rows', *shape)}"
                )
        self._before = {expected[name]: state.detach() for name, state in states.items()}
        self._after = {}


@dataclass(frozen=True)
class CarriedRow:
    """The carried states of one forward pass."""

    before: _States
    after: _States


def _state_shapes(config: I3Config) -> dict[tuple[int, int], tuple[int, ...]]:
    """The shape, without rows, of every state of a model, by layer and slot."""
    C = config.hidden_size
    shapes: dict[tuple[int, int], tuple[int, ...]] = {}
    for layer, kind in enumerate(config.layer_types or ()):
        if kind not in ("linear_attention", "hybrid"):
            continue
        if config.recurrence == "state_space":
            shapes[layer, RECURRENCE] = (C + config.state_size,)
        else:
            shapes[layer, RECURRENCE] = (3, C)
            shapes[layer, MIXER_SHIFT] = shapes[layer, FEED_FORWARD_SHIFT] = (C,)
    return shapes


def read_state(states: Cache | CarriedRow | None, layer_idx: int, slot: int) -> Tensor | None:
    """The state in a layer's slot, or None before the first token."""
    if states is None:
        return None
    if isinstance(states, CarriedRow):
        return states.before.get((layer_idx, slot))
    layer = states.layers[layer_idx]
    return layer.recurrent_states[slot] if layer.has_previous_state[slot] else None


def write_state(
    states: Cache | CarriedRow | None, layer_idx: int, slot: int, state: Tensor
) -> None:
    """Keeps a state in a layer's slot, in the state's own dtype."""
    if isinstance(states, CarriedRow):
        # A copy: a state may be a view that would keep the vectors of a whole row.
        states.after[layer_idx, slot] = state.detach().clone()
    elif states is not None:
        states.update_recurrent_state(state, layer_idx, state_idx=slot)
        states.layers[layer_idx].has_previous_state[slot] = True
