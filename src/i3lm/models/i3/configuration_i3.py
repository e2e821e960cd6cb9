"""The one configuration of all causal members of the i3 family."""

from __future__ import annotations

import math
import re
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

LAYER_TYPES = ("linear_attention", "full_attention", "hybrid")
RECURRENCES = ("rwkv4", "state_space")
INITIALIZATIONS = ("original", "rwkv")

_REPEATED = re.compile(r"(?:(\d+)\s*x\s*)?([a-z_]+)")


def expand_layer_pattern(pattern: str) -> list[str]:
    """Gives the list of layer types that a pattern names, bottom layer first.

    Example:
        >>> expand_layer_pattern("2 x linear_attention, full_attention")
        ['linear_attention', 'linear_attention', 'full_attention']

    Raises:
        ValueError: A part is not ``TYPE`` or ``N x TYPE`` with a known type.
    """
    layers: list[str] = []
    for part in pattern.split(","):
        match = _REPEATED.fullmatch(part.strip())
        if match is None or match[2] not in LAYER_TYPES or match[1] == "0":
            raise ValueError(
                f"layer_types: {part.strip()!r} is not of the form 'N x TYPE' with TYPE one of "
                f"{', '.join(LAYER_TYPES)}"
            )
        layers += [match[2]] * int(match[1] or 1)
    return layers


@strict
class I3Config(PreTrainedConfig):
    """Describes an i3 model: a stack of recurrent, attention and combined layers.

    Args:
        vocab_size: Number V of token ids.
        hidden_size: Width C of the residual stream.
        intermediate_size: Width F of the feed-forward networks; 4 C when None.
        layer_types: The layers, bottom first, as a list or as a pattern such as
            ``"10 x linear_attention, 6 x full_attention"``. ``linear_attention`` is a recurrent
            layer, ``full_attention`` an attention layer, ``hybrid`` a recurrent mixer followed
            by attention inside one layer (the v1 members).
        num_hidden_layers: Number of layers; follows from `layer_types`.
        recurrence: The mixer of recurrent and hybrid layers: ``rwkv4`` (time mix, with channel
            mix as feed-forward) or ``state_space`` (the hybrid mixer of i3-80m, with a GELU
            network as feed-forward).
        state_size: Size N of the hidden state of the ``state_space`` mixer.
        num_attention_heads: Heads H of attention; must divide C.
        low_rank: If given, attention's query, key and value maps, the feed-forward networks and
            the output head have this rank (the v1 members).
        max_position_embeddings: Context length: number of learned absolute positions.
        layer_norm_eps: Epsilon of every LayerNorm.
        initialization: How new weights are drawn: ``original`` (as the released code) or
            ``rwkv`` (RWKV-4's graded decays, bonuses and token shifts, and zero projections).
        initializer_range: Standard deviation of normally drawn matrices and embeddings.
        tie_word_embeddings: Whether the head shares the embedding matrix.
        use_cache: Whether a forward pass returns the states that continue it.
        pad_token_id, bos_token_id, eos_token_id: Special token ids, or None.

    Raises:
        ValueError: A value outside its rule, with the value, the rule and the way out.
    """

    model_type = "i3"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (transformers' convention)

    vocab_size: int = 32_000
    hidden_size: int = 512
    intermediate_size: int | None = None
    layer_types: list[str] | str | None = None
    num_hidden_layers: int | None = None
    recurrence: str = "rwkv4"
    state_size: int = 32
    num_attention_heads: int = 8
    low_rank: int | None = None
    max_position_embeddings: int = 256
    layer_norm_eps: float = 1e-5
    initialization: str = "rwkv"
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    # Slots for recurrent states in each layer of transformers' cache: the recurrence itself, and
    # the two token shifts of an RWKV layer.
    number_of_conv_states: int = 3

    def __post_init__(self, **kwargs: Any) -> None:
        if self.layer_types is None:
            self.layer_types = "6 x linear_attention, 2 x full_attention"
        if isinstance(self.layer_types, str):
            self.layer_types = expand_layer_pattern(self.layer_types)
        if self.num_hidden_layers is None:
            self.num_hidden_layers = len(self.layer_types)
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        super().__post_init__(**kwargs)
        self._check()

    def _check(self) -> None:
        for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "state_size",
            "num_attention_heads", "max_position_embeddings",
        ):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} ({value!r}) must be a whole number of at least 1")
        for name in ("layer_norm_eps", "initializer_range"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"{name} ({value!r}) must be a number above 0")
        if self.low_rank is not None and self.low_rank < 1:
            raise ValueError(f"low_rank ({self.low_rank}) must be at least 1, or null for none")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must divide "
                f"hidden_size ({self.hidden_size})"
            )
        if len(self.layer_types or ()) != self.num_hidden_layers:
            raise ValueError(
                f"num_hidden_layers ({self.num_hidden_layers}) must equal the number of "
                f"layer_types ({len(self.layer_types or ())}); leave it out and it follows"
            )
        for name, value, allowed in (
            ("recurrence", self.recurrence, RECURRENCES),
            ("initialization", self.initialization, INITIALIZATIONS),
            *(("layer_types", layer_type, LAYER_TYPES) for layer_type in self.layer_types or ()),
        ):
            if value not in allowed:
                raise ValueError(f"{name} ({value!r}) must be one of {', '.join(allowed)}")
        if self.low_rank is not None and self.tie_word_embeddings:
            raise ValueError(
                "tie_word_embeddings needs a full-rank head: set low_rank to null or untie"
            )
