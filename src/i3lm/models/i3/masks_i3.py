"""What each token of a batch may see, and which of its tokens are padding."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Cache
from transformers.masking_utils import (
    create_causal_mask,
    create_sliding_window_causal_mask,
    packed_sequence_mask_function,
)

from i3lm.models.i3.configuration_i3 import I3Config


def causal_masks(
    config: I3Config,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    cache: Cache | None,
    starts: Tensor | None = None,
) -> dict[str, Tensor | None]:
    """What each token may see, (B, 1, T, S), by type of attention; None is the causal rule alone.

    The rule alone holds for T > 1 tokens where the cache is empty, even if it has room for more.

    Args:
        config: The model's configuration.
        inputs_embeds: The inputs of the layers, shape (B, T, C); only their form counts.
        attention_mask: 1 at real tokens and 0 at padding, shape (B, S), or None.
        cache: States and keys of earlier tokens, or None.
        starts: Where the document of each token begins, shape (B, T), or None.
    """
    holds_room = cache is not None and cache.is_compileable  # keys of tokens yet to come
    if attention_mask is None and inputs_embeds.shape[1] == 1 and not holds_room:
        return {}  # one token sees all that the cache holds
    kinds = set(config.layer_types or ()) - {"linear_attention"}
    arguments = {
        "config": config,
        "inputs_embeds": inputs_embeds,
        "attention_mask": attention_mask,
        "cache": cache,
        "position_ids": None,
        "and_mask_function": None if starts is None else packed_sequence_mask_function(starts),
    }
    masks: dict[str, Tensor | None] = {}
    if "sliding_attention" in kinds:
        masks["sliding_attention"] = create_sliding_window_causal_mask(**arguments)
    if kinds - {"sliding_attention"}:
        masks["full_attention"] = create_causal_mask(**arguments)
    return masks


def mask_of_layer(masks: dict[str, Tensor | None], layer_type: str) -> Tensor | None:
    """The one of `causal_masks` for a type of layer."""
    return masks.get("full_attention" if layer_type == "hybrid" else layer_type)


def padding_mask(attention_mask: Tensor | None, T: int) -> Tensor | None:
    """True at real tokens among the last T, bool, (B, T); None where nothing is padded."""
    if attention_mask is None or attention_mask.dim() != 2:
        return None
    mask = attention_mask[:, -T:].bool()
    return None if not torch.compiler.is_compiling() and bool(mask.all()) else mask
