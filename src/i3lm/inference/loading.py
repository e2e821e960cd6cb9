"""Reading a model and its tokenizer back, and saying what is wrong when that fails."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from i3lm.device import empty_in_large_pages
from i3lm.errors import CheckpointError, ConfigurationError, GenerationError, TokenizerError
from i3lm.inference.adapters import (
    ADAPTER_CONFIG,
    check_base,
    is_adapter,
    merge_adapter,
    read_base,
)
from i3lm.inference.generation import TextGenerator
from i3lm.inference.quantization import check_can_load, is_quantized
from i3lm.layers import Linear, LowRankLinear
from i3lm.models.i3 import I3ForCausalLM  # importing it registers the architecture
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
        if (candidate / "config.json").is_file() or (candidate / ADAPTER_CONFIG).is_file():
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


def make_generator(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, precision: str
) -> TextGenerator:
    """Gives what writes text with a model that is for nothing else from here on.

    Args:
        model: The model; on a CPU `hold_weights_together` moves its weights, and in bf16
            `hold_weights_in_bf16` changes them.
        tokenizer: Its tokenizer.
        precision: ``fp32``, ``bf16`` or ``fp16``.
    """
    if model.device.type != "cpu" or not isinstance(model, I3ForCausalLM):
        return TextGenerator(model, tokenizer, precision)
    if precision == "bf16":
        model, precision = hold_weights_in_bf16(model), "fp32"
    return TextGenerator(hold_weights_together(model), tokenizer, precision)


def load_model(folder: Path) -> PreTrainedModel:
    """Gives the model in a folder; every weight must be there and fit.

    Of an adapter, that is its base with the adapter merged into it.

    Raises:
        CheckpointError: As for `load_checkpoint`.
    """
    if is_adapter(folder):
        return load_adapted(folder)
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


def load_adapted(folder: Path, base: Path | None = None) -> PreTrainedModel:
    """Gives the base of an adapter with the adapter merged into its weights.

    Args:
        folder: The folder of the adapter.
        base: Where its base is, if not where it was.

    Raises:
        CheckpointError: The base is not there, or is another; or as for `load_model`.
    """
    expected = read_base(folder)
    where = base or expected.path
    if base is None and not where.exists():
        raise CheckpointError(
            f"{folder}: is an adapter of {where}, which is not there: put that checkpoint back, or "
            "merge the adapter with it: i3lm merge --base PATH"
        )
    where = find_checkpoint(where)
    model = load_model(where)
    check_base(model, expected, folder, where)
    return merge_adapter(model, folder)


def hold_weights_in_bf16(model: PreTrainedModel) -> PreTrainedModel:
    """Rounds the matrices of an i3 model's linear maps to bfloat16, in place, to be read faster.

    States, norms, embeddings, sums and, in a step of decoding, activations stay float32, so this
    is more exact than bf16 autocast; and on a CPU, where such a step is bound by reading weights,
    it is faster. For inference: the model's own weights are gone afterwards. Other models stay as
    they are.
    """
    shared = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for module in model.modules():
        names: tuple[str, ...] = ()
        if isinstance(module, Linear):
            names = ("weight",)
        elif isinstance(module, LowRankLinear):
            names = ("lora_A", "lora_B")
        for name in names:
            weight = getattr(module, name)
            if weight.dtype == torch.float32 and id(weight) not in shared:
                setattr(module, name, nn.Parameter(weight.detach().bfloat16(), False))
    return model


def hold_weights_together(model: PreTrainedModel) -> PreTrainedModel:
    """Moves a model's weights on a CPU into one block of large pages, to be read faster.

    A token of decoding reads each of them once, and does little else. They stay the parameters
    that they are; those that are not plain tensors, as quantised ones, stay where they are.
    """
    line = 64  # bytes: kernels read whole lines of the cache
    weights = [
        p
        for p in model.parameters()
        if type(p) is nn.Parameter and p.device.type == "cpu" and p.is_contiguous()
    ]
    ends = list(accumulate((-(-p.nbytes // line) * line for p in weights), initial=0))
    block = empty_in_large_pages(ends[-1])
    for parameter, start in zip(weights, ends, strict=False):
        place = block[start : start + parameter.nbytes]
        place = place.view(parameter.dtype).view(parameter.shape)
        parameter.data = place.copy_(parameter.detach())
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


def choose_context_length(model: PreTrainedModel, length: int | None, *, option: str) -> int:
    """Gives the number of tokens per row: the asked one, by default all that the model takes.

    Args:
        model: The model; not every one sets a limit.
        length: What was asked for.
        option: The name of that option, for messages.

    Raises:
        ConfigurationError: More than the model takes, or nothing asked of a model without limit.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    chosen = limit if length is None else length
    if chosen is None:
        raise ConfigurationError(
            f"a model of type {model.config.model_type} sets no context length: give {option}"
        )
    if limit is not None and not 1 <= chosen <= limit:
        raise ConfigurationError(
            f"{option} ({chosen}) must be between 1 and the model's max_position_embeddings "
            f"({limit})"
        )
    if chosen < 1:
        raise ConfigurationError(f"{option} ({chosen}) must be at least 1")
    return chosen


def check_room(model: PreTrainedModel, prompt_tokens: int, max_new_tokens: int) -> None:
    """Raises a GenerationError unless the model has positions for a prompt and what follows it.

    An i3 model always has: past its context, its window slides.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is None or isinstance(model, I3ForCausalLM):
        return
    room = limit - prompt_tokens + 1  # the last new token is never read
    if max_new_tokens > room:
        raise GenerationError(
            f"max_new_tokens ({max_new_tokens}) must be at most {room} after a prompt of "
            f"{prompt_tokens} tokens: this {model.config.model_type} model has {limit} positions"
        )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return " ".join(lines[0].split())[:300] if lines else type(error).__name__
