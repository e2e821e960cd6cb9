from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import httpx
import pyarrow
import pyarrow.parquet
import pytest

from i3lm.data.sources import Source
from i3lm.data.sources.hub import KNOWN_SETS, HubSet, is_passing
from i3lm.errors import DataError

TEXTS = [f"document {n}" for n in range(30)]
COMMIT = "0123456789" * 4


class Flaky:
    """A stream of the real library whose connection breaks after some records."""

    def __init__(self, stream: Any, breaks: list[Exception], after: int) -> None:
        self.stream, self.breaks, self.after = stream, breaks, after

    def __iter__(self) -> Iterator[Any]:
        for count, record in enumerate(self.stream):
            if count == self.after and self.breaks:
                raise self.breaks.pop(0)
            yield record

    def state_dict(self) -> dict:
        return self.stream.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.stream.load_state_dict(state)


class Hub:
    """Stands for the Hub: the set a/b, three parquet files, read by the real library."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.breaks: list[Exception] = []
        self.after = 4
        self.loads: list[tuple] = []
        self.table({"text": TEXTS})

    def table(self, columns: dict[str, list]) -> None:
        table = pyarrow.table(columns)
        self.files = []
        for part in range(3):
            file = self.folder / f"{part}.parquet"
            rows = -(-len(table) // 3)
            pyarrow.parquet.write_table(table.slice(part * rows, rows), file, row_group_size=4)
            self.files.append(str(file))

    def load(self, real: Callable) -> Callable:
        def load_dataset(name, config, *, split, streaming, revision):
            self.loads.append((name, config, split, revision))
            found = real(
                "parquet",
                data_files=self.files,
                split="train",
                streaming=streaming,
                cache_dir=str(self.folder / "cache"),
            )
            return Flaky(found, self.breaks, self.after) if streaming else found

        return load_dataset


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(tmp_path)
    monkeypatch.setattr("datasets.load_dataset", hub.load(datasets.load_dataset))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        "huggingface_hub.dataset_info", lambda name, revision: SimpleNamespace(sha=COMMIT)
    )
    return hub


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    pauses: list[float] = []
    monkeypatch.setattr("time.sleep", pauses.append)
    return pauses


@pytest.mark.parametrize("downloaded", [False, True])
def test_every_cursor_gives_exactly_the_rest(hub: Hub, downloaded: bool):
    whole = list(Source("a/b", downloaded=downloaded).read())
    assert [document for document, _ in whole] == TEXTS
    for count, (_, cursor) in enumerate(whole, start=1):
        stored = json.loads(json.dumps(cursor))
        rest = Source("a/b", downloaded=downloaded).read(stored)
        assert [document for document, _ in rest] == TEXTS[count:]


def test_a_broken_stream_goes_on_where_it_broke(
    hub: Hub, pauses: list[float], caplog: pytest.LogCaptureFixture
):
    hub.breaks = [
        ConnectionError("the network went away"),
        httpx.ReadTimeout("too slow"),
        TimeoutError("too slow"),
    ]
    with caplog.at_level(logging.WARNING):
        assert [document for document, _ in Source("a/b").read()] == TEXTS
    assert len(pauses) == 3
    assert all(0.5 <= pause <= 1.5 for pause in pauses)  # records came through in between
    assert "a/b stopped after 4 records (the network went away); trying again in" in caplog.text


def test_pauses_grow_and_end(hub: Hub, pauses: list[float]):
    hub.breaks, hub.after = [ConnectionError("the network went away") for _ in range(9)], 0
    message = r"^a/b: stopped after 0 records on the Hub \(split 'train'\): the network went away; "
    with pytest.raises(DataError, match=message):
        list(Source("a/b").read())
    assert len(pauses) == 5
    for doublings, pause in enumerate(pauses):
        assert 0.5 * 2**doublings <= pause <= 1.5 * 2**doublings


def test_errors_that_stay_are_not_tried_again(hub: Hub, pauses: list[float]):
    hub.breaks = [ValueError("damaged\nsecond line")]
    with pytest.raises(DataError, match=r"a/b: stopped after 4 records .*: damaged; check"):
        list(Source("a/b").read())
    assert pauses == []


def test_working_offline_is_one_line(monkeypatch: pytest.MonkeyPatch, pauses: list[float]):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"^a/b: could not be opened on the Hub .*offline.*; check"):
        list(Source("a/b").read())
    with pytest.raises(DataError, match=r"^a/b: could not be downloaded on the Hub .*; check"):
        list(Source("a/b", downloaded=True).read())
    assert pauses == []


@pytest.mark.parametrize(
    ("error", "passing"),
    [
        (ConnectionResetError("x"), True),
        (httpx.ConnectError("x"), True),
        (FileNotFoundError("x"), False),
        (ValueError("x"), False),
    ],
)
def test_which_errors_pass(monkeypatch: pytest.MonkeyPatch, error: Exception, passing: bool):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert is_passing(error) is passing
    wrapped = RuntimeError("while reading")
    wrapped.__cause__ = error
    assert is_passing(wrapped) is passing


@pytest.mark.parametrize("downloaded", [False, True])
def test_a_set_without_the_column(hub: Hub, downloaded: bool):
    hub.table({"story": TEXTS, "number": list(range(30))})
    message = (
        r"has no text in column 'text'; its columns are story, number; name one with the "
        r"text_column option"
    )
    with pytest.raises(DataError, match=message):
        list(Source("a/b", downloaded=downloaded).read())
    source = Source("a/b", text_column="story", downloaded=downloaded)
    assert [document for document, _ in source.read()] == TEXTS


@pytest.mark.parametrize("downloaded", [False, True])
def test_bad_records_are_counted(hub: Hub, downloaded: bool):
    hub.table({"text": ["one", None, "three", None, " ", "six"]})
    source = Source("a/b", downloaded=downloaded)
    assert [document for document, _ in source.read()] == ["one", "three", "six"]
    assert str(source.skipped) == (
        "skipped 2 records: 2 without text in column 'text' (first: a/b, record 2)"
    )


def test_reading_goes_on_in_the_commit_of_the_cursor(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    _, cursor = next(Source("a/b").read())
    monkeypatch.setattr(
        "huggingface_hub.dataset_info", lambda name, revision: SimpleNamespace(sha="f" * 40)
    )
    changed = Source("a/b")
    next(changed.read(cursor))
    assert [load[3] for load in hub.loads] == [COMMIT, COMMIT]
    assert changed.fingerprint() != Source("a/b", revision=COMMIT).fingerprint()


def test_names():
    def parse(name: str) -> HubSet | None:
        return HubSet.parse(name, "train", None)

    assert parse("a/b") == ("a/b", None, "train", None)
    assert parse("a/b:small") == ("a/b", "small", "train", None)
    assert parse("Salesforce/wikitext").config == "wikitext-103-raw-v1"
    assert parse("Salesforce/wikitext:wikitext-2-raw-v1").config == "wikitext-2-raw-v1"
    assert parse("a/b/c") is None
    assert parse("stories") is None


def test_known_sets():
    for name, known in KNOWN_SETS.items():
        which = HubSet.parse(name, "train", None)
        assert which.text_column(None) == known.text_column == "text"
        assert which.text_column("title") == "title"


def test_progress(hub: Hub):
    source = Source("a/b", downloaded=True)
    documents = source.read()
    for _ in range(10):
        next(documents)
    assert source.progress() == (10, 30)
