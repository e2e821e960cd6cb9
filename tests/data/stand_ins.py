"""Documents in memory, where the tests of streams and rows need a store or a source.

Kept free of test libraries: worker processes import it for `encode`.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection

import numpy as np

from i3lm.data import streams
from i3lm.data.streams import Document, Encoded
from i3lm.errors import DataError, TokenizerError

# More than a document of these tests has tokens.
STRIDE = 1_000


class MemoryStore:
    """A token store whose token p of document d is d * STRIDE + p.

    Args:
        lengths: Tokens of each document.
        masked: Whether every third token, counted by that number, is not to be learnt.
    """

    def __init__(self, lengths: Sequence[int], *, masked: bool = False) -> None:
        self.lengths, self.masked = lengths, masked
        self.documents, self.tokens = len(lengths), sum(lengths)
        self.fingerprint = f"store-{hash(tuple(lengths))}"

    def read(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        tokens = document * STRIDE + np.arange(self.lengths[document], dtype=np.uint32)
        return tokens[start:stop]

    def read_mask(
        self, document: int, start: int = 0, stop: int | None = None
    ) -> np.ndarray | None:
        return self.read(document, start, stop) % 3 != 0 if self.masked else None


class MemorySource:
    """A source of given documents.

    Args:
        documents: The documents.
        fails_after: The number of documents after which reading fails.
    """

    def __init__(self, documents: Sequence[Document], fails_after: int | None = None) -> None:
        self.documents, self.fails_after = documents, fails_after

    def fingerprint(self) -> str:
        return f"source of {len(self.documents)}"

    def read(self, cursor: dict | None = None) -> Iterator[tuple[Document, dict]]:
        begin = 0 if cursor is None else cursor["next"]
        for number in range(begin, len(self.documents)):
            if number == self.fails_after:
                raise DataError(f"cannot be read after {number} documents")
            yield self.documents[number], {"next": number + 1}


def encode(documents: list[Document]) -> list[Encoded]:
    """Encodes text by its characters' numbers, learning letters only where there are digits."""
    encoded: list[Encoded] = []
    for document in documents:
        if document == "bad":
            raise TokenizerError("'bad' cannot be encoded")
        tokens = np.array([ord(letter) for letter in document], dtype=np.uint32)
        has_digits = any(letter.isdigit() for letter in document)
        encoded.append((tokens, tokens > ord("9") if has_digits else None))
    return encoded


def signal_itself(connection: Connection) -> None:
    """As a worker: says that it has outlasted one signal of each kind, and waits for its end."""
    streams._GRACE_SECONDS = 0.5
    streams._start_worker(0)
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(os.getpid(), number)
    connection.send("still alive")
    time.sleep(60)
    sys.exit("nothing has ended this process")
