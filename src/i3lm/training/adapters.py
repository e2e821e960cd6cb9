"""Low-rank adapters (LoRA, arXiv:2106.09685), put by peft on every kind of layer."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from i3lm.errors import ConfigurationError
from i3lm.inference.adapters import require_peft
from i3lm.layers import (
    CausalSelfAttention,
    ChannelMix,
    FeedForward,
    HybridMixer,
    LowRankLinear,
    TimeMix,
)
from i3lm.training.options import AdapterOptions

# Which layers a target stands for.
_LAYERS = {
    "attention": (CausalSelfAttention,),
    "recurrent": (TimeMix, HybridMixer),
    "feed_forward": (ChannelMix, FeedForward),
}


def add_adapter(model: PreTrainedModel, options: AdapterOptions) -> None:
    """Freezes a model and adds low-rank factors beside its matrices, in place.

    A linear map keeps its class and its product, and gets a path beside it. A matrix that is a
    parameter of its own layer (B and C of the hybrid mixer, both factors of a low-rank map) gets
    the product of two factors added whenever the layer runs. So a low-rank map stays one of the
    same rank, and every adapter can be merged into the weights that it stands beside.

    Checkpoints to resume from then hold the trained parameters alone.

    Args:
        model: A checkpoint; it remains an object of its class.
        options: Rank, scale and targets.

    Raises:
        ConfigurationError: peft is not installed, nothing is targeted, or dropout is asked of a
            matrix that is no linear map.
    """
    require_peft()
    from peft import LoraConfig, inject_adapter_in_model

    matrices = find_targets(model, options.targets)
    parameters = [name for name in matrices if matrices[name]]
    modules = [name for name in matrices if not matrices[name]]
    if options.dropout and parameters:
        raise ConfigurationError(
            f"adapter.dropout ({options.dropout:g}) must be 0 for {parameters[0]}, which is not "
            "the matrix of a linear layer: leave it out, or choose other adapter.targets"
        )
    config = LoraConfig(
        r=options.rank,
        lora_alpha=2 * options.rank if options.alpha is None else options.alpha,
        lora_dropout=options.dropout,
        target_modules=modules,
        target_parameters=parameters or None,
        # GPT-2's form of a linear layer keeps its matrix transposed.
        fan_in_fan_out=any(isinstance(model.get_submodule(name), Conv1D) for name in modules),
        task_type="CAUSAL_LM",
    )
    inject_adapter_in_model(config, model)
    if options.vectors:
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.requires_grad or parameter.dim() == 1)
    model._keys_to_ignore_on_save = [n for n, p in model.named_parameters() if not p.requires_grad]


def find_targets(model: PreTrainedModel, targets: str | list[str]) -> dict[str, bool]:
    """Gives the matrices that an adapter goes beside, by name, in the model's order.

    Args:
        model: A model without adapters.
        targets: ``all``, a key of `_LAYERS` for models of the i3 family, or names of modules and
            parameters, whole or their ends, as in ``["mixer.key", "mixer.value"]``.

    Returns:
        False for a linear layer, True for a parameter of a layer of another kind.

    Raises:
        ConfigurationError: A target stands for nothing in this model.
    """
    head = model.get_output_embeddings()
    everything = {
        name: is_parameter for name, is_parameter, module in _matrices(model) if module is not head
    }
    if targets == "all":
        return everything
    wanted = [targets] if isinstance(targets, str) else targets
    found: set[str] = set()
    for target in wanted:
        if target in _LAYERS:
            inside = [n for n, m in model.named_modules() if isinstance(m, _LAYERS[target])]
            hits = [n for n in everything if any(n.startswith(f"{i}.") for i in inside)]
        else:
            hits = [n for n in everything if n == target or n.endswith(f".{target}")]
        if not hits:
            ends = dict.fromkeys(".".join(n.split(".")[-2:]) for n in everything)
            raise ConfigurationError(
                f"adapter.targets: {target!r} is no matrix of this {model.config.model_type} "
                f"model: give all, {', '.join(_LAYERS)}, or ends of names such as "
                f"{', '.join(list(ends)[:6])}"
            )
        found |= set(hits)
    return {name: everything[name] for name in everything if name in found}


def _matrices(model: nn.Module) -> Iterator[tuple[str, bool, nn.Module]]:
    """Yields (name, whether it is a parameter, the module that it belongs to)."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            yield name, False, module
        elif isinstance(module, HybridMixer | LowRankLinear):
            for matrix in module.matrices:
                yield f"{name}.{matrix}", True, module
