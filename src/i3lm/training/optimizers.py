"""Parameter groups that ship with the models."""

from __future__ import annotations

from typing import Any

from torch import nn

from i3lm.layers import HybridMixer, LowRankLinear


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Splits the trainable parameters into those that decay and those that do not.

    Decay pulls towards zero, which is only meaningful for matrices that map one space to
    another. Norms, biases, embeddings, token shifts, decay rates, bonuses and the state
    transition A (whose size sets how long it remembers) are left alone.
    """
    decayed: set[int] = set()
    for module in model.modules():
        if isinstance(module, LowRankLinear):
            decayed |= {id(module.lora_A), id(module.lora_B)}
        elif isinstance(module, HybridMixer):
            decayed |= {id(module.B), id(module.C)}
        elif not isinstance(module, nn.Embedding):
            # nn.Linear, and GPT-2's transposed form of it in transformers.
            weight = getattr(module, "weight", None)
            if isinstance(weight, nn.Parameter) and weight.dim() == 2:
                decayed.add(id(weight))
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decayed -= embeddings  # a tied head is an embedding
    trainable = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trainable if id(p) in decayed], "weight_decay": weight_decay},
        {"params": [p for p in trainable if id(p) not in decayed], "weight_decay": 0.0},
    ]
