from __future__ import annotations

import numpy as np
import pytest

from i3lm.data import encoding
from i3lm.data.encoding import batches, encode_batch, encode_in_order, separator_ids
from i3lm.errors import DataError
from i3lm.tokenizers import train_tokenizer
from tests.data.test_chat import MESSAGES, TEMPLATE

DOCUMENTS = [f"document {n} " * (n % 7 + 1) for n in range(200)]


@pytest.fixture
def tokenizer():
    return train_tokenizer("bpe", DOCUMENTS, vocab_size=280)


def test_a_batch(tokenizer):
    encoded = encode_batch(["one é", "two"], tokenizer)
    ids = [[tokenizer.eos_token_id, *tokenizer(text)["input_ids"]] for text in ("one é", "two")]
    assert encoded.tokens.tolist() == ids[0] + ids[1]
    assert encoded.lengths.tolist() == [len(i) for i in ids]
    assert encoded.bytes.tolist() == [6, 3]
    assert encoded.tokens.dtype == np.uint16
    assert encoded.learnt is None


def test_a_part_of_a_batch(tokenizer):
    encoded = encode_batch(DOCUMENTS, tokenizer)
    chosen = np.arange(len(DOCUMENTS)) % 3 == 1
    expected = encode_batch(DOCUMENTS[1::3], tokenizer)
    part = encoded.part(chosen)
    assert part.tokens.tolist() == expected.tokens.tolist()
    assert part.lengths.tolist() == expected.lengths.tolist()


def test_only_the_assistant_is_learnt(tokenizer):
    tokenizer.chat_template = TEMPLATE
    encoded = encode_batch([MESSAGES, MESSAGES[1:3]], tokenizer)
    learnt = tokenizer.decode(encoded.tokens[encoded.learnt])
    assert learnt == "Hello[end]\nFarewell[end]\nHello[end]\n"
    whole = tokenizer.decode(encoded.tokens[: encoded.lengths[0]], skip_special_tokens=True)
    assert whole == tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    first = encoded.part(np.array([True, False]))
    assert tokenizer.decode(first.tokens[first.learnt]) == "Hello[end]\nFarewell[end]\n"


def test_a_long_text_is_encoded_in_parts(tokenizer, monkeypatch: pytest.MonkeyPatch):
    text = " ".join(f"word{n}" for n in range(500)) + "x" * 500
    whole = encode_batch([text], tokenizer)
    monkeypatch.setattr(encoding, "_LONGEST_PART", 100)
    parts = encode_batch([text], tokenizer)
    assert tokenizer.decode(parts.tokens) == tokenizer.decode(whole.tokens)
    assert parts.lengths.tolist() == [len(parts.tokens)]
    spaced = encode_batch([text.rstrip("x")], tokenizer)  # cut before white space: the same ids
    assert whole.tokens[: len(spaced.tokens) - 2].tolist() == (
        parts.tokens[: len(spaced.tokens) - 2].tolist()
    )


def test_batches_are_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 100)
    monkeypatch.setattr(encoding, "BATCH_DOCUMENTS", 6)
    found = list(batches((text, n) for n, text in enumerate(["x" * 40] * 5 + ["y"] * 10)))
    assert [(len(batch), last) for batch, last in found] == [(3, 2), (6, 8), (6, 14)]


def test_texts_and_conversations_do_not_mix():
    with pytest.raises(DataError, match="holds plain texts and conversations: choose one of them"):
        list(batches([("text", 0), (MESSAGES, 1)]))


def test_the_number_of_workers_changes_nothing(tokenizer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(encoding, "BATCH_DOCUMENTS", 7)
    found = []
    for workers in (0, 2):
        stream = batches((text, n) for n, text in enumerate(DOCUMENTS))
        found.append([
            (last, encoded.tokens.tolist())
            for _, encoded, last in encode_in_order(stream, tokenizer, workers=workers)
        ])  # fmt: skip
    assert found[0] == found[1]
    assert len(found[0]) == 29


def test_workers_do_not_read_far_ahead(tokenizer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(encoding, "BATCH_DOCUMENTS", 1)
    read = []

    def reading():
        for number, text in enumerate(DOCUMENTS):
            read.append(number)
            yield text, number

    stream = encode_in_order(batches(reading()), tokenizer, workers=1)
    next(stream)
    assert len(read) <= 5
    stream.close()


def test_an_error_in_a_worker_is_raised_here(tokenizer):
    from i3lm.errors import TokenizerError

    stream = encode_in_order(batches([("a \ud800", 0)]), tokenizer, workers=1)
    with pytest.raises(TokenizerError, match=r"lone surrogate U\+D800"):
        next(stream)


def test_separator(tokenizer):
    assert separator_ids(tokenizer) == [tokenizer.eos_token_id]
