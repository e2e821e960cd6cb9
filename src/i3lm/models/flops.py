"""Floating-point operations of a training step."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig


def count_matmul_parameters(config: PreTrainedConfig) -> int:
    """The parameters that multiply every token's vector: all matrices but the embeddings."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    head = getattr(model.get_output_embeddings(), "weight", None)
    return sum(
        p.numel()
        for p in model.parameters()
        if p.dim() >= 2 and (id(p) not in embeddings or p is head)
    )


def training_flops_per_token(config: PreTrainedConfig, context_length: int) -> float:
    """Operations to train on one token: ``6 N + 12 C`` per key that its attention layers see.

    N are the matmul parameters (2 operations forwards, 4 backwards each). A token sees
    ``T / 2`` keys on average in a layer of causal attention over T tokens, and
    ``W - W^2 / (2 T)`` in one with a sliding window of W < T. The recurrences themselves are
    left out: less than a hundredth at these widths.

    Args:
        config: The model's configuration.
        context_length: Tokens T per row.
    """
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    keys = 0.0
    for kind in kinds:
        if kind == "sliding_attention":
            window = min(config.sliding_window, context_length)
            keys += window - window**2 / (2 * context_length)
        elif kind != "linear_attention":
            keys += context_length / 2
    return 6.0 * count_matmul_parameters(config) + 12 * config.hidden_size * keys
