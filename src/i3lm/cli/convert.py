"""``i3lm convert``"""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Models, tokenizers and tensors are Any below: jsonargparse runs `if TYPE_CHECKING` blocks to
# resolve annotations, and --help would wait seconds for torch.

# float32 through sixteen layers differs by a few 1e-6 between implementations; a wrong mapping or
# number of heads differs by far more.
TOLERANCE = 1e-4


def convert(
    source: str,
    out: str,
    num_attention_heads: int | None = None,
    tokenizer: str | None = None,
    reference_logits: str | None = None,
    overwrite: bool = False,
    json: bool = False,
) -> None:
    """Turns a checkpoint of open-i3 into one of ours, with its tokenizer.

    i3lm convert i3-model-artifacts models/i3-80m
    i3lm convert run-200m models/i3-200m --num-attention-heads 12

    Sizes are read from the tensors, since the original's config.json is partly wrong. The file is
    opened without running any code in it. The result is read back and compared before it takes
    its place.

    Args:
        source: A folder with pytorch_model.bin, the folder of a 200m run, or a file of weights.
        out: The folder to write.
        num_attention_heads: Attention heads, which the tensors do not tell; by default what the
            checkpoint's own configuration says.
        tokenizer: A tokenizer to use in place of the one beside the checkpoint: a folder, a file
            or a Hub name.
        reference_logits: FILE or FILE:NAME, a safetensors file with input_ids and logits (under
            NAME. if given) that the model must reproduce within 1e-4.
        overwrite: Replace what is in the folder to write.
        json: Print what was done as one JSON object.
    """
    from i3lm.cli.running import print_json
    from i3lm.files import write_folder
    from i3lm.inference.loading import check_tokenizer_fits
    from i3lm.models.i3.conversion_open_i3 import build_model, read_open_i3
    from i3lm.tokenizers import load_tokenizer

    target = check_target(Path(out), Path(source), overwrite)
    checkpoint = read_open_i3(Path(source), num_attention_heads)
    found = tokenizer or (str(checkpoint.tokenizer) if checkpoint.tokenizer else None)
    vocabulary = load_tokenizer(found) if found else None
    if vocabulary is not None:
        _note_tokenizer(checkpoint, vocabulary)
    model = build_model(checkpoint)
    if vocabulary is not None:
        check_tokenizer_fits(model, vocabulary, where=str(found))
    kinds: list[str] = list(model.config.layer_types or ())
    figures: dict[str, Any] = {
        "weights": str(checkpoint.weights),
        "out": str(target),
        "parameters": model.num_parameters(),
        "layers": {kind: kinds.count(kind) for kind in kinds},
        "recurrence": model.config.recurrence,
        "num_attention_heads": model.config.num_attention_heads,
        "tokenizer": found,
        "notes": checkpoint.notes,
    }
    if reference_logits is not None:
        figures["reference_difference"] = _compare_with_reference(model, reference_logits)

    def write(folder: Path) -> None:
        _save(folder, model, vocabulary, checkpoint)
        figures["written_difference"] = _compare_with_written(model, folder)

    write_folder(target, write)
    print_json(figures) if json else _print(figures, model)


# How the names of the files of a model folder begin.
_WRITTEN = (
    "config.json", "generation_config.json", "model", "tokenizer", "special_tokens", "README.md",
    "chat_template", "evaluation.json", "adapter_",
)  # fmt: skip


def check_target(out: Path, source: Path, overwrite: bool) -> Path:
    """Gives the folder to write, if it may be written."""
    from i3lm.errors import OutputError
    from i3lm.files import as_output_error

    target = out.resolve()
    for what, path in (("the checkpoint", source), ("the working folder", Path.cwd())):
        if path.resolve().is_relative_to(target):
            raise OutputError(
                f"{out}: holds {what} {path}, which writing would replace; choose another folder"
            )
    if target.exists() and not target.is_dir():
        raise OutputError(f"{out}: is a file; give the path of a folder")
    try:
        filled = target.is_dir() and any(target.iterdir())
    except OSError as error:
        raise as_output_error(out, error) or error from error
    if filled and overwrite:
        foreign = [p.name for p in target.iterdir() if not p.name.startswith(_WRITTEN)]
        if foreign:
            raise OutputError(
                f"{out}: holds {foreign[0]}, which is no part of a model; --overwrite replaces "
                "models only: choose another folder"
            )
    if filled and not overwrite:
        raise OutputError(f"{out}: is not empty; pass --overwrite to replace it, or choose another")
    return target


