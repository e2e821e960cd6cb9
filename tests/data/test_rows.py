from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from i3lm.data.mixing import Mixture
from i3lm.data.rows import ROW_KINDS, RowBatches
from i3lm.data.streams import Documents, Piece, ShuffledDocuments, StreamedDocuments
from i3lm.errors import DataError
from tests.data.stand_ins import STRIDE, MemorySource, MemoryStore, encode

TEXTS = [f"text {number}" + "." * (number * 7 % 40) for number in range(200)]


class Numbered:
    """Documents whose tokens are numbered in the order of giving: k * STRIDE + p, k = 0, 1, …"""

    def __init__(self, documents: Documents) -> None:
        self.documents, self.given = documents, []

    def __getattr__(self, name: str):
        return getattr(self.documents, name)

    def __next__(self) -> Piece:
        piece = next(self.documents)
        self.given.append(piece)
        number = len(self.given) - 1
        return replace(piece, tokens=number * STRIDE + np.arange(len(piece)))


def stored(lengths: list[int], **options) -> ShuffledDocuments:
    masked = options.pop("masked", False)
    return ShuffledDocuments(MemoryStore(lengths, masked=masked), "stored", 1, **options)


def mixed(lengths: list[int], workers: int = 0) -> Mixture:
    texts = StreamedDocuments(
        MemorySource(TEXTS), encode, "texts", workers=workers, shuffle_buffer=50
    )
    return Mixture([stored(lengths, masked=True), texts], [2, 1])


def batches_of(documents: Documents, rows: str = "packed", T: int = 8, B: int = 2, **ranks):
    return RowBatches(documents, rows, context_length=T, batch_size=B, **ranks)


