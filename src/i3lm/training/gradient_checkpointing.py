"""Which layers are computed a second time for their gradients, to save memory."""

from __future__ import annotations

from transformers import PreTrainedModel

from i3lm.errors import ConfigurationError
from i3lm.models.i3.modeling_i3 import I3DecoderLayer

_KINDS = {
    "attention": ("full_attention", "sliding_attention", "hybrid"),
    "recurrent": ("linear_attention", "hybrid"),
}


def checkpoint_gradients(model: PreTrainedModel, which: bool | str) -> None:
    """Makes layers keep only their input in the forward pass.

    Args:
        model: The model.
        which: False for none, True for all, ``attention`` or ``recurrent`` for those of a kind
            (a hybrid layer is of both).

    Raises:
        ConfigurationError: The model cannot, or has no layer of that kind.
    """
    if not which:
        return
    if not model.supports_gradient_checkpointing:
        raise ConfigurationError(
            f"training.gradient_checkpointing: a model of type {model.config.model_type} does not "
            "support it; leave it out"
        )
    model.activation_checkpointing_enable()
    if isinstance(which, bool):
        return
    layers = [module for module in model.modules() if isinstance(module, I3DecoderLayer)]
    for layer in layers:
        layer.gradient_checkpointing = layer.layer_type in _KINDS[which]
    if not any(layer.gradient_checkpointing for layer in layers):
        raise ConfigurationError(
            f"training.gradient_checkpointing ({which}): the model has no {which} layers of ours; "
            "use true or false"
        )
