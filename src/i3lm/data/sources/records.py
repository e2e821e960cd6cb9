"""From a record to its document, and the count of the records that hold none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from i3lm.data.chat import Document, as_messages
from i3lm.errors import DataError

# Where a record holds its document, unless the caller says so; the first that it has.
COLUMNS = ("text", "messages", "conversations")
# If not one of this many records holds a document, the rest will not either.
_ENOUGH = 100


class BadRecordError(Exception):
    """A record that holds no document.

    Args:
        reason: What is wrong with it, in the words that such records are counted under.
        explanation: The same with its value and the way out; follows the name of the place.
    """

    def __init__(self, reason: str, explanation: str) -> None:
        super().__init__(reason)
        self.reason, self.explanation = reason, explanation


class Skipped(Counter[str]):
    """Counts the records that were skipped, by reason.

    Attributes:
        places: For each reason, where it was met first.
        first_problem: The whole message of the first one; None while there is none.
        found_document: Whether the source has given a document. Until then the count is
            limited: a source whose records are all bad is not worth reading to its end.
    """

    first_problem: str | None
    found_document: bool

    def __init__(self) -> None:
        super().__init__()
        self.places: dict[str, str] = {}
        self.reset()

    def add(self, error: BadRecordError, place: str) -> None:
        """Counts one record.

        Raises:
            DataError: It is one of the first hundred records, and all of them were bad.
        """
        self[error.reason] += 1
        self.places.setdefault(error.reason, place)
        if self.first_problem is None:
            self.first_problem = f"{place}: {error.explanation}"
        if not self.found_document and self.total() >= _ENOUGH:
            self.refuse()

    def refuse(self) -> None:
        """Raises the first problem as an error, if there is one."""
        if self.first_problem is not None:
            count = self.total()
            others = "" if count == 1 else f" (none of the first {count} records holds text)"
            raise DataError(self.first_problem + others)

    def reset(self) -> None:
        """Begins a new count."""
        self.clear()
        self.places.clear()
        self.first_problem = None
        self.found_document = False

    def __str__(self) -> str:
        """One line for people: ``skipped 2 records: 2 not JSON (first: a.jsonl, line 7)``."""
        reasons = []
        for reason, count in self.most_common():
            place = f" (first: {self.places[reason]})" if reason in self.places else ""
            reasons.append(f"{count:,} {reason}{place}")
        records = "1 record" if self.total() == 1 else f"{self.total():,} records"
        return f"skipped {records}: {', '.join(reasons)}" if reasons else "skipped no records"

    def state_dict(self) -> dict[str, Any]:
        """Gives the counts and places, JSON-able."""
        return {reason: [count, self.places.get(reason)] for reason, count in self.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes the counts up again where `state_dict` left them."""
        self.reset()
        for reason, (count, place) in state.items():
            self[reason] = count
            if place is not None:
                self.places[reason] = place


def choose_column(columns: Iterable[str], text_column: str | None) -> str:
    """Picks the column of a table whose columns are known.

    Raises:
        BadRecordError: The table has no such column.
    """
    columns = list(columns)
    wanted = COLUMNS if text_column is None else (text_column,)
    for name in wanted:
        if name in columns:
            return name
    raise _no_text(columns, text_column)


def document_of(record: object, text_column: str | None) -> Document:
    """Gives the document that a record holds.

    Args:
        record: An object with columns. A column that holds a list of messages is a conversation.
        text_column: The column to read; None for the first of `COLUMNS` that the record has.

    Raises:
        BadRecordError: It is no object, or has neither text nor a conversation there.
    """
    if not isinstance(record, dict):
        raise BadRecordError(
            "not an object",
            f"holds {type(record).__name__}, not an object with a {text_column or 'text'!r} field",
        )
    name = choose_column(record, text_column)
    value = record[name]
    document = value if isinstance(value, str) else as_messages(value)
    if document is None:
        raise _no_text(record, name)
    return document


def _no_text(columns: Iterable[str], text_column: str | None) -> BadRecordError:
    name = text_column or COLUMNS[0]
    return BadRecordError(
        f"without text in column {name!r}",
        f"has no text in column {name!r}; its columns are {', '.join(map(str, columns)) or 'none'}"
        "; name one with the text_column option",
    )
