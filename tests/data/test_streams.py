from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from i3lm.data.split import is_held_out
from i3lm.data.streams import DocumentStream, ShuffledDocuments, StreamedDocuments, permutation
from i3lm.errors import DataError, TokenizerError
from tests.data.stand_ins import STRIDE, MemorySource, MemoryStore, encode, signal_itself

TEXTS = [f"text {number} " + "x" * (number % 7) for number in range(300)]


def streamed(texts: list[str] = TEXTS, **options) -> StreamedDocuments:
    return StreamedDocuments(MemorySource(texts), encode, "texts", **options)


def take(stream: DocumentStream, count: int) -> list[tuple]:
    """All there is to know of the next documents, fit to be compared."""
    pieces = [next(stream) for _ in range(count)]
    return [
        (p.tokens.tolist(), None if p.mask is None else p.mask.tolist(), p.epoch, p.document)
        for p in pieces
    ]


def text_of(taken: tuple) -> str:
    return "".join(map(chr, taken[0]))


def moved(stream: DocumentStream, state: dict) -> DocumentStream:
    """The stream at a position that has been written and read."""
    stream.load_state_dict(json.loads(json.dumps(state)))
    return stream


@given(size=st.integers(0, 300), key=st.tuples(st.integers(0, 2**40), st.text()))
def test_permutation(size: int, key: tuple):
    order = permutation(size, *key)
    assert sorted(order.tolist()) == list(range(size))
    assert order.tolist() == permutation(size, *key).tolist()
    assert order.dtype.itemsize == (1 if size <= 256 else 2)


def test_permutation_is_for_ever():
    # A change here would double and lose documents of runs that are resumed.
    assert permutation(8, 0, "stories", 0).tolist() == [7, 6, 3, 2, 1, 5, 0, 4]


def test_permutations_are_even():
    # Each of 6 orders has a sixth of 6,000 draws, give or take five standard deviations.
    counts = np.unique([permutation(3, seed) @ [9, 3, 1] for seed in range(6000)], return_counts=1)
    assert len(counts[1]) == 6
    assert np.abs(counts[1] - 1000).max() < 150


@given(
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=30),
    seed=st.integers(0, 9),
    shuffle=st.booleans(),
)
def test_every_document_once_per_epoch(lengths: list[int], seed: int, shuffle: bool):
    store = MemoryStore(lengths)
    pieces = list(ShuffledDocuments(store, "a", seed, shuffle=shuffle, epochs=3))
    assert len(pieces) == 3 * len(lengths)
    for epoch in range(3):
        part = pieces[epoch * len(lengths) : (epoch + 1) * len(lengths)]
        assert {piece.epoch for piece in part} == {epoch}
        order = [piece.document for piece in part]
        assert sorted(order) == list(range(len(lengths)))
        assert shuffle or order == sorted(order)
        for piece in part:
            assert piece.tokens.tolist() == store.read(piece.document).tolist()
            assert (piece.source, piece.start, piece.mask) == ("a", 0, None)


def test_order_depends_on_seed_name_and_epoch():
    store = MemoryStore([1] * 100)

    def order(name: str, seed: int) -> list[int]:
        return [piece.document for piece in ShuffledDocuments(store, name, seed, epochs=2)]

    assert order("a", 0) == order("a", 0)
    orders = [order("a", 0), order("a", 1), order("b", 0)]
    assert len({tuple(half) for o in orders for half in (o[:100], o[100:])}) == 6


@given(count=st.integers(1, 30), taken=st.integers(0, 70))
def test_shuffled_documents_go_on_anywhere(count: int, taken: int):
    store = MemoryStore(range(1, count + 1), masked=True)
    stream = ShuffledDocuments(store, "a", 5)
    take(stream, taken)
    other = moved(ShuffledDocuments(store, "a", 5), stream.state_dict())
    assert take(other, count + 5) == take(stream, count + 5)


def test_going_to_a_position_reads_nothing_before_it(monkeypatch: pytest.MonkeyPatch):
    store = MemoryStore([3] * 1000)
    read = []
    monkeypatch.setattr(store, "read", lambda d, start=0: read.append(d) or np.zeros(1))
    stream = ShuffledDocuments(store, "a", 0)
    stream.load_state_dict({"epoch": 7, "position": 999})
    next(stream)
    assert len(read) == 1
    assert stream.state_dict() == {"epoch": 8, "position": 0}


