"""``i3lm evaluate``"""

from __future__ import annotations

from typing import Any


def evaluate(
    checkpoint: str,
    data: str,
    text_column: str | None = None,
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
    two models whose tokenizers can write every text. One that lower-cases, or that has <UNK> for
    what it does not know, leaves a part of the text out, and its figure comes out too low: then
    a note says so.

    Args:
        checkpoint: A checkpoint folder, or the output folder of a run (its best model).
        data: A built-in corpus, a .txt, .jsonl or .parquet file, a folder or pattern of them, or a
            Hub name. Of conversations, only the assistant's answers count.
        text_column: Where a record holds its text or its conversation; by default the known column
            of a known set, else text, messages or conversations.
        split: Which split of a Hub data set to read.
        size: Most documents to read; for stories, how many to write.
        held_out_fraction: Evaluate on this share of the documents, the same ones that a training
            run with this fraction sets aside; 1 means all.
        context_length: Tokens per row; by default the model's context.
        batch_size: Rows per forward pass; it does not change the result.
        device: cpu, cuda (or one GPU by its number, such as cuda:1), mps, or auto for the fastest
            there is.
        precision: fp32, bf16, fp16 or auto.
        json: Print the figures as one JSON object.
    """
    import sys

    from i3lm.cli.running import print_json
    from i3lm.data.sources import Source
    from i3lm.data.split import held_out_documents
    from i3lm.data.tokens import tokenize_documents
    from i3lm.device import resolve_device, resolve_precision
    from i3lm.errors import ConfigurationError, DataError
    from i3lm.evaluation import evaluate_text, figures_line
    from i3lm.inference.loading import choose_context_length, load_checkpoint
    from i3lm.tokenizers import lowercases

    where = resolve_device(device)
    if not 0 < held_out_fraction <= 1:
        raise ConfigurationError(
            f"held_out_fraction ({held_out_fraction}) must be above 0 and at most 1"
        )
    if batch_size < 1:
        raise ConfigurationError(f"batch_size ({batch_size}) must be at least 1")
    model, tokenizer = load_checkpoint(checkpoint, where)
    context = choose_context_length(model, context_length, option="context_length")
    source = Source(data, text_column=text_column, split=split, size=size)
    documents: Any = (document for document, _ in source.read())
    if held_out_fraction < 1:
        documents = held_out_documents(documents, held_out_fraction)
    text = tokenize_documents(documents, tokenizer)
    if source.skipped:
        print(source.skipped, file=sys.stderr)
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
    figures = {
        **evaluation.as_dict(),
        "documents": text.documents,
        "context_length": context,
        "unknown_tokens": _unknown_tokens(text.tokens, tokenizer),
        "lowercases": lowercases(tokenizer),
    }
    if json:
        print_json(figures)
        return
    print(
        f"{figures_line(figures)}\n"
        f"{evaluation.tokens:,} tokens, {evaluation.bytes:,} bytes in {text.documents:,} "
        f"documents, context {context}; loss in nats per token"
    )
    if figures["lowercases"]:
        print("note: the tokenizer lower-cases the text, so bits per byte leave capitals out")
    if figures["unknown_tokens"]:
        print(
            f"note: {tokenizer.unk_token} stands {figures['unknown_tokens']:,} times for text that "
            "the tokenizer cannot write, so bits per byte leave that text out"
        )


def _unknown_tokens(tokens: Any, tokenizer: Any) -> int:
    """How many tokens stand for text that the tokenizer does not know."""
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown == tokenizer.eos_token_id:  # one token for both, as GPT-2 has
        return 0
    return int((tokens == unknown).sum())
