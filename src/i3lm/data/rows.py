"""Documents end to end, cut into batches of rows, with a position that can be saved."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch

from i3lm.data.streams import Documents, Piece
from i3lm.errors import DataError

RowKind = Literal["contiguous", "packed", "stream"]
ROW_KINDS: tuple[RowKind, ...] = ("contiguous", "packed", "stream")
# What a loss leaves out, in torch and in transformers.
NOT_LEARNT = -100


class RowBatches:
    """Batches of rows of T tokens, cut from documents laid end to end.

    No token is cropped or padded: a document goes on in the next row where the row is full. A
    row's labels are its tokens one step ahead, the last label being the next row's first token.

    Three kinds of rows:

    - ``contiguous``: row after row is cut from one line of documents. Nothing marks where a
      document begins.
    - ``packed``: the same rows, with ``reset`` True in column 0 and wherever a document begins:
      no state passes from document to document or from row to row.
    - ``stream``: each row of the batch has a line of its own and goes on where the same row of
      the batch before stopped, so that a model can carry its state from batch to batch.
      ``reset`` is True only where a document begins. A line that runs dry takes the next
      document, the first line first.

    Where `world` processes train together, every one of them plans the whole batch of
    `batch_size` * `world` rows and gathers only its own, each `world`-th. So the rows depend on
    the product alone, and a run can go on with another number of processes. Planning costs each
    process the lengths of all documents, not their tokens, as long as the documents are views of
    a file; documents that are tokenized while they are read, every process tokenizes for itself.

    When the documents end, what does not fill a batch is dropped and counted in
    `dropped_tokens`. Only a text that is too short for the very first batch gives a smaller one.

    A batch is a dict: ``input_ids`` and ``labels`` (B, T) int64, labels -100 where nothing is to
    be learnt; ``reset`` (B, T) bool, except for contiguous rows; and ``cursor``, the position
    after the batch, for `load_state_dict`.

    Args:
        documents: Where documents come from.
        rows: The kind of rows.
        context_length: Tokens T per row.
        batch_size: Rows B per batch of one process.
        rank: Which of the processes this is, from 0.
        world: Number of processes.

    Raises:
        DataError: The text is too short for one row (here or, where its length is not known, at
            the first batch), or for one row per process.
        ValueError: An argument is out of its range.
    """

    def __init__(
        self,
        documents: Documents,
        rows: RowKind,
        *,
        context_length: int,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        _check(rows, context_length, batch_size, rank, world)
        self.documents, self.rows, self.context_length = documents, rows, context_length
        self.batch_size, self.rank, self.world = batch_size, rank, world
        self.dropped_tokens = 0
        if documents.tokens_per_epoch is not None:
            self._check_length(documents.tokens_per_epoch)
        self.settings = {
            "rows": rows,
            "context_length": context_length,
            "rows_per_batch": batch_size * world,
            "documents": documents.settings,
        }
        self._batches, self._rows, self._ended = 0, 0, False
        lines = batch_size * world if rows == "stream" else 1
        self._lines = [_Line(documents) for _ in range(lines)]
        self._state = self._position()

    @property
    def rows_per_epoch(self) -> int | None:
        """Rows that one pass over the documents fills; None where its length is not known."""
        tokens = self.documents.tokens_per_epoch
        return None if tokens is None else (tokens - 1) // self.context_length

    @property
    def epochs(self) -> float | None:
        """Passes over the documents that the rows so far make; None where that is not known."""
        tokens = self.documents.tokens_per_epoch
        return None if tokens is None else self._rows * self.context_length / tokens

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self

    def __next__(self) -> dict[str, Any]:
        if self._ended:
            raise StopIteration
        rows = self._plan()
        if len(rows) < self.world:
            raise DataError(
                f"the text fills {len(rows)} rows of {self.context_length:,} tokens, and each of "
                f"{self.world} processes needs one: give more text, or use fewer processes"
            )
        self._count(rows)
        self._state = self._position()
        return {**self._gather(rows[self.rank :: self.world]), "cursor": self._state}

    def skip_batches(self, batches: int) -> None:
        """Goes as many batches further, or to the end, without giving them."""
        with contextlib.suppress(StopIteration):
            for _ in range(batches):
                self._count(self._plan())
        self._state = self._position()

    def _count(self, rows: list[list[Piece]]) -> None:
        self._batches += 1
        self._rows += len(rows)

    def _plan(self) -> list[list[Piece]]:
        """Cuts the rows of the next batch of all processes."""
        rows: list[list[Piece]] = []
        wanted = self.batch_size * self.world
        if self.rows == "stream":
            wanted = len(self._lines)  # fewer after a first batch that was not full
        while len(rows) < wanted:
            row = self._lines[len(rows) % len(self._lines)].cut(self.context_length)
            if row is None:
                return self._end(rows)
            rows.append(row)
        return rows

    def _end(self, rows: list[list[Piece]]) -> list[list[Piece]]:
        """Gives the rows of a first batch that is not full; drops those of any other."""
        left = sum(max(line.tokens - 1, 0) for line in self._lines)  # each predicts the next
        if self._batches:
            self.dropped_tokens = left + len(rows) * self.context_length
            self._ended = True
            raise StopIteration
        if not rows:
            self._check_length(sum(line.tokens for line in self._lines))
        if self.rows == "stream":
            self._lines = self._lines[: len(rows)]
        return rows

    def _check_length(self, tokens: int) -> None:
        if tokens < self.context_length + 1:
            raise DataError(
                f"the text has {tokens:,} tokens, and one row needs {self.context_length + 1:,} "
                "(the context length and one more): give more text or a smaller context_length"
            )

    def _gather(self, rows: list[list[Piece]]) -> dict[str, torch.Tensor]:
        """Copies the planned tokens into tensors."""
        shape = len(rows), self.context_length + 1
        tokens = np.empty(shape, dtype=np.int64)
        learnt, begins = np.ones(shape, dtype=bool), np.zeros(shape, dtype=bool)
        for row, pieces in enumerate(rows):
            column = 0
            for piece in pieces:
                end = column + len(piece)
                tokens[row, column:end] = piece.tokens
                if piece.mask is not None:
                    learnt[row, column:end] = piece.mask
                begins[row, column] = piece.start == 0
                column = end
        labels = np.where(learnt, tokens, NOT_LEARNT)[:, 1:]
        batch = {"input_ids": tokens[:, :-1], "labels": labels}
        if self.rows == "packed":
            begins[:, 0] = True
        if self.rows != "contiguous":
            batch["reset"] = begins[:, :-1]
        return {name: torch.from_numpy(values.copy()) for name, values in batch.items()}

    def _position(self) -> dict[str, Any]:
        refer = self.documents.refer
        return {
            "settings": self.settings,
            "batches": self._batches,
            "rows": self._rows,
            "documents": self.documents.state_dict(),
            "lines": [[refer(piece) for piece in line.pieces] for line in self._lines],
        }

    def state_dict(self) -> dict[str, Any]:
        """Gives the position after the last batch given, small and fit for JSON.

        A document that is cut by the end of the batch is kept as its place in the store, or as
        its remaining tokens where the stream cannot go back.
        """
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a position: the next batch is the one that would have come next.

        The number of processes may differ, as long as they give as many rows together.

        Raises:
            DataError: The position is one in other data or other rows.
        """
        differences = list(_differences(state["settings"], self.settings))
        if differences:
            raise DataError(
                f"the position to resume from is one in other data: {'; '.join(differences)}; "
                "resume with the settings of that run, or start a new run"
            )
        self.documents.load_state_dict(state["documents"])
        self._batches, self._rows = state["batches"], state["rows"]
        self._ended, self.dropped_tokens = False, 0
        self._lines = [
            _Line(self.documents, [self.documents.recall(note) for note in notes])
            for notes in state["lines"]
        ]
        self._state = state


