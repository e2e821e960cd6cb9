"""Token ids on the disk: written once, in pieces that survive a crash, and read from anywhere.

A store is a folder. ``<n>.tokens`` are its shards, the ids of whole documents one after the other
in the machine's byte order, little end first; ``<n>.learnt`` says of each id whether it is to be
learnt (one byte, only where not all of them are); ``lengths`` and ``starts`` tell documents apart;
``meta.json``, written last, says that the store is complete and what its files must be.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import itertools
import json
import logging
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock, Timeout

from i3lm.data.encoding import (
    Encoded,
    batches,
    encode_in_order,
    separator_ids,
    token_dtype,
)
from i3lm.data.sources import Source
from i3lm.data.split import is_held_out
from i3lm.data.tokens import TokenizedText
from i3lm.errors import DataError
from i3lm.files import write_file, writing
from i3lm.tokenizers import tokenizer_fingerprint

_logger = logging.getLogger(__name__)

FORMAT = 1
# A shard is closed when it has this many tokens; what has been tokenised is made safe after each
# of so many: at a million tokens a second, a crash loses a quarter of a minute.
SHARD_TOKENS, SAFE_TOKENS = 2**26, 2**24
_PIECE = 2**20
PARTS = ("training", "held_out")

Progress = Callable[[int, int | None], None]


class TokenStore:
    """The documents of one part of a source as token ids.

    A document is the separator and then its own ids. Ids are read from the file when they are
    asked for, so that memory does not grow with the store, and a broken disk is an error that
    can be reported. Each shard is checked against its checksum when it is first read (about a
    tenth of a second for 128 MiB).

    Args:
        folder: A folder that `prepare_stores` completed.

    Attributes:
        fingerprint: Changes with the source, the tokenizer and the part.
        documents: Number of documents.
        tokens: Number of ids, separators included.
        bytes: UTF-8 bytes of what is learnt of the documents, without separators.
        dtype: uint16 or uint32.
        lengths: Ids of each document, shape (documents,), memory-mapped.
        skipped: The records of the source that held no document, as `Skipped.state_dict`.

    Raises:
        DataError: The store is not complete, or a file has another size than it should.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        meta = _read_meta(self.folder / "meta.json")
        self.fingerprint: str = meta["fingerprint"]
        self.documents: int = meta["documents"]
        self.tokens: int = meta["tokens"]
        self.bytes: int = meta["bytes"]
        self.dtype = np.dtype(meta["dtype"])
        self.skipped: dict[str, Any] = meta["skipped"]
        self._separator: list[int] = meta["separator"]
        self._has_mask: bool = meta["masked"]
        self._shards: list[dict[str, int]] = meta["shards"]
        self._shard_starts = _running_sum(shard["tokens"] for shard in self._shards)
        self._checked: set[str] = set()
        self._check_sizes()
        self.lengths = self._map("lengths", np.uint32)
        self._starts = self._map("starts", np.uint64)
        if meta["lengths_checksum"] != _checksum_of(self.folder / "lengths"):
            raise self._damaged("lengths")

    def read(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Gives ids of a document, shape (stop - start,); takes as long wherever it is.

        Args:
            document: Its number, from 0.
            start: The first id; 0 is the separator.
            stop: The id after the last one; None for the document's end.

        Raises:
            DataError: The shard cannot be read, or its content is damaged.
        """
        return self._read(document, start, stop, "tokens", self.dtype)

    def read_mask(
        self, document: int, start: int = 0, stop: int | None = None
    ) -> np.ndarray | None:
        """Gives which ids of a document are to be learnt, bool; None where all of them are."""
        if not self._has_mask:
            return None
        return self._read(document, start, stop, "learnt", np.dtype(bool))

    def text(self) -> TokenizedText:
        """Gives all documents in order as one stream with a separator at the end, in memory.

        It is for the held-out part: two or four bytes of memory for each id.
        """
        separator = np.array(self._separator, dtype=self.dtype)
        tokens = np.concatenate([*self._whole("tokens", self.dtype), separator])
        learnt = None
        if self._has_mask:
            unlearnt = np.zeros(len(separator), dtype=bool)
            learnt = np.concatenate([*self._whole("learnt", np.dtype(bool)), unlearnt])
        return TokenizedText(tokens, self.documents, self.bytes, np.array(self.lengths), learnt)

    def _whole(self, kind: str, dtype: np.dtype) -> Iterator[np.ndarray]:
        for index, shard in enumerate(self._shards):
            yield self._read_shard(index, 0, shard["tokens"], kind, dtype)

    def _read(
        self, document: int, start: int, stop: int | None, kind: str, dtype: np.dtype
    ) -> np.ndarray:
        if not 0 <= document < self.documents:
            raise IndexError(f"document ({document}) must be 0 to {self.documents - 1}")
        start, stop, _ = slice(start, stop).indices(int(self.lengths[document]))
        place = int(self._starts[document])
        shard = bisect.bisect_right(self._shard_starts, place) - 1
        first = place - self._shard_starts[shard] + start
        return self._read_shard(shard, first, max(0, stop - start), kind, dtype)

    def _read_shard(
        self, shard: int, first: int, count: int, kind: str, dtype: np.dtype
    ) -> np.ndarray:
        path = self.folder / f"{shard:05d}.{kind}"
        try:
            if path.name not in self._checked:
                if _checksum_of(path) != self._shards[shard][f"{kind}_checksum"]:
                    raise self._damaged(path.name)
                self._checked.add(path.name)
            ids = np.fromfile(path, dtype, count=count, offset=first * dtype.itemsize)
        except OSError as error:
            raise self._damaged(path.name, error.strerror or str(error)) from error
        if len(ids) != count:
            raise self._damaged(path.name, "it has become shorter")
        return ids

    def _check_sizes(self) -> None:
        item = self.dtype.itemsize
        sizes = {"lengths": 4 * self.documents, "starts": 8 * self.documents}
        for index, shard in enumerate(self._shards):
            sizes[f"{index:05d}.tokens"] = item * shard["tokens"]
            if self._has_mask:
                sizes[f"{index:05d}.learnt"] = shard["tokens"]
        for name, size in sizes.items():
            try:
                found = (self.folder / name).stat().st_size
            except OSError as error:
                raise self._damaged(name, error.strerror or str(error)) from error
            if found != size:
                raise self._damaged(name, f"it has {found:,} bytes and must have {size:,}")

    def _map(self, name: str, dtype: type) -> np.ndarray:
        if self.documents == 0:
            return np.zeros(0, dtype)  # an empty file cannot be mapped
        return np.asarray(np.memmap(self.folder / name, dtype, mode="r"))

    def _damaged(self, name: str, reason: str = "its content has changed") -> DataError:
        return DataError(
            f"{self.folder / name}: cannot be used ({reason}); remove the folder "
            f"{self.folder.parent} to tokenise the text again"
        )


def prepare_stores(
    source: Source,
    tokenizer: Any,
    *,
    held_out_fraction: float,
    folder: str | Path,
    workers: int = 0,
    progress: Progress | None = None,
) -> tuple[TokenStore, TokenStore]:
    """Tokenises a source, or finds it tokenised.

    The result does not depend on the number of workers. Work that was interrupted, even by a
    crash, goes on where it was last made safe. Of several processes that prepare the same
    stores one works and the others wait for it.

    Args:
        source: The documents.
        tokenizer: The tokenizer.
        held_out_fraction: Share of documents that goes to the held-out store, picked by their
            text (see :mod:`i3lm.data.split`).
        folder: Where stores are kept; these get a folder of their own in it, named after the
            fingerprints of the source and the tokenizer.
        workers: Processes to tokenise in beside this one; 0 for this one alone.
        progress: Called with how much of the source is done, and of how much if that is known
            (the units of `Source.progress`).

    Returns:
        The training and the held-out documents.

    Raises:
        DataError: The source cannot be read, or one of the parts has no document.
        OutputError: The folder cannot be written, or the disk is full.
    """
    fingerprint = _fingerprint(source, tokenizer, held_out_fraction)
    folder = Path(folder) / fingerprint
    if not _is_complete(folder):
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with _only_one_process(folder):
            if not _is_complete(folder):
                _Preparation(source, tokenizer, folder, fingerprint, held_out_fraction).run(
                    workers, progress
                )
    training, held_out = (TokenStore(folder / part) for part in PARTS)
    for name, store, share in (
        ("training", training, 1 - held_out_fraction),
        ("held-out", held_out, held_out_fraction),
    ):
        if store.documents == 0 and share > 0:
            raise DataError(
                f"{source.name}: no document falls into the {name} part with held_out_fraction "
                f"{held_out_fraction}: give more documents or another fraction"
            )
    return training, held_out


def _is_complete(folder: Path) -> bool:
    return all((folder / part / "meta.json").exists() for part in PARTS)


@contextlib.contextmanager
def _only_one_process(folder: Path) -> Iterator[None]:
    """Keeps other processes out, until this one is done or has died."""
    lock = FileLock(folder / ".lock")
    with writing(folder):
        try:
            lock.acquire(blocking=False)
        except Timeout:
            _logger.warning("%s: another process is tokenising this text; waiting for it", folder)
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _fingerprint(source: Source, tokenizer: Any, held_out_fraction: float) -> str:
    content = [
        FORMAT,
        source.fingerprint(),
        tokenizer_fingerprint(tokenizer),
        tokenizer.chat_template,
        held_out_fraction,
    ]
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()


class _Preparation:
    """Fills the two stores of one folder, from where an earlier try was made safe."""

    def __init__(
        self,
        source: Source,
        tokenizer: Any,
        folder: Path,
        fingerprint: str,
        held_out_fraction: float,
    ) -> None:
        self.source, self.tokenizer, self.folder = source, tokenizer, folder
        self.fingerprint, self.held_out_fraction = fingerprint, held_out_fraction
        self.state_file = folder / "progress.json"

    def run(self, workers: int, progress: Progress | None) -> None:
        state = _read_state(self.state_file)
        with writing(self.folder):
            parts = [_Writer(self.folder / p, state and state["parts"][p]) for p in PARTS]
        cursor = state and state["cursor"]
        documents = batches(self.source.read(cursor))
        if state is not None:
            self.source.skipped.load_state_dict(state["skipped"])
        # What belongs to a batch travels with it: with workers, reading is ahead of writing.
        items = (
            (batch, (cursor, self.source.skipped.state_dict(), self.source.progress()))
            for batch, cursor in documents
        )
        skipped, unsafe = self.source.skipped.state_dict(), 0
        try:
            for batch, encoded, (cursor, skipped, done) in encode_in_order(
                items, self.tokenizer, workers=workers
            ):
                self._write(batch, encoded, parts)
                unsafe += len(encoded.tokens)
                if unsafe >= SAFE_TOKENS:
                    self._make_safe(parts, cursor, skipped)
                    unsafe = 0
                if progress is not None:
                    progress(*done)
            self._make_safe(parts, cursor, self.source.skipped.state_dict())
        finally:
            for part in parts:
                part.close()
        self._complete(parts)

    def _write(self, batch: list[Any], encoded: Encoded, parts: list[_Writer]) -> None:
        held_out = np.array([is_held_out(document, self.held_out_fraction) for document in batch])
        for part, chosen in zip(parts, (~held_out, held_out), strict=True):
            with writing(part.folder):
                part.append(encoded.part(chosen))

    def _make_safe(self, parts: list[_Writer], cursor: Any, skipped: dict[str, Any]) -> None:
        """Records how far the files are complete; what lies behind that is overwritten later."""
        for part in parts:
            with writing(part.folder):
                part.flush()
        state = {
            "cursor": cursor,
            "skipped": skipped,
            "parts": {name: part.state for name, part in zip(PARTS, parts, strict=True)},
        }
        write_file(self.state_file, json.dumps(state))

    def _complete(self, parts: list[_Writer]) -> None:
        for name, part in zip(PARTS, parts, strict=True):
            with writing(part.folder):
                part.write_starts()
            meta = {
                "format": FORMAT,
                "fingerprint": f"{self.fingerprint}-{name}",
                "dtype": np.dtype(token_dtype(self.tokenizer)).name,
                "separator": separator_ids(self.tokenizer),
                "source": self.source.name,
                "skipped": self.source.skipped.state_dict(),
                **part.state,
            }
            write_file(part.folder / "meta.json", json.dumps(meta, indent=1))
        with writing(self.state_file):
            self.state_file.unlink()


class _Writer:
    """Appends documents to the files of one store.

    `state` says what the files hold up to the last flush; a writer that begins from a state cuts
    off what lies behind it.
    """

    def __init__(self, folder: Path, state: dict[str, Any] | None) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.state: dict[str, Any] = state or {
            "documents": 0, "tokens": 0, "bytes": 0, "masked": False, "shards": [],
            "lengths_checksum": 0, "item": 0,
        }  # fmt: skip
        self._files: dict[str, BinaryIO] = {}
        self._open("lengths", 4 * self.state["documents"])
        if self.state["shards"]:
            self._open_shard()

    def append(self, encoded: Encoded) -> None:
        if len(encoded.lengths) == 0:
            return
        state = self.state
        state["item"] = encoded.tokens.itemsize
        state["masked"] = encoded.learnt is not None
        if not state["shards"] or state["shards"][-1]["tokens"] >= SHARD_TOKENS:
            state["shards"].append({"tokens": 0, "tokens_checksum": 0, "learnt_checksum": 0})
            self._open_shard()
        shard = state["shards"][-1]
        self._append("tokens", encoded.tokens, shard, "tokens_checksum")
        if encoded.learnt is not None:
            self._append("learnt", encoded.learnt, shard, "learnt_checksum")
        self._append("lengths", encoded.lengths, state, "lengths_checksum")
        shard["tokens"] += len(encoded.tokens)
        state["tokens"] += len(encoded.tokens)
        state["documents"] += len(encoded.lengths)
        state["bytes"] += int(encoded.bytes.sum())

    def flush(self) -> None:
        """Returns when everything that was appended is on the disk."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def write_starts(self) -> None:
        """Writes where each document begins, from the lengths, a piece at a time."""
        start = 0
        with (self.folder / "starts").open("wb") as file:
            for piece in _pieces(self.folder / "lengths"):
                ends = start + np.cumsum(np.frombuffer(piece, np.uint32), dtype=np.uint64)
                file.write(np.concatenate([[np.uint64(start)], ends[:-1]]).tobytes())
                start = int(ends[-1])
            file.flush()
            os.fsync(file.fileno())

    def _append(self, name: str, values: np.ndarray, sums: dict[str, int], key: str) -> None:
        content = values.tobytes()
        self._files[name].write(content)
        sums[key] = zlib.crc32(content, sums[key])

    def _open_shard(self) -> None:
        index, tokens = len(self.state["shards"]) - 1, self.state["shards"][-1]["tokens"]
        self._open("tokens", self.state["item"] * tokens, f"{index:05d}.tokens")
        if self.state["masked"]:
            self._open("learnt", tokens, f"{index:05d}.learnt")

    def _open(self, kind: str, size: int, name: str | None = None) -> None:
        """Opens a file to be appended to after its first `size` bytes."""
        if kind in self._files:
            before = self._files.pop(kind)
            before.flush()
            os.fsync(before.fileno())
            before.close()
        file = (self.folder / (name or kind)).open("ab")
        self._files[kind] = file
        if file.tell() < size:
            raise DataError(
                f"{file.name}: cannot be used (it has {file.tell():,} bytes and had {size:,}); "
                f"remove the folder {self.folder.parent} to tokenise the text again"
            )
        file.truncate(size)


def _read_meta(path: Path) -> dict[str, Any]:
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        if meta["format"] == FORMAT:
            return meta
        reason = f"its format is {meta['format']}, not {FORMAT}"
    except FileNotFoundError:
        reason = "it is not there: the store is not complete"
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
    raise DataError(
        f"{path}: cannot be used ({reason}); remove the folder {path.parent.parent} to tokenise "
        "the text again"
    )


def _read_state(path: Path) -> dict[str, Any] | None:
    """Gives what was made safe by an earlier try; None where there is nothing to go on from."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        _logger.warning("%s cannot be read (%s): tokenising from the beginning", path, error)
        return None


def _pieces(path: Path) -> Any:
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            yield piece


def _checksum_of(path: Path) -> int:
    """CRC-32 of a file, read in pieces: enough to find what a disk or a copy did to it."""
    checksum = 0
    for piece in _pieces(path):
        checksum = zlib.crc32(piece, checksum)
    return checksum


def _running_sum(counts: Any) -> list[int]:
    return list(itertools.accumulate(counts, initial=0))
