"""Documents as streams of tokens whose position can be saved and taken up again."""

from __future__ import annotations

import atexit
import hashlib
import json
import multiprocessing
import os
import signal
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from i3lm.data.chat import Document
from i3lm.data.split import is_held_out
from i3lm.errors import DataError, I3Error

# Token ids of a document, and where they are to be learnt (None: everywhere).
Encoded = tuple[np.ndarray, np.ndarray | None]
Encode = Callable[[list[Document]], list[Encoded]]

# Documents that a worker process encodes at a time: enough to outweigh the way there and back.
_CHUNK_DOCUMENTS = 64
# How long a worker goes on after SIGTERM.
_GRACE_SECONDS = 20.0


@dataclass(frozen=True, eq=False, slots=True)
class Piece:
    """A document as tokens, or a part of one.

    Attributes:
        tokens: Token ids, shape (N,).
        mask: True where a token is to be learnt, shape (N,); None means everywhere.
        source: Name of the stream that it comes from.
        epoch: In which pass over the source, from 0.
        document: Number of the document in its source, from 0.
        start: Where in the document it begins, in tokens.
    """

    tokens: np.ndarray
    mask: np.ndarray | None
    source: str
    epoch: int
    document: int
    start: int = 0

    def __len__(self) -> int:
        return len(self.tokens)

    def part(self, begin: int, end: int | None = None) -> Piece:
        """Gives the tokens from `begin` to `end`, without copying them."""
        return replace(
            self,
            tokens=self.tokens[begin:end],
            mask=None if self.mask is None else self.mask[begin:end],
            start=self.start + begin,
        )


class Documents(Protocol):
    """Gives one document after the other and can go on from where another object stopped."""

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides which documents come; a position is of use with equal settings only."""

    @property
    def tokens_per_epoch(self) -> int | None:
        """Tokens of one pass over everything; None where nobody has counted them."""

    def __iter__(self) -> Iterator[Piece]: ...

    def __next__(self) -> Piece: ...

    def state_dict(self) -> dict[str, Any]:
        """Gives the position, small and fit for JSON."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a position, whatever was given before."""

    def refer(self, piece: Piece) -> dict[str, Any]:
        """Gives a note, fit for JSON, from which `recall` gives the piece again."""

    def recall(self, reference: dict[str, Any]) -> Piece:
        """Gives the piece that `refer` was asked about, without moving the position."""


class DocumentStream(Documents, Protocol):
    """The documents of one source, `epochs` times over (None: without end)."""

    name: str
    epochs: int | None


class StoredDocuments(Protocol):
    """What `ShuffledDocuments` asks of a token store."""

    fingerprint: str
    documents: int
    tokens: int

    def read(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray: ...

    def read_mask(
        self, document: int, start: int = 0, stop: int | None = None
    ) -> np.ndarray | None: ...


class DocumentSource(Protocol):
    """What `StreamedDocuments` asks of a source: documents, each with the cursor after it."""

    def fingerprint(self) -> str: ...

    def read(self, cursor: dict[str, Any] | None = None) -> Iterator[tuple[Document, dict]]: ...


def permutation(size: int, *key: int | str) -> np.ndarray:
    """Gives 0 to `size` - 1 in an order that is a function of the key alone.

    The random words of NumPy's bit generators are the same in all its versions, which its
    shuffling functions do not promise; so the order is that of one random word per element.

    Args:
        size: Number of elements. The result takes the fewest bytes that hold them (20 MB for 5
            million), and 16 bytes each besides while it is drawn.
        key: What the order depends on.
    """
    digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=16).digest()
    words = np.random.PCG64(int.from_bytes(digest, "big")).random_raw(size)
    return np.argsort(words, kind="stable").astype(np.min_scalar_type(max(size - 1, 0)))


