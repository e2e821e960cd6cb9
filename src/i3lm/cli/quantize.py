"""``i3lm quantize``"""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Models and tokenizers are Any below: jsonargparse resolves this module's annotations, and --help
# would wait seconds for torch.


def quantize(
    checkpoint: str,
    output: str,
    data: str = "stories",
    text_column: str | None = None,
    split: str = "train",
    size: int | None = 50,
    json: bool = False,
) -> None:
    """Makes a checkpoint with int8 weights, for fast decoding on a CPU.

    i3lm quantize runs/quickstart --output runs/quickstart-int8

    The matrices of linear maps become int8, one scale per row; states, activations and
    embeddings stay as they are. The result is read like any checkpoint, by the other commands
    and by transformers' from_pretrained. What it costs is measured on a text and printed. Needs
    torchao: pip install 'i3lm[quant]'.

    Args:
        checkpoint: A checkpoint folder, or the output folder of a run (its best model).
        output: The folder to write; it must not hold anything yet.
        data: The text to measure bits per byte on, before and after: a built-in corpus, a .txt,
            .jsonl or .parquet file, a folder or pattern of them, or a Hub name.
        text_column: Where a record holds its text or its conversation; by default the known column
            of a known set, else text, messages or conversations.
        split: Which split of a Hub data set to read.
        size: Most documents to measure on; null means all.
        json: Print what was done as one JSON object.
    """
    from i3lm.cli.running import print_json
    from i3lm.data.sources import Source
    from i3lm.data.tokens import tokenize_documents
    from i3lm.errors import CheckpointError
    from i3lm.evaluation import evaluate_text
    from i3lm.files import write_folder
    from i3lm.inference.adapters import is_adapter
    from i3lm.inference.loading import find_checkpoint, load_checkpoint
    from i3lm.inference.quantization import (
        check_can_quantize,
        quantize_checkpoint,
        quantized_parameters,
    )

    target = _check_target(Path(output))
    folder = find_checkpoint(checkpoint)
    if is_adapter(folder):
        raise CheckpointError(f"{folder}: is an adapter: merge it into its base first: i3lm merge")
    before, tokenizer = load_checkpoint(folder)
    check_can_quantize(before.config, folder)
    source = Source(data, text_column=text_column, split=split, size=size)
    documents: Any = (document for document, _ in source.read())
    text = tokenize_documents(documents, tokenizer)
    context = before.config.max_position_embeddings
    bits = [evaluate_text(before, text, context_length=context).bits_per_byte]
    parameters = before.num_parameters()
    model = quantize_checkpoint(folder)

    def write(part: Path) -> None:
        _save(part, model, tokenizer, folder.name, parameters)
        # Measured on what was written, so that it is known to be readable.
        after, _ = load_checkpoint(part)
        bits.append(evaluate_text(after, text, context_length=context).bits_per_byte)

    write_folder(target, write)
    figures = {
        "output": str(target),
        "parameters": parameters,
        "quantized_parameters": quantized_parameters(model),
        "bytes_before": _weight_bytes(folder),
        "bytes_after": _weight_bytes(target),
        "data": data,
        "documents": text.documents,
        "bits_per_byte_before": bits[0],
        "bits_per_byte_after": bits[1],
    }
    print_json(figures) if json else _print(figures)


def _check_target(output: Path) -> Path:
    """Gives the folder to write, if nothing would be lost."""
    from i3lm.errors import OutputError
    from i3lm.files import as_output_error

    target = output.resolve()
    try:
        if target.exists() and not target.is_dir():
            raise OutputError(f"{output}: is a file; give the path of a folder")
        if target.is_dir() and any(target.iterdir()):
            raise OutputError(f"{output}: is not empty; give a new folder")
    except OSError as error:
        raise as_output_error(output, error) or error from error
    return target


def _save(folder: Path, model: Any, tokenizer: Any, source: str, parameters: int) -> None:
    from i3lm.models.model_card import write_model_card

    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    facts = {"Quantised": f"int8 weights (torchao), from `{source}`"}
    write_model_card(folder, model.config, parameters, facts)


def _weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _print(figures: dict[str, Any]) -> None:
    before, after = figures["bits_per_byte_before"], figures["bits_per_byte_after"]
    quantized, parameters = figures["quantized_parameters"], figures["parameters"]
    print(
        f"{quantized:,} of {parameters:,} parameters ({quantized / parameters:.0%}) "
        f"are int8 now; weights {figures['bytes_before'] / 1e6:,.1f} MB before, "
        f"{figures['bytes_after'] / 1e6:,.1f} MB after\n"
        f"bits per byte on {figures['documents']:,} documents of {figures['data']}: {before:.4f} "
        f"before, {after:.4f} after ({after - before:+.5f})\n"
        f"wrote {figures['output']}"
    )
