"""Where the states of recurrent layers live between calls.

In generation that is transformers' own cache; in training on streams, a `CarriedState`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from i3lm.errors import CheckpointError
from i3lm.models.i3.configuration_i3 import I3Config

# Slots of a recurrent layer in the cache.
RECURRENCE, MIXER_SHIFT, FEED_FORWARD_SHIFT = range(3)
SLOTS = ("recurrence", "mixer_shift", "feed_forward_shift")

# By layer and slot.
_States = dict[tuple[int, int], Tensor]


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
