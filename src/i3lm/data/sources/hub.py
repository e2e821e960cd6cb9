"""Data sets of the Hugging Face Hub, streamed or downloaded, through the `datasets` library."""

from __future__ import annotations

import logging
import random
import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from i3lm.data.chat import Document
from i3lm.data.sources.files import Position, file_identity
from i3lm.data.sources.records import BadRecordError, Skipped, choose_column, document_of
from i3lm.errors import DataError

_logger = logging.getLogger(__name__)

# A failed read is tried again this many times in a row, after about 1, 2, 4, ... seconds.
TRIES, LONGEST_PAUSE = 6, 60.0
_COMMIT = re.compile(r"[0-9a-f]{40}")


class KnownSet(NamedTuple):
    """What has to be known of a data set to read it by its name alone."""

    text_column: str
    config: str | None = None


KNOWN_SETS = {
    "roneneldan/TinyStories": KnownSet("text"),
    "starhopp3r/TinyChat": KnownSet("text"),
    "agentlans/high-quality-english-sentences": KnownSet("text"),
    "Salesforce/wikitext": KnownSet("text", "wikitext-103-raw-v1"),
    "HuggingFaceFW/fineweb": KnownSet("text"),
    "HuggingFaceFW/fineweb-edu": KnownSet("text"),
}


class HubSet(NamedTuple):
    """Which records of which data set.

    Attributes:
        name: ``owner/name``.
        config: One of its configurations; None for its default.
        split: One of its splits.
        revision: A branch, tag or commit; None for the newest.
    """

    name: str
    config: str | None
    split: str
    revision: str | None

    @classmethod
    def parse(cls, name: str, split: str, revision: str | None) -> HubSet | None:
        """Reads ``owner/name`` or ``owner/name:config``; None where it is neither."""
        match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?", name)
        if match is None:
            return None
        config = match[2]
        if config is None and match[1] in KNOWN_SETS:
            config = KNOWN_SETS[match[1]].config
        return cls(match[1], config, split, revision)

    def text_column(self, given: str | None) -> str | None:
        """The column that was given, or the one that is known."""
        known = KNOWN_SETS.get(self.name)
        return given or (known.text_column if known else None)

    def load(self, *, streaming: bool, revision: str | None) -> Any:
        """Gives the set as the `datasets` library does."""
        from datasets import load_dataset

        return load_dataset(
            self.name, self.config, split=self.split, streaming=streaming, revision=revision
        )

    def error(self, problem: str, error: Exception) -> DataError:
        """What to tell a person when the library fails; it raises a dozen kinds."""
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        where = f"split {self.split!r}" + (f", config {self.config!r}" if self.config else "")
        return DataError(
            f"{self.name}: {problem} on the Hub ({where}): {reason}; check the name and the "
            "network, or give the path of a local file"
        )


