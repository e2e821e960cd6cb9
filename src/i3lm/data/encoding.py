"""Documents to token ids, a batch at a time, in this process or in several.

Worker processes import this module: it needs neither PyTorch nor the rest of the package.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np

from i3lm.data.chat import Document, chat_segments, text_of
from i3lm.errors import DataError
from i3lm.tokenizers import encode_documents

# What stands between documents where the tokenizer has no end-of-text token.
SEPARATOR = "\n\n"
# A batch is encoded at once, and needs about a hundred times its size while it is.
BATCH_CHARACTERS, BATCH_DOCUMENTS = 2**19, 1024
# A longer text is encoded in parts. Where it is cut, before white space, the ids may be others.
_LONGEST_PART = 2**19


@dataclass(frozen=True)
class Encoded:
    """A batch of documents as token ids.

    Attributes:
        tokens: The ids of all documents in order, each after a separator, shape (N,).
        lengths: Tokens of each document with its separator, shape (documents,), uint32.
        bytes: UTF-8 bytes of what is learnt of each document, without separators, shape
            (documents,), int64.
        learnt: Which tokens are to be learnt, shape (N,), bool; None for all of them.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    bytes: np.ndarray
    learnt: np.ndarray | None

    def part(self, chosen: np.ndarray) -> Encoded:
        """Gives some of the documents.

        Args:
            chosen: Which, shape (documents,), bool.
        """
        each = np.repeat(chosen, self.lengths)
        learnt = None if self.learnt is None else self.learnt[each]
        return Encoded(self.tokens[each], self.lengths[chosen], self.bytes[chosen], learnt)


def separator_ids(tokenizer: Any) -> list[int]:
    """The ids that stand between documents: the end-of-text token, or else a blank line."""
    if tokenizer.eos_token_id is not None:
        return [tokenizer.eos_token_id]
    return encode_documents(tokenizer, [SEPARATOR])[0]


def token_dtype(tokenizer: Any) -> type[np.unsignedinteger]:
    """The smallest type that holds every id."""
    return np.uint16 if len(tokenizer) <= 2**16 else np.uint32


def encode_batch(documents: Sequence[Document], tokenizer: Any) -> Encoded:
    """Encodes documents, the separator before each.

    Conversations are written by the tokenizer's chat template, and only what the assistant says
    is learnt; a batch holds either texts or conversations.

    Raises:
        TokenizerError: A text cannot be encoded, or the chat template is missing or unfit.
    """
    is_chat = not isinstance(documents[0], str)
    parts: list[list[tuple[str, bool]]] = [
        [(part, True) for part in _split_long(document)]
        if isinstance(document, str)
        else chat_segments(document, tokenizer)
        for document in documents
    ]
    ids = iter(encode_documents(tokenizer, [text for part in parts for text, _ in part]))
    separator = separator_ids(tokenizer)
    tokens: list[list[int]] = []
    lengths, learnt = [], []
    for part in parts:
        encoded = [separator, *islice(ids, len(part))]
        tokens += encoded
        lengths.append(sum(map(len, encoded)))
        if is_chat:
            flags = [False, *(flag for _, flag in part)]
            learnt += [np.full(len(i), flag) for i, flag in zip(encoded, flags, strict=True)]
    return Encoded(
        np.fromiter(chain.from_iterable(tokens), dtype=token_dtype(tokenizer)),
        np.array(lengths, dtype=np.uint32),
        np.array([_learnt_bytes(part) for part in parts], dtype=np.int64),
        np.concatenate(learnt) if is_chat else None,
    )


class DocumentEncoder:
    """Encodes documents one by one, for worker processes to take along.

    Args:
        tokenizer: The tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, documents: Sequence[Document]) -> list[tuple[np.ndarray, np.ndarray | None]]:
        """Gives the ids of each document, and which of them are to be learnt (None: all)."""
        encoded = encode_batch(documents, self.tokenizer)
        ends = np.cumsum(encoded.lengths, dtype=np.int64)[:-1]
        tokens = np.split(encoded.tokens, ends)
        learnt = encoded.learnt
        masks = [None] * len(tokens) if learnt is None else np.split(learnt, ends)
        return list(zip(tokens, masks, strict=True))


def _learnt_bytes(part: list[tuple[str, bool]]) -> int:
    return sum(len(text.encode("utf-8", "surrogatepass")) for text, learnt in part if learnt)


def _split_long(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > _LONGEST_PART:
        end = start + _LONGEST_PART
        space = text.rfind(" ", start + _LONGEST_PART // 2, end)
        end = end if space < 0 else space
        yield text[start:end]
        start = end
    yield text[start:]


def batches(documents: Iterable[tuple[Document, Any]]) -> Iterator[tuple[list[Document], Any]]:
    """Gathers documents into batches of bounded size, each with what came with its last one.

    Raises:
        DataError: Texts and conversations are mixed.
    """
    batch: list[Document] = []
    size, kind, last = 0, None, None
    for document, last in documents:
        if kind is None:
            kind = type(document)
        elif kind is not type(document):
            raise DataError(
                "the source holds plain texts and conversations: choose one of them with the "
                "text_column option"
            )
        batch.append(document)
        size += len(text_of(document))
        if size >= BATCH_CHARACTERS or len(batch) >= BATCH_DOCUMENTS:
            yield batch, last
            batch, size = [], 0
    if batch:
        yield batch, last


def encode_in_order(
    items: Iterable[tuple[list[Document], Any]], tokenizer: Any, *, workers: int = 0
) -> Iterator[tuple[list[Document], Encoded, Any]]:
    """Encodes batches, and gives them in their order whatever the number of workers.

    Args:
        items: Batches, each with something that travels along.
        tokenizer: The tokenizer; with workers, it is copied to each of them.
        workers: Processes to encode in; 0 for this one, where the tokenizer uses all cores if
            it can. A few batches for each worker are read ahead.

    Raises:
        DataError: A worker process died.
        TokenizerError: As for `encode_batch`.
    """
    if workers == 0:
        for documents, extra in items:
            yield documents, encode_batch(documents, tokenizer), extra
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy locked thread pools
    with ProcessPoolExecutor(workers, context, _begin_worker, (tokenizer,)) as pool:
        waiting: deque[tuple[list[Document], Future[Encoded], Any]] = deque()
        try:
            for documents, extra in items:
                waiting.append((documents, pool.submit(_encode_here, documents), extra))
                if len(waiting) > 2 * workers:
                    yield _finished(waiting)
            while waiting:
                yield _finished(waiting)
        except BrokenProcessPool as error:
            raise DataError(
                f"one of {workers} processes that tokenize ended before its time, perhaps for "
                "want of memory: use fewer workers"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _finished(waiting: deque[Any]) -> tuple[list[Document], Encoded, Any]:
    documents, future, extra = waiting.popleft()
    return documents, future.result(), extra


_worker_tokenizer: Any = None


def _begin_worker(tokenizer: Any) -> None:
    global _worker_tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes share the cores
    _worker_tokenizer = tokenizer
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends this process when the one that began it is killed; it would wait for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode_here(documents: list[Document]) -> Encoded:
    return encode_batch(documents, _worker_tokenizer)