class ShuffledDocuments:
    """The documents of a token store, each once per epoch, in a new order every epoch.

    Args:
        store: The tokenized documents.
        name: Name of the source, for the log and for its order.
        seed: The order of an epoch is a function of seed, name and epoch alone.
        shuffle: Whether to shuffle at all; otherwise every epoch has the store's order.
        epochs: After how many epochs the stream ends; None means never.

    Raises:
        DataError: The store holds nothing.
    """

    def __init__(
        self,
        store: StoredDocuments,
        name: str,
        seed: int,
        *,
        shuffle: bool = True,
        epochs: int | None = None,
    ) -> None:
        if store.tokens == 0:
            raise DataError(f"{name}: holds no tokens to train on; give a source with text")
        self.store, self.name, self.epochs = store, name, epochs
        self.seed, self.shuffle = seed, shuffle
        self.epoch = self.position = 0
        self._order: tuple[int, np.ndarray] | None = None  # of one epoch

    @property
    def settings(self) -> dict[str, Any]:
        """The store's content, and what its order depends on."""
        fingerprint = self.store.fingerprint
        return {"fingerprint": fingerprint, "seed": self.seed, "shuffle": self.shuffle}

    @property
    def tokens_per_epoch(self) -> int:
        """Tokens of the store."""
        return self.store.tokens

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        if self.epoch == self.epochs:
            raise StopIteration
        document = self._document(self.epoch, self.position)
        piece = self._read(self.epoch, document)
        self.position += 1
        if self.position == self.store.documents:
            self.epoch, self.position = self.epoch + 1, 0
        return piece

    def _document(self, epoch: int, position: int) -> int:
        if not self.shuffle:
            return position
        if self._order is None or self._order[0] != epoch:
            self._order = None  # so that there are never two
            order = permutation(self.store.documents, self.seed, self.name, epoch)
            self._order = epoch, order
        return int(self._order[1][position])

    def _read(self, epoch: int, document: int, start: int = 0) -> Piece:
        tokens = self.store.read(document, start)
        mask = self.store.read_mask(document, start)
        return Piece(tokens, mask, self.name, epoch, document, start)

    def state_dict(self) -> dict[str, Any]:
        """Gives epoch and position in it."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to an epoch and a position, without reading what comes before."""
        self.epoch, self.position = state["epoch"], state["position"]

    def refer(self, piece: Piece) -> dict[str, Any]:
        """Gives the place of the piece in the store."""
        return {"epoch": piece.epoch, "document": piece.document, "start": piece.start}

    def recall(self, reference: dict[str, Any]) -> Piece:
        """Reads the piece again."""
        return self._read(**reference)


@dataclass(frozen=True)
class _Place:
    """The beginning of a window of documents.

    Attributes:
        epoch: In which pass over the source.
        first: Number of the window's first document, held-out ones not counted.
        cursor: From where the source gives that document; None means from its beginning.
    """

    epoch: int = 0
    first: int = 0
    cursor: dict[str, Any] | None = None


@dataclass(frozen=True)
class _Window:
    """Where a window begins and the next one does."""

    place: _Place
    following: _Place


