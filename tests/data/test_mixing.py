from __future__ import annotations

import json
import math
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from i3lm.data.mixing import Mixture
from i3lm.data.streams import ShuffledDocuments
from i3lm.errors import ConfigurationError
from tests.data.stand_ins import MemoryStore

NAMES = "abcdef"


def mixture(
    lengths: list[list[int]],
    weights: list[float],
    when_exhausted: str = "repeat",
    epochs: int | None = None,
) -> Mixture:
    streams = [
        ShuffledDocuments(MemoryStore(part), name, 0, epochs=epochs)
        for name, part in zip(NAMES, lengths, strict=False)
    ]
    return Mixture(streams, weights, when_exhausted=when_exhausted)


def take(documents: Mixture, count: int) -> list[tuple[str, int, int]]:
    return [(p.source, p.epoch, p.document) for p in islice(documents, count)]


sources = st.lists(
    st.tuples(st.lists(st.integers(1, 100), min_size=1, max_size=8), st.floats(0.01, 100.0)),
    min_size=1,
    max_size=6,
)


@given(sources=sources)
def test_shares_follow_the_weights_at_every_prefix(sources: list):
    lengths, weights = zip(*sources, strict=True)
    documents = mixture(list(lengths), list(weights))
    longest = max(max(part) for part in lengths)
    lag = longest * max(1.0, sum(1 / k for k in range(1, len(sources))))
    given_tokens = dict.fromkeys(NAMES, 0)
    for _ in range(200):
        piece = next(documents)
        given_tokens[piece.source] += len(piece)
        total = sum(given_tokens.values())
        for name, part, weight in zip(NAMES, lengths, weights, strict=False):
            ahead = given_tokens[name] - total * weight / math.fsum(weights)
            assert -lag - 1e-6 <= ahead <= max(part) + 1e-6, name


def test_long_run():
    documents = mixture([[5] * 100, [70, 90], [33] * 9], [0.6, 0.3, 0.1])
    take(documents, 20_000)
    tokens = [documents.progress[name].tokens for name in "abc"]
    assert [count / sum(tokens) for count in tokens] == pytest.approx([0.6, 0.3, 0.1], abs=1e-3)


def test_ties_go_by_order_and_small_sources_repeat():
    documents = mixture([[1] * 9, [1] * 2], [1, 1])
    taken = take(documents, 8)
    assert [source for source, _, _ in taken] == list("abababab")
    assert [epoch for source, epoch, _ in taken if source == "b"] == [0, 0, 1, 1]
    assert vars(documents.progress["b"]) == {"documents": 4, "tokens": 4, "epoch": 1}


@given(
    sources=sources,
    rule=st.sampled_from([("repeat", None), ("drop", 2), ("stop", 2)]),
    taken=st.integers(0, 60),
)
def test_goes_on_anywhere(sources: list, rule: tuple, taken: int):
    lengths, weights = map(list, zip(*sources, strict=True))
    first = mixture(lengths, weights, *rule)
    take(first, taken)
    other = mixture(lengths, weights, *rule)
    other.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert take(other, 100) == take(first, 100)
    assert other.progress == first.progress


@given(sources=sources)
def test_drop_gives_every_document_of_every_epoch(sources: list):
    lengths, weights = map(list, zip(*sources, strict=True))
    taken = take(mixture(lengths, weights, "drop", epochs=2), 1000)
    expected = [
        (name, epoch, document)
        for name, part in zip(NAMES, lengths, strict=False)
        for epoch in range(2)
        for document in range(len(part))
    ]
    assert sorted(taken) == expected


def test_drop_keeps_the_proportions_of_the_others():
    documents = mixture([[2] * 10, [2] * 900, [2] * 900], [8, 1, 3], "drop", epochs=1)
    take(documents, 13)
    assert documents.progress["a"].documents == 9
    take(documents, 400)
    assert documents.progress["a"].documents == 10
    b, c = documents.progress["b"].tokens, documents.progress["c"].tokens
    assert abs(3 * b - c) <= 8  # each within one document of its share


@given(sources=sources)
def test_stop_ends_with_the_first_that_ends(sources: list):
    lengths, weights = map(list, zip(*sources, strict=True))
    documents = mixture(lengths, weights, "stop", epochs=1)
    taken = take(documents, 1000)
    counts = [sum(source == name for source, _, _ in taken) for name in NAMES]
    ended = [n == len(part) for n, part in zip(counts, lengths, strict=False)]
    assert any(ended)
    with pytest.raises(StopIteration):
        next(documents)


def test_pieces_are_recalled_from_their_stream():
    documents = mixture([[5], [7]], [1, 1])
    for piece in [next(documents), next(documents)]:
        again = documents.recall(json.loads(json.dumps(documents.refer(piece.part(2)))))
        assert (again.source, again.start) == (piece.source, 2)
        assert again.tokens.tolist() == piece.tokens[2:].tolist()


def test_tokens_per_epoch():
    documents = mixture([[5, 2], [7]], [1, 1])
    assert documents.tokens_per_epoch == 14
    documents.streams["b"].store.tokens = None
    assert documents.tokens_per_epoch is None


@pytest.mark.parametrize(
    ("lengths", "weights", "options", "message"),
    [
        ([], [], {}, r"a mixture needs at least one source"),
        ([[1], [1]], [1], {}, r"there are 1 weights for 2 sources: give one for each"),
        ([[1]], [0], {}, r"the weight of a is 0; it must be a positive number"),
        ([[1]], [-0.5], {}, r"the weight of a is -0.5; it must be"),
        ([[1]], [float("nan")], {}, r"the weight of a is nan; it must be"),
        ([[1]], [float("inf")], {}, r"the weight of a is inf; it must be"),
        ([[1]], [1], {"epochs": 2}, r"a is to end after 2 epochs, but when_exhausted is 'repeat'"),
        ([[1]], [1], {"when_exhausted": "halt"}, r"is 'halt'; it must be one of repeat, drop, st"),
    ],
)
def test_what_cannot_be_mixed(lengths: list, weights: list, options: dict, message: str):
    with pytest.raises(ConfigurationError, match=message):
        mixture(lengths, weights, **options)


def test_one_name_twice():
    stream = ShuffledDocuments(MemoryStore([1]), "a", 0)
    with pytest.raises(ConfigurationError, match=r"^a is in the mixture more than once: give it"):
        Mixture([stream, stream], [1, 1])
