"""Reading a model and its tokenizer back, and saying what is wrong when that fails."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

import i3lm.models.i3  # noqa: F401 (registers the architecture)
from i3lm.errors import CheckpointError, TokenizerError
from i3lm.inference.quantization import check_can_load, is_quantized
from i3lm.tokenizers import load_tokenizer, tokenizer_fingerprint

WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")


def find_checkpoint(path: str | Path) -> Path:
    """Gives the model folder for a path: itself, or the best (else the last) of a run folder.

    Raises:
        CheckpointError: No model is there.
    """
    folder = Path(path)
    if not folder.exists():
        raise CheckpointError(
            f"{path}: no such folder; give a checkpoint folder or the output folder of a run"
        )
    for candidate in (folder, folder / "best", folder / "last"):
        if (candidate / "config.json").is_file():
            return candidate
    raise CheckpointError(
        f"{path}: holds no model (no config.json); give a checkpoint folder or the output folder "
        "of a run; a checkpoint of open-i3 is read by `i3lm convert` first"
    )


def load_checkpoint(
    path: str | Path, device: torch.device | str = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Gives the model, in evaluation mode on the device, and its tokenizer.

    Raises:
        CheckpointError: The folder, configuration or weights are missing, damaged or incomplete.
        TokenizerError: The tokenizer is missing, damaged, or not the model's.
    """
    folder = find_checkpoint(path)
    model = load_model(folder).to(device).eval()
    if is_quantized(model.config):
        from i3lm.inference.int8_linear import use_int8_products

        use_int8_products(model)
    tokenizer = load_tokenizer(folder)
    check_tokenizer_fits(model, tokenizer, where=str(folder))
    return model, tokenizer


def load_model(folder: Path) -> PreTrainedModel:
    """Gives the model in a folder; every weight must be there and fit.

    Raises:
        CheckpointError: As for `load_checkpoint`.
    """
    if not any((folder / name).is_file() for name in WEIGHT_FILES):
        raise CheckpointError(f"{folder}: holds no weights ({WEIGHT_FILES[0]} is missing)")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # what a damaged file breaks is not always the parser
        raise CheckpointError(
            f"{folder / 'config.json'}: not a readable model configuration: {_first_line(error)}"
        ) from error
    check_can_load(config, folder)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, config=config, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # safetensors, torch and transformers each raise their own
        raise CheckpointError(
            f"{folder}: the weights cannot be read; the file is damaged, cut short, or of "
            f"another model: {_first_line(error)}"
        ) from error
    wrong = sorted(info["missing_keys"]) + sorted(info["unexpected_keys"])
    if wrong:
        raise CheckpointError(
            f"{folder}: the weights do not fit config.json: {len(wrong)} tensors are missing or "
            f"unknown, such as {wrong[0]}"
        )
    return model


def check_tokenizer_fits(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, where: str
) -> None:
    """Raises a TokenizerError unless the tokenizer is the model's."""
    size, limit = len(tokenizer), model.config.vocab_size
    if size > limit:
        raise TokenizerError(
            f"{where}: the tokenizer has {size:,} tokens, but the model's vocab_size is "
            f"{limit:,}; use the tokenizer that the model was trained with"
        )
    expected = getattr(model.config, "tokenizer_fingerprint", None)
    if expected is not None and tokenizer_fingerprint(tokenizer) != expected:
        raise TokenizerError(
            f"{where}: the tokenizer is not the one that the model was trained with (its "
            "fingerprint differs), so its ids mean other text; restore the original tokenizer"
        )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return " ".join(lines[0].split())[:300] if lines else type(error).__name__
