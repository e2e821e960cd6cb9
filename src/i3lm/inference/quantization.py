"""Checkpoints with int8 weights, made and read by torchao through transformers.

Only weights of linear maps become int8, one scale per output channel; states, activations,
embeddings, decays and the factors of low-rank maps stay as they are.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from i3lm.errors import CheckpointError, ConfigurationError

INSTALL = "pip install 'i3lm[quant]' (or: pip install torchao)"


def has_torchao() -> bool:
    """Whether torchao is installed."""
    return importlib.util.find_spec("torchao") is not None


def is_quantized(config: PreTrainedConfig) -> bool:
    """Whether a configuration is that of a quantised model."""
    return getattr(config, "quantization_config", None) is not None


def check_can_quantize(config: PreTrainedConfig, where: str | Path) -> None:
    """Raises what keeps a model from being quantised.

    Raises:
        CheckpointError: It is quantised already.
        ConfigurationError: torchao is missing.
    """
    if is_quantized(config):
        settings: Any = config.quantization_config
        method = settings["quant_method"] if isinstance(settings, dict) else settings.quant_method
        raise CheckpointError(
            f"{where}: is quantised already (by {getattr(method, 'value', method)}): quantise the "
            "checkpoint that it was made from"
        )
    if not has_torchao():
        raise ConfigurationError(f"quantising needs torchao, which is not installed: {INSTALL}")


def check_can_load(config: PreTrainedConfig, where: str | Path) -> None:
    """Raises a CheckpointError if a quantised model cannot be read for want of torchao."""
    if is_quantized(config) and not has_torchao():
        raise CheckpointError(
            f"{where}: is quantised, and reading it needs torchao, which is not installed: "
            f"{INSTALL}"
        )


def quantize_checkpoint(folder: Path) -> PreTrainedModel:
    """Gives the model in a folder with int8 weights, ready for `save_pretrained`.

    Raises:
        CheckpointError: It has no linear maps whose weights are its own.
    """
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import AutoConfig, TorchAoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    # A head that shares the embedding's matrix stays with it.
    spared = ["embed_tokens", "embed_positions"] + ["lm_head"] * bool(config.tie_word_embeddings)
    settings = TorchAoConfig(Int8WeightOnlyConfig(version=2), modules_to_not_convert=spared)
    model = AutoModelForCausalLM.from_pretrained(
        folder, config=config, quantization_config=settings, local_files_only=True
    ).eval()
    if quantized_parameters(model) == 0:
        raise CheckpointError(
            f"{folder}: a {config.model_type} model without linear maps that could be quantised"
        )
    return model


def quantized_parameters(model: nn.Module) -> int:
    """The number of parameters that are int8."""
    return sum(
        weight.numel()
        for weight in model.parameters()
        if getattr(getattr(weight, "qdata", None), "dtype", None) == torch.int8
    )
