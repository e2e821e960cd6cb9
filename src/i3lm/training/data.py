"""From the data options to the documents of a run: what it trains on, and what it holds out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from i3lm.data.chat import Document
from i3lm.data.encoding import DocumentEncoder
from i3lm.data.mixing import Mixture
from i3lm.data.sources import Source
from i3lm.data.sources.records import Skipped
from i3lm.data.split import held_out_documents, training_documents
from i3lm.data.streams import Documents, DocumentStream, ShuffledDocuments, StreamedDocuments
from i3lm.data.token_store import Progress, prepare_stores
from i3lm.data.tokens import TokenizedText, join_texts, tokenize_documents
from i3lm.errors import DataError
from i3lm.tokenizers import ensure_chat_template, render_chat
from i3lm.training.options import DataOptions, SourceOptions

# Where a stream has no end, as many of its held-out documents are taken.
STREAM_HELD_OUT = 500


@dataclass(frozen=True)
class TrainingText:
    """What a run reads.

    Attributes:
        documents: What it trains on, without end or to the end of its sources.
        held_out: What evaluation uses.
        summary: A line about each source.
        streamed: The sources that are read while training, by name.
    """

    documents: Documents
    held_out: TokenizedText
    summary: list[str]
    streamed: dict[str, Source]

    def skipped(self) -> list[str]:
        """A line about each source in which this process has met records without a document."""
        return [f"{name}: {s.skipped}" for name, s in self.streamed.items() if s.skipped]


def open_source(options: SourceOptions, seed: int = 0) -> Source:
    """Gives the source that the options name."""
    return Source(
        options.source,
        text_column=options.text_column,
        split=options.split,
        size=options.size,
        seed=seed,
        downloaded=options.downloaded,
        revision=options.revision,
    )


def training_texts(data: DataOptions, most: int | None = None) -> Iterator[str]:
    """Yields the texts of the training documents of every source, for training a tokenizer.

    Args:
        data: The options.
        most: Most documents to take of each source.
    """
    for options in data.all_sources():
        documents = (document for document, _ in open_source(options).read())
        kept = training_documents(documents, data.held_out_fraction)
        for document in islice(kept, most):
            # A vocabulary must hold what the plain template writes around the messages, too.
            yield document if isinstance(document, str) else render_chat(document)


def open_training_text(
    data: DataOptions,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    progress: Reporting,
) -> TrainingText:
    """Opens every source of the options, tokenized.

    Sources are tokenized once and kept (see `prepare_stores`), or, with `data.streaming`, while
    they are read.

    Args:
        data: The options.
        tokenizer: The tokenizer.
        seed: Seed of the order of documents.
        progress: Shows how far the tokenizing of a source has come.

    Raises:
        DataError: A source cannot be read, or has no document for one of the two parts.
        TokenizerError: A source holds conversations, and the tokenizer cannot write them.
    """
    # Only a tokenizer without a template has to know what the sources hold before they are read.
    if tokenizer.chat_template is None and any(map(_holds_conversations, data.all_sources())):
        ensure_chat_template(tokenizer)
    opened = [
        (_open_stream if data.streaming else _open_store)(data, options, tokenizer, seed, progress)
        for options in data.all_sources()
    ]
    streams = [stream for stream, _, _ in opened]
    weights = [options.weight for options in data.all_sources()]
    documents: Documents = streams[0]
    if len(streams) > 1:
        documents = Mixture(streams, weights, when_exhausted=data.when_exhausted)
    held_out = join_texts([text for _, text, _ in opened], tokenizer)
    streamed = {
        stream.name: stream.source
        for stream in streams
        if isinstance(stream, StreamedDocuments) and isinstance(stream.source, Source)
    }
    return TrainingText(documents, held_out, [line for _, _, line in opened], streamed)


# Given the name of a source, a block in which it is told how far its tokenizing has come.
Reporting = Callable[[str], AbstractContextManager[Progress]]
Opened = tuple[DocumentStream, TokenizedText, str]


def _open_store(
    data: DataOptions,
    options: SourceOptions,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    progress: Reporting,
) -> Opened:
    with progress(options.name) as report:
        training, held_out = prepare_stores(
            open_source(options),
            tokenizer,
            held_out_fraction=data.held_out_fraction,
            folder=data.cache or default_cache() / "tokens",
            workers=data.workers,
            progress=report,
        )
    stream = ShuffledDocuments(
        training, options.name, seed, shuffle=data.shuffle, epochs=_epochs(data)
    )
    skipped = Skipped()
    skipped.load_state_dict(training.skipped)
    line = (
        f"{options.name}: {training.tokens:,} training tokens in {training.documents:,} "
        f"documents, {held_out.tokens:,} held out in {held_out.documents:,}"
        + (f"; {skipped}" if skipped else "")
    )
    return stream, held_out.text(), line


def _open_stream(
    data: DataOptions,
    options: SourceOptions,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    progress: Reporting,
) -> Opened:
    # Read by a source of its own: the one that trains counts the records that it skips itself.
    held_out = tokenize_documents(
        _held_out(open_source(options), data.held_out_fraction), tokenizer
    )
    if held_out.documents == 0:
        raise DataError(
            f"{options.name}: no document falls into the held-out part with "
            f"data.held_out_fraction {data.held_out_fraction}: give more documents or another "
            "fraction"
        )
    stream = StreamedDocuments(
        open_source(options),
        DocumentEncoder(tokenizer),
        options.name,
        workers=data.workers,
        held_out_fraction=data.held_out_fraction,
        seed=seed,
        shuffle_buffer=data.shuffle_buffer if data.shuffle else 0,
        epochs=_epochs(data),
    )
    line = (
        f"{options.name}: read while training, {len(held_out.tokens):,} tokens held out in "
        f"{held_out.documents:,} documents"
    )
    return stream, held_out, line


def _held_out(source: Source, fraction: float) -> Iterator[Document]:
    documents = (document for document, _ in source.read())
    return islice(held_out_documents(documents, fraction), STREAM_HELD_OUT)


def _holds_conversations(options: SourceOptions) -> bool:
    """Whether the first document is one."""
    first = islice(open_source(options).read(), 1)
    return any(not isinstance(document, str) for document, _ in first)


def _epochs(data: DataOptions) -> int | None:
    """Passes over each source: without end where it begins again."""
    return None if data.when_exhausted == "repeat" else 1


def default_cache() -> Path:
    """The folder for what can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "i3lm"
