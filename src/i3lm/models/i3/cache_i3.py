"""Where the states of recurrent layers live between calls: transformers' own cache."""

from __future__ import annotations

from torch import Tensor
from transformers import Cache, DynamicCache

from i3lm.models.i3.configuration_i3 import I3Config

# Slots of a recurrent layer in the cache.
RECURRENCE, MIXER_SHIFT, FEED_FORWARD_SHIFT = range(3)


class I3Cache(DynamicCache):
    """transformers' `DynamicCache` that also knows its length when no layer is attention.

    The stock cache asks an attention layer how many tokens it has seen; a stack of recurrent
    layers alone has none.
    """

    def __init__(self, config: I3Config, **kwargs) -> None:
        super().__init__(config=config, **kwargs)
        self._has_attention = any(kind != "linear_attention" for kind in config.layer_types or ())
        self._seen_tokens = 0

    def count_tokens(self, count: int) -> None:
        """Notes that `count` more tokens have passed through the model."""
        self._seen_tokens += count

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The number of tokens seen so far."""
        return super().get_seq_length(layer_idx) if self._has_attention else self._seen_tokens

    @property
    def is_compileable(self) -> bool:
        """False: states are replaced as they grow, and `generate` must pass plain masks."""
        return False

    def reset(self) -> None:
        """Forgets everything."""
        super().reset()
        self._seen_tokens = 0


def read_state(cache: Cache | None, layer_idx: int, slot: int) -> Tensor | None:
    """The state in a layer's slot, or None before the first token."""
    if cache is None:
        return None
    layer = cache.layers[layer_idx]
    return layer.recurrent_states[slot] if layer.has_previous_state[slot] else None


def write_state(cache: Cache | None, layer_idx: int, slot: int, state: Tensor) -> None:
    """Keeps a state in a layer's slot, in the state's own dtype."""
    if cache is not None:
        cache.update_recurrent_state(state, layer_idx, state_idx=slot)
        cache.layers[layer_idx].has_previous_state[slot] = True