def _note_tokenizer(checkpoint: Any, tokenizer: Any) -> None:
    """Writes what the model should know of its tokenizer into the configuration."""
    from i3lm.tokenizers import tokenizer_fingerprint

    config = checkpoint.config
    for role in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config, role, getattr(tokenizer, role))
    config.tokenizer_fingerprint = tokenizer_fingerprint(tokenizer)
    if len(tokenizer) < config.vocab_size:
        checkpoint.notes.append(
            f"the tokenizer has {len(tokenizer):,} tokens and the model {config.vocab_size:,}: "
            f"ids from {len(tokenizer)} on stand for no text; is it the model's tokenizer?"
        )


def _save(folder: Path, model: Any, tokenizer: Any, checkpoint: Any) -> None:
    from i3lm.models.model_card import write_model_card

    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    facts = {"Converted from": f"a checkpoint of open-i3, `{checkpoint.weights.name}`"}
    write_model_card(folder, model.config, model.num_parameters(), facts)


def _compare_with_written(model: Any, folder: Path) -> float:
    """The largest difference in logits between a model and what a folder gives back."""
    import torch

    from i3lm.inference.loading import load_model

    config = model.config
    T = min(config.max_position_embeddings, 32)
    input_ids = (torch.arange(2 * T) % config.vocab_size).view(2, T)
    logits = _logits(model, input_ids)
    return _check_difference(
        _logits(load_model(folder).eval(), input_ids), logits, "the model read back"
    )


def _compare_with_reference(model: Any, reference: str) -> float:
    """The largest difference between a model's logits and those in ``FILE[:NAME]``."""
    from i3lm.errors import CheckpointError

    input_ids, logits = _read_reference(reference)
    try:
        ours = _logits(model, input_ids)
    except ValueError as error:  # ids or a length that this model does not have
        raise CheckpointError(f"{reference}: not of this model: {error}") from error
    return _check_difference(ours, logits, reference)


def _read_reference(reference: str) -> tuple[Any, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from i3lm.errors import ConfigurationError

    path, name = reference, ""
    if not Path(path).is_file():
        path, _, name = reference.rpartition(":")
    if not Path(path).is_file():
        raise ConfigurationError(f"reference_logits: there is no file {path or reference}")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ConfigurationError(f"{path}: not readable as safetensors: {error}") from error
    keys = [f"{name}.{part}" if name else part for part in ("input_ids", "logits")]
    for key in keys:
        if key not in tensors:
            raise ConfigurationError(
                f"{path}: holds no {key} (it has {', '.join(sorted(tensors))}); name the set as "
                f"{path}:NAME"
            )
    return tensors[keys[0]].long(), tensors[keys[1]]


def _logits(model: Any, input_ids: Any) -> Any:
    import torch

    with torch.no_grad():
        return model(input_ids=input_ids, use_cache=False).logits


def _check_difference(logits: Any, expected: Any, where: str) -> float:
    """The largest absolute difference, which must be within the tolerance."""
    from i3lm.errors import CheckpointError

    if logits.shape != expected.shape:
        raise CheckpointError(
            f"{where}: logits of shape {tuple(expected.shape)}, but the model gives "
            f"{tuple(logits.shape)}; they are of another model"
        )
    difference = float((logits - expected).abs().max())
    if not difference <= TOLERANCE:  # true for NaN as well
        raise CheckpointError(
            f"{where}: logits differ by up to {difference:.2g}, more than {TOLERANCE:g}: the model "
            "is not the same; check --num-attention-heads and the checkpoint"
        )
    return difference


def _print(figures: dict[str, Any], model: Any) -> None:
    config = model.config
    short = {"linear_attention": config.recurrence, "full_attention": "attention"}
    layers = " + ".join(f"{count} {short[kind]}" for kind, count in figures["layers"].items())
    print(
        f"{figures['weights']}: {figures['parameters']:,} parameters, layers {layers}, width "
        f"{config.hidden_size:,}, heads {config.num_attention_heads}, context "
        f"{config.max_position_embeddings:,}, vocabulary {config.vocab_size:,}"
    )
    for note in figures["notes"]:
        print(f"note: {note}")
    print(
        f"tokenizer: {figures['tokenizer']}"
        if figures["tokenizer"]
        else "tokenizer: none found, so the result cannot read or write text; convert again with "
        "--tokenizer PATH to add one"
    )
    print(f"read back: logits differ by at most {figures['written_difference']:.2g}")
    if "reference_difference" in figures:
        print(f"reference: logits differ by at most {figures['reference_difference']:.2g}")
    print(f"wrote {figures['out']}")
