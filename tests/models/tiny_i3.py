"""Tiny i3 models of every kind, with random weights so that every term matters."""

from __future__ import annotations

from typing import Any

import torch

from i3lm.models.i3 import I3Config, I3ForCausalLM

KINDS: dict[str, dict[str, Any]] = {
    "rwkv4": {"layer_types": "2 x linear_attention, full_attention", "recurrence": "rwkv4"},
    "state_space": {
        "layer_types": "2 x linear_attention, full_attention",
        "recurrence": "state_space",
    },
    "v1": {"layer_types": "2 x hybrid", "recurrence": "state_space", "low_rank": 3},
    "hybrid rwkv4": {"layer_types": "2 x hybrid", "recurrence": "rwkv4"},
    "attention below": {
        "layer_types": "full_attention, 2 x linear_attention",
        "recurrence": "rwkv4",
    },
    "all rwkv4": {"layer_types": "3 x linear_attention", "recurrence": "rwkv4"},
    "all state_space": {"layer_types": "3 x linear_attention", "recurrence": "state_space"},
    "all attention": {"layer_types": "2 x full_attention"},
    "sliding": {
        "layer_types": "linear_attention, sliding_attention, full_attention",
        "sliding_window": 5,
    },
    "rope": {
        "layer_types": "linear_attention, full_attention, hybrid",
        "position_embedding_type": "rope",
    },
    "sliding rope": {
        "layer_types": "linear_attention, 2 x sliding_attention",
        "sliding_window": 5,
        "position_embedding_type": "rope",
    },
    "sliding none": {
        "layer_types": "2 x linear_attention, sliding_attention",
        "recurrence": "state_space",
        "sliding_window": 5,
        "position_embedding_type": "none",
    },
    "all rwkv4 none": {
        "layer_types": "2 x linear_attention",
        "position_embedding_type": "none",
    },
}
# Whose learned positions end.
LIMITED = [kind for kind in KINDS if "position_embedding_type" not in KINDS[kind]]
UNLIMITED = [kind for kind in KINDS if kind not in LIMITED]


def make_config(kind: str, **changes: Any) -> I3Config:
    """The configuration of a tiny model: V 37, C 12, a context of 24."""
    sizes = {
        "vocab_size": 37,
        "hidden_size": 12,
        "state_size": 5,
        "num_attention_heads": 3,
        "max_position_embeddings": 24,
    }
    return I3Config(**{**sizes, **KINDS[kind], **changes})


def make_model(kind: str, seed: int = 0, **changes: Any) -> I3ForCausalLM:
    """A tiny model in evaluation mode, its weights moved away from their initial values."""
    torch.manual_seed(seed)
    model = I3ForCausalLM(make_config(kind, **changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Transition matrices of this size neither explode nor vanish over a context.
            std = 0.1 if name.endswith("mixer.A") else 0.3
            parameter.add_(std * torch.randn_like(parameter))
    return model.eval()


def draw_ids(B: int, T: int, *, seed: int = 1, vocab_size: int = 37) -> torch.Tensor:
    """Random token ids, (B, T)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab_size, (B, T), generator=generator)