def test_only_one_order_is_kept():
    """5 million documents: 4 bytes each; 16 more while an order is drawn, none for the last."""
    stream = ShuffledDocuments(MemoryStore([1]), "a", 0)
    stream.store.documents = 200_000
    stream._document(0, 0)
    tracemalloc.start()
    try:
        kept = tracemalloc.get_traced_memory()[0]
        stream._document(1, 0)
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - kept < 4.1 * 200_000
    assert peak - kept < 20.5 * 200_000


def test_a_piece_is_recalled_from_the_store():
    stream = ShuffledDocuments(MemoryStore([4, 9], masked=True), "a", 0)
    piece = next(p for p in stream if p.document == 1).part(3)
    again = stream.recall(json.loads(json.dumps(stream.refer(piece))))
    assert again.tokens.tolist() == [STRIDE + p for p in range(3, 9)]
    assert again.mask.tolist() == piece.mask.tolist()
    assert (again.document, again.epoch, again.start) == (1, 0, 3)


def test_an_empty_store():
    with pytest.raises(DataError, match=r"^nothing: holds no tokens to train on; give a source"):
        ShuffledDocuments(MemoryStore([]), "nothing", 0)


@pytest.mark.parametrize("buffer", [0, 1, 7, 64, 100, 300, 1000])
def test_streamed_documents_of_three_epochs(buffer: int):
    stream = streamed(held_out_fraction=0.2, shuffle_buffer=buffer, epochs=3)
    kept = [text for text in TEXTS if not is_held_out(text, 0.2)]
    taken = take(stream, 3 * len(kept))
    with pytest.raises(StopIteration):
        next(stream)
    orders = set()
    for epoch in range(3):
        part = taken[epoch * len(kept) : (epoch + 1) * len(kept)]
        assert {piece[2] for piece in part} == {epoch}
        assert sorted(map(text_of, part)) == sorted(kept)
        assert all(text_of(piece) == kept[piece[3]] for piece in part)
        orders.add(tuple(map(text_of, part)))
    assert len(orders) == (3 if buffer > 1 else 1)
    assert (tuple(kept) in orders) == (buffer <= 1)


def test_masks_come_along():
    assert take(streamed(["ab", "a1"]), 2)[0][1] is None
    assert take(streamed(["ab", "a1"]), 2)[1][1] == [True, False]


@given(
    count=st.integers(1, 150),
    buffer=st.sampled_from([0, 1, 5, 64, 70, 1000]),
    taken=st.integers(0, 320),
)
@settings(deadline=None)
def test_streamed_documents_go_on_anywhere(count: int, buffer: int, taken: int):
    def stream() -> StreamedDocuments:
        return streamed(TEXTS[:count], shuffle_buffer=buffer, seed=3, held_out_fraction=0.1)

    if all(is_held_out(text, 0.1) for text in TEXTS[:count]):
        return
    first = stream()
    take(first, taken)
    assert take(moved(stream(), first.state_dict()), 200) == take(first, 200)


def test_going_back_on_the_same_object():
    stream = streamed(shuffle_buffer=10)
    take(stream, 25)
    state = stream.state_dict()
    expected = take(stream, 100)
    assert take(moved(stream, state), 100) == expected


def test_goes_on_after_closing():
    stream = streamed(shuffle_buffer=10)
    taken = take(stream, 25)
    stream.close()
    assert taken + take(stream, 75) == take(streamed(shuffle_buffer=10), 100)


def test_a_piece_of_a_stream_is_kept_as_tokens():
    stream = streamed(["ab12", "cd"])
    piece = next(stream).part(1)
    again = stream.recall(json.loads(json.dumps(stream.refer(piece))))
    assert again.tokens.tolist() == [ord(letter) for letter in "b12"]
    assert again.mask.tolist() == [True, False, False]
    assert (again.source, again.epoch, again.document, again.start) == ("texts", 0, 0, 1)


