"""Counting parameters without allocating them."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig


def count_parameters(config: PreTrainedConfig) -> int:
    """The exact number of parameters of the causal model that a configuration describes.

    The model is built on the meta device, so even a billion parameters take no memory.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())