class StreamedSet:
    """Reads a data set over the network, record by record, and keeps none of it.

    The position holds the commit that was read, so that reading goes on in the same text though
    the set may have changed since.
    """

    def __init__(self, which: HubSet, text_column: str | None, skipped: Skipped) -> None:
        self.which, self.skipped = which, skipped
        self.text_column = which.text_column(text_column)
        self._commit: str | None = None
        self._records = 0

    def read(self, position: Position | None) -> Iterator[tuple[Document, Position]]:
        """Yields the documents after a position, each with the position after it."""
        position = position or {"commit": self.commit(), "records": 0, "state": None}
        commit, self._records = position["commit"], position["records"]
        for record, state in self._records_after(commit, position["state"]):
            self._records += 1
            try:
                document = document_of(record, self.text_column)
            except BadRecordError as error:
                self.skipped.add(error, f"{self.which.name}, record {self._records}")
                continue
            yield document, {"commit": commit, "records": self._records, "state": state}

    def commit(self) -> str:
        """Gives the commit that the revision stands for; asked of the Hub once.

        Raises:
            DataError: There is no such set, or the Hub cannot be reached.
        """
        revision = self.which.revision
        if revision is not None and _COMMIT.fullmatch(revision):
            return revision
        if self._commit is None:
            from huggingface_hub import dataset_info

            def ask() -> str:
                return str(dataset_info(self.which.name, revision=revision).sha)

            self._commit = self._patiently(ask, "could not be opened")
        return self._commit

    def identity(self) -> list[Any]:
        """Gives what the content depends on."""
        return [self.which.name, self.which.config, self.which.split, self.commit()]

    def progress(self) -> tuple[int, None]:
        """Gives the records that have been read; how many there are is not known."""
        return self._records, None

    def _records_after(self, commit: str, state: Any) -> Iterator[tuple[Any, Any]]:
        """Yields each record with the stream's state after it, opening it again when it breaks."""
        failures = 0
        while True:
            stream = self._patiently(partial(self._open, commit, state), "could not be opened")
            try:
                for record in stream:
                    state, failures = stream.state_dict(), 0
                    yield record, state
                return
            except DataError:
                raise
            except Exception as error:  # a dozen kinds; those that do not pass are raised on
                failures += 1
                problem = f"stopped after {self._records:,} records"
                self._pause_or_give_up(error, failures, problem)

    def _open(self, commit: str, state: Any) -> Any:
        stream = self.which.load(streaming=True, revision=commit)
        if state is not None:
            stream.load_state_dict(state)
        return stream

    def _patiently(self, action: Callable[[], Any], problem: str) -> Any:
        for failures in range(1, TRIES + 1):
            try:
                return action()
            except Exception as error:  # likewise
                self._pause_or_give_up(error, failures, problem)
        raise AssertionError("the last failure is raised")

    def _pause_or_give_up(self, error: Exception, failures: int, problem: str) -> None:
        if failures >= TRIES or not is_passing(error):
            raise self.which.error(problem, error) from error
        # A generator of its own: the draw must not change what a training run draws.
        pause = min(LONGEST_PAUSE, 2.0 ** (failures - 1)) * random.SystemRandom().uniform(0.5, 1.5)
        _logger.warning(
            "%s %s (%s); trying again in %.1f s (%d of %d)",
            self.which.name, problem, error or type(error).__name__, pause, failures, TRIES - 1,
        )  # fmt: skip
        time.sleep(pause)


def is_passing(error: BaseException) -> bool:
    """Whether an error of the network may go away: a broken connection, a busy server.

    Not so: working offline, a name that is not there, and damaged content.
    """
    import httpx
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if constants.HF_HUB_OFFLINE or isinstance(error, OfflineModeIsEnabled):
        return False
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code if error.response is not None else 500
        return status == 429 or status >= 500
    if isinstance(error, ConnectionError | TimeoutError | httpx.TransportError):
        return True
    cause = error.__cause__ or error.__context__
    return cause is not None and is_passing(cause)


class DownloadedSet:
    """Reads a data set that the `datasets` library keeps on the disk, memory-mapped."""

    def __init__(self, which: HubSet, text_column: str | None, skipped: Skipped) -> None:
        self.which, self.skipped = which, skipped
        try:
            self._records = which.load(streaming=False, revision=which.revision)
        except Exception as error:  # the library raises a dozen kinds, from a dozen libraries
            raise which.error("could not be downloaded", error) from error
        try:
            self._column = choose_column(self._records.column_names, which.text_column(text_column))
        except BadRecordError as error:
            raise DataError(f"{which.name}: {error.explanation}") from error
        self._records = self._records.select_columns([self._column])
        self._done = 0

    def read(self, position: Position | None) -> Iterator[tuple[Document, Position]]:
        """Yields the documents after a position, each with the position after it."""
        start = position["at"] if position else 0
        if start >= len(self._records):
            return  # the library refuses to skip them all
        for row, record in enumerate(self._records.skip(start), start=start):
            self._done = row + 1
            try:
                document = document_of(record, self._column)
            except BadRecordError as error:
                self.skipped.add(error, f"{self.which.name}, record {row + 1}")
                continue
            yield document, {"at": row + 1}

    def identity(self) -> list[Any]:
        """Gives what the content depends on: the files that the library keeps."""
        files = [file_identity(Path(file["filename"])) for file in self._records.cache_files]
        return [self.which.name, self.which.config, self.which.split, files]

    def progress(self) -> tuple[int, int]:
        """Gives the records that have been read, and how many there are."""
        return self._done, len(self._records)