@pytest.fixture(scope="module")
def in_process() -> list[tuple]:
    return take(streamed(shuffle_buffer=150, held_out_fraction=0.1), 700)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers: int, in_process: list[tuple]):
    def stream() -> StreamedDocuments:
        return streamed(shuffle_buffer=150, held_out_fraction=0.1, workers=workers)

    numbers = torch.get_rng_state()
    first = stream()
    assert take(first, 333) == in_process[:333]
    state = first.state_dict()
    del first
    assert take(moved(stream(), state), 367) == in_process[333:]
    assert torch.equal(torch.get_rng_state(), numbers)  # the model's dropout draws from these


@pytest.mark.parametrize("workers", [0, 1])
def test_a_failure_comes_in_its_place_and_can_be_tried_again(workers: int):
    """However far workers are ahead, everything read before the failure is given first."""
    stream = streamed(workers=workers)
    stream.source.fails_after = 200
    before = take(stream, 192)  # three chunks; the fourth was not read to its end
    for _ in range(2):
        with pytest.raises(DataError, match=r"^cannot be read after 200 documents$"):
            next(stream)
    stream.source.fails_after = None
    assert before + take(stream, 108) == take(streamed(), 300)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_encoding_error_is_one_line(workers: int):
    with pytest.raises(TokenizerError, match=r"^'bad' cannot be encoded$"):
        next(streamed(["good", "bad"], workers=workers))


def test_workers_outlast_a_signal_to_all_processes():
    others = set(multiprocessing.active_children())
    stream = streamed(workers=1)
    take(stream, 1)
    (worker,) = set(multiprocessing.active_children()) - others
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(worker.pid, number)
    assert take(stream, 599) == take(streamed(), 600)[1:]
    assert worker.is_alive()
    del stream
    worker.join(timeout=20)
    assert worker.exitcode == 0


# Runs to its second document with two workers, of which the second is still starting.
RUN = """
import os, signal, sys
from i3lm.data.streams import StreamedDocuments
from tests.data.stand_ins import MemorySource, encode
stream = StreamedDocuments(MemorySource(["a" * 900] * 999), encode, "texts", workers=2)
print(next(stream).document, flush=True)
"""


@pytest.mark.parametrize(
    ("end", "code"), [("os.kill(os.getpid(), signal.SIGKILL)", -9), ("sys.exit(3)", 3)]
)
def test_workers_end_with_the_main_process(end: str, code: int):
    root = Path(__file__).parents[2]
    # It returns when every process that has its output is gone.
    finished = subprocess.run(
        [sys.executable, "-c", RUN + end], cwd=root, stdout=subprocess.PIPE, timeout=30
    )
    assert (finished.stdout, finished.returncode) == (b"0\n", code)


def test_sigterm_ends_a_worker_after_a_while():
    """Without it a process that ends with workers at hand might wait for them for ever."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    worker = context.Process(target=signal_itself, args=(theirs,))
    worker.start()
    assert ours.poll(timeout=20)
    assert ours.recv() == "still alive"
    worker.join(timeout=20)
    assert worker.exitcode == 0


def test_a_source_that_lost_documents():
    stream = streamed(TEXTS[:60])
    take(stream, 50)
    with pytest.raises(DataError, match=r"^texts: has fewer documents than when this position"):
        next(moved(streamed(TEXTS[:50]), stream.state_dict()))


@pytest.mark.parametrize(("texts", "fraction"), [(TEXTS[:20], 1.0), ([], 0.0)])
def test_nothing_to_train_on(texts: list[str], fraction: float):
    message = rf"^texts: no document is left to train on with held_out_fraction {fraction}; give"
    with pytest.raises(DataError, match=message):
        next(streamed(texts, held_out_fraction=fraction))


def test_conversations_are_held_out_by_their_content():
    chats = [[{"role": "user", "content": text}] for text in TEXTS]
    stream = StreamedDocuments(
        MemorySource(chats),
        lambda documents: encode([document[0]["content"] for document in documents]),
        "chats",
        held_out_fraction=0.5,
        epochs=1,
    )
    taken = [text_of(piece) for piece in _all(stream)]
    assert 100 < len(taken) < 200
    assert taken == [text for text in TEXTS if text in taken]


def _all(stream: DocumentStream) -> Iterator[tuple]:
    return (((piece.tokens.tolist()),) for piece in stream)
