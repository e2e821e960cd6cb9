"""Low-rank adapters on disk, in peft's own format: written, read back, and merged into the base."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any, NamedTuple, cast

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from i3lm.errors import CheckpointError, ConfigurationError
from i3lm.inference.sessions import model_fingerprint

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
INSTALL = "pip install 'i3lm[finetune]' (or: pip install peft)"
_PREFIX = "base_model.model."  # of the names in peft's files
_FACTOR = re.compile(r"\.lora_[AB](\.default)?\.weight$")
_FINGERPRINT = "base_fingerprint"


class Base(NamedTuple):
    """The checkpoint that an adapter was trained on."""

    path: Path
    fingerprint: str | None  # None for an adapter that i3lm did not write


def require_peft() -> None:
    """Raises a ConfigurationError where peft is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise ConfigurationError(f"adapters need peft, which is not installed: {INSTALL}")


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, and not a whole model."""
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


def write_adapter(folder: Path, model: PreTrainedModel, base: Base) -> None:
    """Writes the adapter that a model carries: what was trained, and on which base.

    Args:
        folder: An existing folder.
        model: A model with an adapter injected; parameters of the base that were trained along
            are written too, under their own names.
        base: What it was trained on.
    """
    from peft import get_peft_model_state_dict

    tensors = dict(get_peft_model_state_dict(model, save_embedding_layers=False))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not _is_adapters_own(name):
            tensors[_plain(name)] = parameter
    tensors = {_PREFIX + name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    metadata = {"format": "pt", _FINGERPRINT: base.fingerprint or ""}
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata=metadata)
    config = cast(Any, model).peft_config["default"]
    config.base_model_name_or_path = str(base.path)
    config.save_pretrained(folder)


def read_base(folder: Path) -> Base:
    """Tells which checkpoint the adapter in a folder belongs to.

    Raises:
        CheckpointError: The adapter is damaged, or does not tell.
    """
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        path = config["base_model_name_or_path"]
        with safe_open(folder / ADAPTER_WEIGHTS, "pt") as file:
            fingerprint = (file.metadata() or {}).get(_FINGERPRINT)
    except Exception as error:  # JSON, safetensors and the file system each raise their own
        raise CheckpointError(
            f"{folder}: the adapter cannot be read; it is damaged or incomplete: {_short(error)}"
        ) from error
    if not path:
        raise CheckpointError(
            f"{folder}: does not tell its base: name it in base_model_name_or_path of "
            f"{ADAPTER_CONFIG}, or merge with i3lm merge --base PATH"
        )
    return Base(Path(path), fingerprint)


def check_base(base: PreTrainedModel, expected: Base, folder: Path, where: Path) -> None:
    """Raises a CheckpointError unless a model is the one that an adapter was trained on."""
    if expected.fingerprint and model_fingerprint(base) != expected.fingerprint:
        raise CheckpointError(
            f"{folder}: was trained on another base than {where} (the weights differ): restore "
            "that base, or name it: i3lm merge --base PATH"
        )


def merge_adapter(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Gives the base with an adapter's changes in its own weights; the base is changed.

    Raises:
        ConfigurationError: peft is not installed.
        CheckpointError: The adapter is damaged, or does not fit the model.
    """
    require_peft()
    from peft import LoraConfig, LoraModel, set_peft_model_state_dict

    try:
        tensors = _read_tensors(folder)
        own = {name: t for name, t in tensors.items() if _is_adapters_own(name)}
        trained = {_plain(name): t for name, t in tensors.items() if name not in own}
        unknown = base.load_state_dict(trained, strict=False).unexpected_keys
        adapted: Any = LoraModel(base, LoraConfig.from_pretrained(str(folder)), "default")
        result: Any = set_peft_model_state_dict(base, own)
        missing = [name for name in result.missing_keys if _is_adapters_own(name)]
        if wrong := [*missing, *result.unexpected_keys, *unknown]:
            raise ValueError(f"{len(wrong)} tensors are missing or unknown, such as {wrong[0]}")
        merged = adapted.merge_and_unload(safe_merge=True)
    except Exception as error:  # peft, torch and safetensors each raise their own
        raise CheckpointError(
            f"{folder}: the adapter does not fit its base, or is damaged: {_short(error)}"
        ) from error
    return merged


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    with safe_open(folder / ADAPTER_WEIGHTS, "pt") as file:
        names = file.keys()  # what `safe_open` gives is no mapping: it has keys alone
        return {name.removeprefix(_PREFIX): file.get_tensor(name) for name in names}


def _is_adapters_own(name: str) -> bool:
    """Whether a name is that of a factor that peft added: a low-rank map has a lora_A, too."""
    return _FACTOR.search(name) is not None


def _plain(name: str) -> str:
    """The name of a parameter in the model without its adapter."""
    return name.replace(".base_layer", "")


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