def take(batches: RowBatches, count: int) -> list[dict]:
    """The next batches as lists, fit to be compared, cursors included."""
    return [
        {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        for batch in islice(batches, count)
    ]


def joined(batches: list[dict], key: str, rows: str) -> list[list]:
    """The values of each line from batch to batch: one line, or one per row of the batch."""
    if rows == "stream":
        return [
            [value for batch in batches for value in batch[key][row]]
            for row in range(len(batches[0][key]))
        ]
    return [[value for batch in batches for row in batch[key] for value in row]]


lengths_of = st.lists(st.integers(1, 40), min_size=1, max_size=12)
kinds = st.sampled_from(ROW_KINDS)


@given(lengths=lengths_of, rows=kinds, T=st.integers(1, 20), B=st.integers(1, 5))
def test_every_document_whole_and_once_per_epoch(lengths: list[int], rows: str, T: int, B: int):
    if sum(lengths) <= T:
        return
    documents = Numbered(stored(lengths))
    taken = take(batches_of(documents, rows, T, B), 12)
    lines = joined(taken, "input_ids", rows)
    found = []
    for line in lines:
        numbers = list(dict.fromkeys(token // STRIDE for token in line))
        whole = [n * STRIDE + p for n in numbers for p in range(len(documents.given[n]))]
        assert line == whole[: len(line)]  # the last one goes on in the next batch
        assert numbers == sorted(numbers)
        found += numbers
    assert len(set(found)) == len(found)
    # All that was given is there, but for what each line has taken for its next label.
    assert len(documents.given) - len(found) <= len(lines)
    for epoch in range(documents.given[-1].epoch):
        order = [piece.document for piece in documents.given if piece.epoch == epoch]
        assert sorted(order) == list(range(len(lengths)))


@given(
    lengths=lengths_of, rows=kinds, T=st.integers(1, 20), B=st.integers(1, 4), masked=st.booleans()
)
def test_labels_are_the_next_tokens(lengths: list[int], rows: str, T: int, B: int, masked: bool):
    if sum(lengths) <= T:
        return
    taken = take(batches_of(stored(lengths, masked=masked), rows, T, B), 8)
    for inputs, labels in zip(
        joined(taken, "input_ids", rows), joined(taken, "labels", rows), strict=True
    ):
        expected = [-100 if masked and token % 3 == 0 else token for token in inputs[1:]]
        assert labels[:-1] == expected


@given(lengths=lengths_of, rows=kinds, T=st.integers(1, 20), B=st.integers(1, 4))
def test_resets_are_where_documents_begin(lengths: list[int], rows: str, T: int, B: int):
    if sum(lengths) <= T:
        return
    taken = take(batches_of(stored(lengths), rows, T, B), 8)
    for batch in taken:
        if rows == "contiguous":
            assert "reset" not in batch
            continue
        for inputs, reset in zip(batch["input_ids"], batch["reset"], strict=True):
            begins = [token % STRIDE == 0 for token in inputs]
            assert reset == ([True, *begins[1:]] if rows == "packed" else begins)


def test_a_row_by_hand():
    documents = stored([3, 2], shuffle=False, masked=True)
    (batch,) = take(batches_of(documents, "packed", T=4, B=2), 1)
    assert batch["input_ids"] == [[0, 1, 2, 1000], [1001, 0, 1, 2]]
    assert batch["labels"] == [[1, 2, 1000, 1001 if 1001 % 3 else -100], [-100, 1, 2, 1000]]
    assert batch["reset"] == [[True, False, False, True], [True, True, False, False]]
    (batch,) = take(batches_of(stored([3, 2], shuffle=False), "stream", 4), 1)
    assert [sum(row) for row in batch["reset"]] == [2, 2]


def test_tensors():
    batch = next(batches_of(stored([30] * 9)))
    assert {name: (v.dtype, v.shape) for name, v in batch.items() if name != "cursor"} == {
        "input_ids": (torch.int64, (2, 8)),
        "labels": (torch.int64, (2, 8)),
        "reset": (torch.bool, (2, 8)),
    }


@given(
    lengths=lengths_of,
    rows=kinds,
    T=st.integers(1, 20),
    B=st.integers(1, 4),
    taken=st.integers(0, 15),
)
def test_goes_on_anywhere(lengths: list[int], rows: str, T: int, B: int, taken: int):
    """Over epochs, of a mixture with a stream: all batches and cursors that were still to come."""

    def new() -> RowBatches:
        return batches_of(mixed(lengths), rows, T, B)

    first = new()
    cursor = ([{"cursor": first.state_dict()}] + take(first, taken))[-1]["cursor"]
    assert cursor == first.state_dict()
    other = new()
    other.load_state_dict(json.loads(json.dumps(cursor)))
    assert other.state_dict() == cursor
    assert take(other, 8) == take(first, 8)


@given(lengths=lengths_of, rows=kinds, epochs=st.integers(1, 3), taken=st.integers(0, 6))
def test_goes_on_to_the_same_end(lengths: list[int], rows: str, epochs: int, taken: int):
    def new() -> RowBatches:
        return batches_of(stored(lengths, epochs=epochs), rows, T=5, B=2)

    if sum(lengths) <= 5:
        return
    first = new()
    take(first, taken)
    state = json.loads(json.dumps(first.state_dict()))
    rest = take(first, 1000)
    other = new()
    other.load_state_dict(state)
    assert take(other, 1000) == rest
    assert other.dropped_tokens == first.dropped_tokens
    last = first.state_dict()
    assert take(first, 1) == []
    assert first.state_dict() == last


@given(lengths=lengths_of, rows=kinds, T=st.integers(1, 20))
def test_ranks_tile_the_same_batch(lengths: list[int], rows: str, T: int):
    if sum(lengths) <= T:
        return
    whole = take(batches_of(mixed(lengths), rows, T, B=4), 5)
    for world in (2, 4):
        parts = [
            take(batches_of(mixed(lengths), rows, T, B=4 // world, rank=rank, world=world), 5)
            for rank in range(world)
        ]
        for number, batch in enumerate(whole):
            for key in batch.keys() - {"cursor"}:
                slices = [part[number][key] for part in parts]
                assert [slices[r % world][r // world] for r in range(4)] == batch[key]
            assert all(part[number]["cursor"] == batch["cursor"] for part in parts)


@pytest.mark.parametrize("rows", ROW_KINDS)
def test_goes_on_with_another_number_of_processes(rows: str):
    first = batches_of(mixed([9, 5, 30]), rows, B=1, rank=1, world=4)
    take(first, 7)
    other = batches_of(mixed([9, 5, 30]), rows, B=4)
    other.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for mine, all_rows in zip(take(first, 9), take(other, 9), strict=True):
        assert mine["input_ids"] == all_rows["input_ids"][1:2]


def test_workers_change_no_batch():
    expected = take(batches_of(mixed([9, 5, 30]), "stream", T=16, B=3), 40)
    with_workers = batches_of(mixed([9, 5, 30], workers=2), "stream", T=16, B=3)
    assert take(with_workers, 20) == expected[:20]
    del with_workers
    resumed = batches_of(mixed([9, 5, 30], workers=1), "stream", T=16, B=3)
    resumed.load_state_dict(json.loads(json.dumps(expected[19]["cursor"])))
    assert take(resumed, 20) == expected[20:]


def test_state_is_small():
    batches = batches_of(stored([100_000] * 3), "stream", T=512, B=4)
    take(batches, 5)
    assert len(json.dumps(batches.state_dict())) < 1_000


@given(
    lengths=lengths_of,
    rows=st.sampled_from(["contiguous", "packed"]),
    T=st.integers(1, 9),
    B=st.integers(1, 4),
    epochs=st.integers(1, 2),
)
def test_end(lengths: list[int], rows: str, T: int, B: int, epochs: int):
    if sum(lengths) <= T:
        return
    batches = batches_of(stored(lengths, epochs=epochs), rows, T, B)
    taken = take(batches, 1000)
    predictions = epochs * sum(lengths) - 1
    if predictions // T < B:
        assert [len(batch["input_ids"]) for batch in taken] == [predictions // T]
        used = predictions // T * T
    else:
        assert len(taken) == predictions // (T * B)
        assert all(len(batch["input_ids"]) == B for batch in taken)
        used = len(taken) * T * B
    assert batches.dropped_tokens == predictions - used


def test_end_of_lines():
    # Each line has a document of 20; the fifth goes to the first line that runs dry, and then
    # the second one ends everything.
    batches = batches_of(stored([20] * 5, epochs=1, shuffle=False), "stream", T=4, B=4)
    taken = take(batches, 100)
    assert len(taken) == 4
    assert batches.dropped_tokens == (20 * 5 - 4) - 4 * 4 * 4


def test_fewer_documents_than_lines():
    batches = batches_of(stored([20, 20], epochs=1, shuffle=False), "stream", T=4, B=4)
    taken = take(batches, 100)
    assert [len(batch["input_ids"]) for batch in taken] == [2, 2, 2, 2]
    other = batches_of(stored([20, 20], epochs=1, shuffle=False), "stream", T=4, B=4)
    other.load_state_dict(json.loads(json.dumps(taken[1]["cursor"])))
    assert take(other, 100) == taken[2:]


SHORT = (
    r"^the text has 7 tokens, and one row needs 9 \(the context length and one more\): give more"
)


@pytest.mark.parametrize("rows", ROW_KINDS)
def test_a_text_shorter_than_a_row(rows: str):
    with pytest.raises(DataError, match=SHORT):
        batches_of(stored([3, 4]), rows)
    texts = StreamedDocuments(MemorySource(["one", "four"]), encode, "texts", epochs=1)
    with pytest.raises(DataError, match=SHORT):
        next(batches_of(texts, rows))


def test_fewer_rows_than_processes():
    with pytest.raises(DataError, match=r"^the text fills 1 rows of 8 tokens, and each of 2 proc"):
        next(batches_of(stored([10], epochs=1), rank=0, world=2))


def test_rows_per_epoch():
    assert batches_of(stored([9, 8])).rows_per_epoch == 2
    assert batches_of(stored([9, 7])).rows_per_epoch == 1
    assert batches_of(mixed([9])).rows_per_epoch is None


def other_seed() -> RowBatches:
    return batches_of(ShuffledDocuments(MemoryStore([50]), "stored", 2))


def other_weights() -> RowBatches:
    documents = mixed([50])
    documents.weights["texts"] = 5.0
    return batches_of(documents)


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        (lambda: batches_of(stored([50]), T=8), lambda: batches_of(stored([50]), T=9),
         r"in other data: context_length was 8 and is 9; resume with the settings of that run, or"),
        (lambda: batches_of(stored([50])), lambda: batches_of(stored([50]), "stream"),
         r": rows was packed and is stream;"),
        (lambda: batches_of(stored([50])), lambda: batches_of(stored([50]), world=3),
         r": rows_per_batch was 2 and is 6;"),
        (lambda: batches_of(stored([50])), lambda: batches_of(stored([51])),
         r": documents.fingerprint was store-\S+ and is store-\S+;"),
        (lambda: batches_of(stored([50])), other_seed, r": documents.seed was 1 and is 2;"),
        (lambda: batches_of(mixed([50])), other_weights,
         r": documents.weights.texts was 1.0 and is 5.0;"),
        (lambda: batches_of(mixed([50])), lambda: batches_of(Mixture([stored([50])], [2])),
         r": documents.sources.texts was present and is absent; documents.weights.texts was"),
    ],
)  # fmt: skip
def test_a_position_in_other_data(
    before: Callable[[], RowBatches], now: Callable[[], RowBatches], message: str
):
    state = json.loads(json.dumps(before().state_dict()))
    with pytest.raises(DataError, match=message):
        now().load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": "padded"}, r"rows is 'padded'; it must be one of contiguous, packed, stream"),
        ({"T": 0}, r"context_length \(0\) must be at least 1"),
        ({"B": 0}, r"batch_size \(0\) must be at least 1"),
        ({"rank": 2, "world": 2}, r"rank \(2\) must be at least 0 and below world \(2\)"),
    ],
)
def test_arguments_out_of_range(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        batches_of(stored([50]), **options)
