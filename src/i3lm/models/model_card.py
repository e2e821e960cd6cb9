"""The README that travels with every set of weights we write."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedConfig

ORIGINAL = "https://github.com/FlameF0X/open-i3"


def write_model_card(
    folder: Path, config: PreTrainedConfig, parameters: int, facts: dict[str, str]
) -> None:
    """Writes ``README.md`` into a model folder.

    Args:
        folder: The folder of the weights.
        config: The model's configuration.
        parameters: Its number of parameters.
        facts: What else is known, as label and text, such as the held-out bits per byte.
    """
    rows = {"Parameters": f"{parameters:,}", **_shape(config), **facts}
    table = "\n".join(f"| {label} | {text} |" for label, text in rows.items())
    if config.model_type != "i3":
        name = f"A {config.model_type} model"
        origin = "These weights were written by i3lm, as a peer to compare i3 models with."
    else:
        name = "A model of the i3 family"
        origin = (
            f"The i3 architecture is by FlameF0X and i3-lab: **[open-i3]({ORIGINAL})**.\n"
            "These weights were written by i3lm, an independent implementation."
        )
    text = f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [{config.model_type}, i3lm]
---

# {name}

{origin}

| | |
| --- | --- |
{table}

```python
import i3lm.models.i3  # registers the architecture
from transformers import pipeline

print(pipeline("text-generation", model="PATH_OF_THIS_FOLDER")("Once upon a time"))
```

open-i3 is licensed under Apache-2.0; its NOTICE asks that derived works and weights link to the
[original repository]({ORIGINAL}).
"""
    (folder / "README.md").write_text(text, encoding="utf-8")


def _shape(config: PreTrainedConfig) -> dict[str, str]:
    shape = {"Layers": str(config.num_hidden_layers), "Width": str(config.hidden_size)}
    if (context := getattr(config, "max_position_embeddings", None)) is not None:
        shape["Context"] = f"{context:,} tokens"
    shape["Vocabulary"] = f"{config.vocab_size:,}"
    if config.model_type == "i3":
        kinds = config.layer_types
        shape["Layers"] = ", ".join(f"{kinds.count(k)} {k}" for k in dict.fromkeys(kinds))
        shape["Recurrence"] = config.recurrence
    return shape