class StreamedDocuments:
    """The documents of a source, tokenized as they are read.

    The source is read here, in the main process; worker processes only encode, and what they
    give back is taken in the order of reading. So neither their number nor how far they have
    come changes a document, and the position, which is that of the documents given out, does
    not know of them.

    Shuffling is by windows: `shuffle_buffer` documents are read and given in an order that is a
    function of seed, name, epoch and the window's place. To go on inside a window, its
    documents are read and encoded once more.

    Args:
        source: Where documents are read.
        encode: Turns documents into tokens and masks; worker processes get a pickled copy.
        name: Name of the source, for the log and for its order.
        workers: Number of processes that encode; 0 means this one.
        held_out_fraction: The expected share of documents that are left out, for `is_held_out`.
        seed: Seed of the order.
        shuffle_buffer: Documents per window; 0 means the source's order.
        epochs: After how many epochs the stream ends; None means never.
    """

    tokens_per_epoch = None

    def __init__(
        self,
        source: DocumentSource,
        encode: Encode,
        name: str,
        *,
        workers: int = 0,
        held_out_fraction: float = 0.0,
        seed: int = 0,
        shuffle_buffer: int = 0,
        epochs: int | None = None,
    ) -> None:
        self.source, self.encode, self.name, self.epochs = source, encode, name, epochs
        self.workers, self.held_out_fraction = workers, held_out_fraction
        self.seed, self.shuffle_buffer = seed, shuffle_buffer
        self._fingerprint = source.fingerprint()
        self._place, self._position = _Place(), 0
        self._encoded: Iterator[tuple[_Window, list[Encoded]]] | None = None
        self._window: _Window | None = None
        self._documents: list[tuple[int, Encoded]] = []  # of the window, in the order of giving
        _STREAMS.add(self)

    @property
    def settings(self) -> dict[str, Any]:
        """The source's content, and what its order depends on."""
        return {
            "fingerprint": self._fingerprint,
            "held_out_fraction": self.held_out_fraction,
            "seed": self.seed,
            "shuffle_buffer": self.shuffle_buffer,
        }

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        if self._place.epoch == self.epochs:
            raise StopIteration
        if self._window is None:
            self._window, self._documents = self._next_window()
        document, (tokens, mask) = self._documents[self._position]
        piece = Piece(tokens, mask, self.name, self._place.epoch, document)
        self._position += 1
        if self._position == len(self._documents):
            self._place, self._position = self._window.following, 0
            self._window, self._documents = None, []
        return piece

    def _next_window(self) -> tuple[_Window, list[tuple[int, Encoded]]]:
        if self._encoded is None:
            self._encoded = self._encode_from(self._place)
        try:
            window, encoded = next(self._encoded)
        except BaseException:
            self._encoded = None  # a failure is not the end: the next attempt begins here
            raise
        # A place at the very end of an epoch is the beginning of the next one.
        at_end = window.place != self._place
        if self._position and (at_end or self._position >= len(encoded)):
            raise DataError(
                f"{self.name}: has fewer documents than when this position was saved; give the "
                "source as it was, or start a new run"
            )
        self._place = window.place
        first, order = window.place.first, range(len(encoded))
        if self.shuffle_buffer:
            key = (self.seed, self.name, window.place.epoch, first)
            order = permutation(len(encoded), *key).tolist()
        return window, [(first + i, encoded[i]) for i in order]

    def _encode_from(self, place: _Place) -> Iterator[tuple[_Window, list[Encoded]]]:
        """Starts reading and encoding at a place, as far ahead as workers go."""
        notes: deque[_Note] = deque()
        chunks = _read_chunks(
            self.source,
            self.name,
            place,
            window=self.shuffle_buffer or _CHUNK_DOCUMENTS,
            held_out_fraction=self.held_out_fraction,
            epochs=self.epochs,
            notes=notes,
        )
        window_chunks = -(-self.shuffle_buffer // _CHUNK_DOCUMENTS)
        # A window ahead, so that the next one is ready when this one has been given.
        ahead = 2 + -(-window_chunks // self.workers) if self.workers else None
        loader: DataLoader = DataLoader(
            _EncodedChunks(self.encode),
            batch_sampler=chunks,
            num_workers=self.workers,
            collate_fn=_as_it_is,
            prefetch_factor=ahead,
            worker_init_fn=_start_worker,
            multiprocessing_context="spawn" if self.workers else None,
            # It draws a seed for its workers, and must not take it from the training's numbers.
            generator=torch.Generator(),
        )
        return _gather_windows(loader, notes)

    def close(self) -> None:
        """Ends the worker processes. They start again with the next document."""
        self._encoded = None

    def state_dict(self) -> dict[str, Any]:
        """Gives the beginning of the window in the source, and the position in the window."""
        return {**asdict(self._place), "position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a position; what workers have in hand is thrown away."""
        self._place = _Place(state["epoch"], state["first"], state["cursor"])
        self._position = state["position"]
        self._window, self._documents = None, []
        self.close()

    def refer(self, piece: Piece) -> dict[str, Any]:
        """Gives the piece itself: a stream cannot go back for one document."""
        return {
            "epoch": piece.epoch,
            "document": piece.document,
            "start": piece.start,
            "tokens": piece.tokens.tolist(),
            "mask": None if piece.mask is None else piece.mask.tolist(),
        }

    def recall(self, reference: dict[str, Any]) -> Piece:
        """Gives the piece that was kept."""
        mask = reference["mask"]
        return Piece(
            tokens=np.array(reference["tokens"], dtype=np.int64),
            mask=None if mask is None else np.array(mask, dtype=bool),
            source=self.name,
            epoch=reference["epoch"],
            document=reference["document"],
            start=reference["start"],
        )


_STREAMS: weakref.WeakSet[StreamedDocuments] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Ends workers while the loader still can: later in Python's exit it leaves them alone."""
    for stream in _STREAMS:
        stream.close()


# What is known of a chunk where it was read: that its window goes on (None) or ends with it, or
# that reading failed in the place of the chunk.
_Note = _Window | I3Error | None


def _read_chunks(
    source: DocumentSource,
    name: str,
    place: _Place,
    *,
    window: int,
    held_out_fraction: float,
    epochs: int | None,
    notes: deque[_Note],
) -> Iterator[list[Document]]:
    """Reads on from a place, epoch after epoch, and leaves a note for each chunk.

    Reading runs ahead of training by an amount that depends on the number of workers. A failure
    is therefore a note as well, found when everything read before it has been given.
    """
    try:
        while place.epoch != epochs:
            chunk: list[Document] = []
            count = 0
            for document, cursor in source.read(place.cursor):
                if is_held_out(document, held_out_fraction):
                    continue
                chunk.append(document)
                count += 1
                if count == window:
                    following = _Place(place.epoch, place.first + count, cursor)
                    notes.append(_Window(place, following))
                    yield chunk
                    place, chunk, count = following, [], 0
                elif len(chunk) == _CHUNK_DOCUMENTS:
                    notes.append(None)
                    yield chunk
                    chunk = []
            following = _Place(place.epoch + 1)
            if count:
                notes.append(_Window(place, following))
                yield chunk
            elif place.first == 0:
                raise DataError(
                    f"{name}: no document is left to train on with held_out_fraction "
                    f"{held_out_fraction}; give more documents or another fraction"
                )
            place = following
    except I3Error as error:
        notes.append(error)
        yield []


def _gather_windows(
    encoded_chunks: DataLoader, notes: deque[_Note]
) -> Iterator[tuple[_Window, list[Encoded]]]:
    """Puts the encoded chunks of each window together."""
    documents: list[Encoded] = []
    for encoded in encoded_chunks:
        note = notes.popleft()
        failure = note if isinstance(note, I3Error) else encoded
        if isinstance(failure, I3Error):
            try:
                raise failure
            finally:
                # A circle of frame and error would leave the workers' end to a garbage
                # collection, where their queues may be closed before they are told.
                del note, encoded, failure
        documents += encoded
        if isinstance(note, _Window):
            yield note, documents
            documents = []


class _EncodedChunks(Dataset):
    """Documents encoded, for a loader whose indices are the documents themselves."""

    def __init__(self, encode: Encode) -> None:
        self.encode = encode

    def __getitems__(self, documents: list[Document]) -> Sequence[Encoded] | I3Error:
        try:
            return self.encode(documents) if documents else []
        except I3Error as error:
            return error  # raised by a worker, its message would grow a traceback


def _as_it_is(encoded: Sequence[Encoded] | I3Error) -> Sequence[Encoded] | I3Error:
    return encoded


def _start_worker(number: int) -> None:
    """Leaves it to the main process when to stop, and to the other workers to use other cores."""
    # Ctrl-C and a scheduler's SIGTERM reach all processes of a run; the main one still needs its
    # workers for the step that it finishes. SIGTERM is also how Python's exit ends workers that
    # are still there, so they heed it, but not at once.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_soon)
    threading.Thread(target=_end_with_main, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _end_soon(*signal_and_frame: object) -> None:
    end = threading.Timer(_GRACE_SECONDS, os._exit, (0,))
    end.daemon = True
    end.start()


def _end_with_main() -> None:
    """Ends this process when the main one is gone, however that ended.

    The loader's own watch misses an end while a worker is still starting, and a worker whose
    results nobody takes any more would wait for ever.
    """
    main = multiprocessing.parent_process()
    assert main is not None
    main.join()
    os._exit(1)
