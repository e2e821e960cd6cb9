"""The one configuration of all causal members of the i3 family."""

from __future__ import annotations

import math
import re
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

LAYER_TYPES = ("linear_attention", "full_attention", "sliding_attention", "hybrid")
RECURRENCES = ("rwkv4", "state_space")
INITIALIZATIONS = ("original", "rwkv")
POSITION_EMBEDDING_TYPES = ("learned", "rope", "none")

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
            layer, ``full_attention`` an attention layer, ``sliding_attention`` one that sees the
            last `sliding_window` tokens only, ``hybrid`` a recurrent mixer followed by full
            attention inside one layer (the v1 members).
        num_hidden_layers: Number of layers; follows from `layer_types`.
        recurrence: The mixer of recurrent and hybrid layers: ``rwkv4`` (time mix, with channel
            mix as feed-forward) or ``state_space`` (the hybrid mixer of i3-80m, with a GELU
            network as feed-forward).
        state_size: Size N of the hidden state of the ``state_space`` mixer.
        num_attention_heads: Heads H of attention; must divide C.
        low_rank: If given, attention's query, key and value maps, the feed-forward networks and
            the output head have this rank (the v1 members).
        max_position_embeddings: Context length T that the model is made for: the number of
            learned positions, and the longest row it is trained on.
        position_embedding_type: How a token's place is told: ``learned`` (an embedding of the
            absolute position, as in all published members), ``rope`` (rotary, in attention
            only), or ``none`` (what the recurrent layers know must do). Only learned positions
            end: the others go on past `max_position_embeddings`.
        rope_parameters: The base ``rope_theta`` of rotary positions, 10,000 by default, in the
            form that transformers uses, with ``rope_type`` ``default``; None unless ``rope``.
        sliding_window: Number of tokens, itself included, that a token sees in a
            ``sliding_attention`` layer, at least 2; its cache holds no more.
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
    keys_to_ignore_at_inference = ["cache"]  # noqa: RUF012 (transformers' convention)

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
    position_embedding_type: str = "learned"
    rope_parameters: dict[str, Any] | None = None
    sliding_window: int | None = None
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
        rope_given = bool(self.rope_parameters)
        super().__post_init__(**kwargs)
        if self.position_embedding_type != "rope":
            if rope_given:
                raise ValueError(
                    f"rope_parameters are of no use with position_embedding_type "
                    f"({self.position_embedding_type!r}): set that to rope, or leave them out"
                )
            self.rope_parameters = None  # transformers fills in its defaults for every model
        self._check()

    @property
    def position_limit(self) -> int | None:
        """The most tokens that have a position, or None where positions do not end."""
        return self.max_position_embeddings if self.position_embedding_type == "learned" else None

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
            ("position_embedding_type", self.position_embedding_type, POSITION_EMBEDDING_TYPES),
            *(("layer_types", layer_type, LAYER_TYPES) for layer_type in self.layer_types or ()),
        ):
            if value not in allowed:
                raise ValueError(f"{name} ({value!r}) must be one of {', '.join(allowed)}")
        if self.low_rank is not None and self.tie_word_embeddings:
            raise ValueError(
                "tie_word_embeddings needs a full-rank head: set low_rank to null or untie"
            )
        self._check_sliding_window()
        if self.position_embedding_type == "rope":
            self._check_rope()

    def _check_sliding_window(self) -> None:
        slides = "sliding_attention" in (self.layer_types or ())
        if slides and self.sliding_window is None:
            raise ValueError("sliding_attention layers need sliding_window: say how many tokens")
        if self.sliding_window is None:
            return
        if not slides:
            raise ValueError(
                f"sliding_window ({self.sliding_window}) is of no use: no layer of layer_types "
                "is sliding_attention"
            )
        # A token that sees itself alone attends to nothing; transformers' cache of such a layer
        # would keep everything.
        if self.sliding_window < 2:
            raise ValueError(f"sliding_window ({self.sliding_window}) must be at least 2")

    def _check_rope(self) -> None:
        if all(kind == "linear_attention" for kind in self.layer_types or ()):
            raise ValueError(
                "position_embedding_type 'rope' needs an attention layer, and layer_types has "
                "none: take 'none'"
            )
        if self.hidden_size // self.num_attention_heads % 2:
            raise ValueError(
                f"position_embedding_type 'rope' needs an even size per head: hidden_size "
                f"({self.hidden_size}) / num_attention_heads ({self.num_attention_heads}) is "
                f"{self.hidden_size // self.num_attention_heads}"
            )
        rope = self.rope_parameters or {}
        if rope.keys() != {"rope_theta", "rope_type"} or rope["rope_type"] != "default":
            raise ValueError(f"rope_parameters ({rope}) may set rope_theta only")
        theta = rope["rope_theta"]
        if not isinstance(theta, int | float) or theta <= 1:
            raise ValueError(f"rope_theta ({theta!r}) must be a number above 1")
