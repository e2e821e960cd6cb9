"""``i3lm evaluate``"""

from __future__ import annotations


def evaluate(
    checkpoint: str,
    data: str,
    text_column: str = "text",
    split: str = "train",
    size: int | None = None,
    held_out_fraction: float = 1.0,
    context_length: int | None = None,
    batch_size: int = 16,
    device: str = "auto",
    precision: str = "fp32",
    json: bool = False,
) -> None:
    """Gives a model's loss, perplexity and bits per byte on any text.

    i3lm evaluate runs/quickstart --data pydocs

    Perplexity is per token and comparable under one tokenizer only; bits per byte compare any
    two models. A tokenizer that lower-cases its text makes the task easier: mind that when
    comparing.

    Args:
        checkpoint: A checkpoint folder, or the output folder of a run (its best model).
        data: A built-in corpus, a .txt, .jsonl or .parquet file, or a Hub name.
        text_column: Where a record of a .jsonl or .parquet file holds its text.
        split: Which split of a Hub data set to read.
        size: Most documents to read; for stories, how many to write.
        held_out_fraction: Evaluate on this share of the documents, the same ones that a training
            run with this fraction sets aside; 1 means all.
        context_length: Tokens per row; by default the model's context.
        batch_size: Rows per forward pass; it does not change the result.
        device: cpu, cuda, mps, or auto for the fastest there is.
        precision: fp32, bf16 or auto.
        json: Print the figures as one JSON object.
    """
    from i3lm.cli.running import print_json
    from i3lm.data.sources import read_documents
    from i3lm.data.split import held_out_documents
    from i3lm.data.tokens import tokenize_documents
    from i3lm.device import resolve_device, resolve_precision
    from i3lm.errors import ConfigurationError, DataError
    from i3lm.evaluation import evaluate_text
    from i3lm.inference.loading import load_checkpoint

    where = resolve_device(device)
    if not 0 < held_out_fraction <= 1:
        raise ConfigurationError(
            f"held_out_fraction ({held_out_fraction}) must be above 0 and at most 1"
        )
    if batch_size < 1:
        raise ConfigurationError(f"batch_size ({batch_size}) must be at least 1")
    model, tokenizer = load_checkpoint(checkpoint, where)
    limit = model.config.max_position_embeddings
    context = limit if context_length is None else context_length
    if not 1 <= context <= limit:
        raise ConfigurationError(
            f"context_length ({context}) must be between 1 and the model's "
            f"max_position_embeddings ({limit})"
        )
    documents = read_documents(data, text_column=text_column, split=split, size=size)
    if held_out_fraction < 1:
        documents = held_out_documents(documents, held_out_fraction)
    text = tokenize_documents(documents, tokenizer)
    if text.documents == 0:
        raise DataError(
            f"{data}: no document falls into the held-out part with held_out_fraction "
            f"{held_out_fraction}: give more documents or a larger fraction"
        )
    evaluation = evaluate_text(
        model,
        text,
        context_length=context,
        batch_size=batch_size,
        precision=resolve_precision(precision, where),
    )
    figures = {**evaluation.as_dict(), "documents": text.documents, "context_length": context}
    if json:
        print_json(figures)
        return
    print(
        f"loss {evaluation.loss:.4f} nats per token, perplexity {evaluation.perplexity:,.2f}, "
        f"bits per byte {evaluation.bits_per_byte:.4f}\n"
        f"{evaluation.tokens:,} tokens, {evaluation.bytes:,} bytes in {text.documents:,} "
        f"documents, context {context}"
    )
