"""i3lm: train, evaluate and use the i3 family of hybrid language models.

``import i3lm.models.i3``, or any name below that needs it, registers the ``i3`` architecture with
transformers' Auto classes. ``import i3lm`` alone loads nothing heavy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> module that defines it, loaded on first use so that importing stays cheap.
_PUBLIC = {
    "I3Config": "i3lm.models.i3",
    "I3ForCausalLM": "i3lm.models.i3",
    "I3Model": "i3lm.models.i3",
    "SamplingOptions": "i3lm.inference",
    "Session": "i3lm.inference.sessions",
    "TextGenerator": "i3lm.inference",
    "count_parameters": "i3lm.planning",
    "evaluate_text": "i3lm.evaluation",
    "list_presets": "i3lm.presets",
    "load_checkpoint": "i3lm.inference.loading",
    "load_preset": "i3lm.presets",
    "load_tokenizer": "i3lm.tokenizers",
    "state_space": "i3lm.ops",
    "train_tokenizer": "i3lm.tokenizers",
    "wkv": "i3lm.ops",
}

__all__ = sorted(_PUBLIC)

if TYPE_CHECKING:
    from i3lm.evaluation import evaluate_text
    from i3lm.inference import SamplingOptions, TextGenerator
    from i3lm.inference.loading import load_checkpoint
    from i3lm.inference.sessions import Session
    from i3lm.models.i3 import I3Config, I3ForCausalLM, I3Model
    from i3lm.ops.state_space import state_space
    from i3lm.ops.wkv import wkv
    from i3lm.planning import count_parameters
    from i3lm.presets import list_presets, load_preset
    from i3lm.tokenizers import load_tokenizer, train_tokenizer


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'i3lm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