class _Line:
    """Documents end to end, cut into rows one after the other.

    Args:
        documents: Where the next document comes from when this line runs dry.
        pieces: What it begins with.
    """

    def __init__(self, documents: Documents, pieces: list[Piece] | None = None) -> None:
        self.documents = documents
        self.pieces = deque(pieces or [])
        self.tokens = sum(map(len, self.pieces))

    def cut(self, length: int) -> list[Piece] | None:
        """Gives the pieces of the next `length` tokens and of the one that follows them.

        That one stays in the line: it is the last label of this row and the first token of the
        next. None means that the documents have ended before it.
        """
        while self.tokens <= length:
            document = next(self.documents, None)
            if document is None:
                return None
            if len(document):
                self.pieces.append(document)
                self.tokens += len(document)
        row, missing = [], length
        while len(self.pieces[0]) <= missing:
            row.append(self.pieces.popleft())
            missing -= len(row[-1])
        last = self.pieces[0]
        row.append(last.part(0, missing + 1))
        self.pieces[0] = last.part(missing)
        self.tokens -= length
        return row


def _check(rows: str, context_length: int, batch_size: int, rank: int, world: int) -> None:
    if rows not in ROW_KINDS:
        raise ValueError(f"rows is {rows!r}; it must be one of {', '.join(ROW_KINDS)}")
    for name, value in (("context_length", context_length), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} ({value}) must be at least 1")
    if not 0 <= rank < world:
        raise ValueError(f"rank ({rank}) must be at least 0 and below world ({world})")


def _differences(before: Any, now: Any, name: str = "") -> Iterator[str]:
    """Names each setting that is not what it was, with both values."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*before, *now]):
            path = f"{name}.{key}" if name else key
            yield from _differences(before.get(key, "absent"), now.get(key, "absent"), path)
    elif before != now:
        yield f"{name} was {_shown(before)} and is {_shown(now)}"


def _shown(value: Any) -> str:
    return "present" if isinstance(value, dict) else str(value)
