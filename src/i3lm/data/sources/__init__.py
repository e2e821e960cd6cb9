"""Documents from wherever the user's text is."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from i3lm.data.chat import Document, text_of
from i3lm.data.corpora import BUILT_IN, load_corpus
from i3lm.data.sources.files import (
    KINDS,
    LocalFiles,
    Position,
    find_files,
    has_known_suffix,
)
from i3lm.data.sources.hub import DownloadedSet, HubSet, StreamedSet
from i3lm.data.sources.records import Skipped
from i3lm.data.sources.text import END_OF_TEXT
from i3lm.errors import DataError

__all__ = ["END_OF_TEXT", "Source", "read_documents"]

Cursor = dict[str, Any]


class Reader(Protocol):
    """What one kind of source does."""

    def read(self, position: Position | None) -> Iterator[tuple[Document, Position]]:
        """Yields the documents after a position, each with the position after it."""

    def identity(self) -> list[Any]:
        """Gives what the content depends on, JSON-able."""

    def progress(self) -> tuple[int, int | None]:
        """Gives how much has been read, and of how much if that is known."""


@dataclass
class Source:
    """Documents in a fixed order, readable from any place in it.

    Attributes:
        name: A built-in corpus (``stories``, ``pydocs``); the path of a ``.txt``, ``.jsonl`` or
            ``.parquet`` file, the first two perhaps compressed (``.gz .bz2 .xz .zst``); a
            folder of them; a pattern such as ``data/*.jsonl``; or a data set on the Hub
            (``owner/name`` or ``owner/name:config``).
        text_column: Where a record holds its text or its conversation. None for the known
            column of a well-known set, else the first there is of ``text``, ``messages`` and
            ``conversations``.
        split: Which split of a Hub data set.
        size: How many documents at most; None for all (for a generated corpus, its default).
        seed: Seed of a generated corpus.
        downloaded: Whether a Hub data set is downloaded and kept, not streamed.
        revision: Branch, tag or commit of a Hub data set; None for the newest.
        skipped: The records that were skipped in the reading that goes on, by reason.
    """

    name: str
    text_column: str | None = None
    split: str = "train"
    size: int | None = None
    seed: int = 0
    downloaded: bool = False
    revision: str | None = None
    skipped: Skipped = field(default_factory=Skipped, init=False, compare=False)

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 1:
            raise DataError(f"size ({self.size}) must be at least 1 document; leave it out for all")

    def read(self, cursor: Cursor | None = None) -> Iterator[tuple[Document, Cursor]]:
        """Yields the documents in order, each with the cursor after it.

        Blank documents are left out. Records that hold no document are skipped and counted in
        `skipped`.

        Args:
            cursor: Where to begin: a cursor that an earlier reading gave, which may be stored
                as JSON; None for the beginning. Reading from it gives exactly the rest.

        Raises:
            DataError: The source is missing, empty, damaged or cannot be reached, it has no such
                column, or not one of its records holds a document.
        """
        count = 0 if cursor is None else cursor["documents"]
        if cursor is None:
            self.skipped.reset()
        self.skipped.found_document = count > 0
        if count == self.size:
            return
        for document, position in self._reader.read(cursor and cursor["position"]):
            if not text_of(document).strip():
                continue
            self.skipped.found_document = True
            count += 1
            yield document, {"documents": count, "position": position}
            if count == self.size:
                return
        if count == 0:
            self.skipped.refuse()
            raise DataError(f"{self.name}: holds no text; give a source with at least one document")

    def fingerprint(self) -> str:
        """Gives a hex digest that changes when the documents may have changed.

        Local files are known by their path, size and time of change, a Hub data set by its
        commit (asked of the Hub) or, when downloaded, by the files on the disk. Nothing is read.

        Raises:
            DataError: As for `read`.
        """
        identity = [self._reader.identity(), self.text_column, self.size]
        return hashlib.blake2b(json.dumps(identity).encode(), digest_size=16).hexdigest()

    def progress(self) -> tuple[int, int | None]:
        """Gives how much of the source has been read, and of how much if that is known.

        The unit is the source's own: bytes on the disk, records of the Hub, documents.
        """
        return self._reader.progress()

    @cached_property
    def _reader(self) -> Reader:
        if self.name in BUILT_IN:
            return _Corpus(self.name, self.seed, self.size)
        files = find_files(self.name)
        if files is not None:
            return LocalFiles(files, self.text_column, self.skipped)
        which = HubSet.parse(self.name, self.split, self.revision)
        if which is None or has_known_suffix(Path(self.name)):
            raise DataError(
                f"{self.name}: no such file; give the path of {', '.join(KINDS[:-1])} or "
                f"{KINDS[-1]} files, a Hub name (owner/name), or a built-in corpus "
                f"({', '.join(BUILT_IN)})"
            )
        if self.downloaded:
            return DownloadedSet(which, self.text_column, self.skipped)
        return StreamedSet(which, self.text_column, self.skipped)


class _Corpus:
    """Reads a built-in corpus."""

    def __init__(self, name: str, seed: int, size: int | None) -> None:
        self.name, self.seed = name, seed
        self.size = BUILT_IN[name].default_size if size is None else size
        self._done = 0

    def read(self, position: Position | None) -> Iterator[tuple[Document, Position]]:
        self._done = position["at"] if position else 0
        documents = load_corpus(self.name, seed=self.seed, size=self.size)
        for document in islice(documents, self._done, None):
            self._done += 1
            yield document, {"at": self._done}

    def identity(self) -> list[Any]:
        from i3lm import __version__

        # pydocs comes with Python, the stories with this package.
        return [self.name, self.seed, self.size, __version__, list(sys.version_info[:3])]

    def progress(self) -> tuple[int, int | None]:
        return self._done, self.size


def read_documents(
    source: str,
    *,
    text_column: str | None = None,
    split: str = "train",
    seed: int = 0,
    size: int | None = None,
) -> Iterator[str]:
    """Yields the texts of a source's documents, in order; of a conversation, what is said.

    The arguments are those of `Source`.

    Raises:
        DataError: As for `Source.read`.
    """
    documents = Source(source, text_column=text_column, split=split, seed=seed, size=size)
    for document, _ in documents.read():
        yield text_of(document)
