from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from i3lm.data.encoding import separator_ids
from i3lm.data.tokens import join_texts, tokenize_documents
from i3lm.tokenizers import ensure_chat_template, train_tokenizer

DOCUMENTS = ["one document", "another", "a third é"]


def test_separator_with_and_without_an_end_of_text_token():
    bpe = train_tokenizer("bpe", DOCUMENTS, vocab_size=270)
    assert separator_ids(bpe) == [bpe.eos_token_id]
    character = train_tokenizer("character", [*DOCUMENTS, "\n"])
    assert character.decode(separator_ids(character)) == "\n\n"


@pytest.mark.parametrize("kind", ["bpe", "character"])
def test_stream(kind: str):
    tokenizer = train_tokenizer(kind, [*DOCUMENTS, "\n"])
    separator = separator_ids(tokenizer)
    expected = list(separator)
    for document in DOCUMENTS:
        expected += tokenizer(document, add_special_tokens=False)["input_ids"] + separator
    text = tokenize_documents(iter(DOCUMENTS), tokenizer)
    assert text.tokens.tolist() == expected
    assert text.tokens.dtype == np.uint16
    assert text.documents == 3
    assert text.bytes == sum(len(document.encode()) for document in DOCUMENTS)


def test_batches_do_not_change_the_stream():
    tokenizer = train_tokenizer("character", ["abc\n"])
    documents = ["abc"] * 4_100  # more than two batches of encoding
    text = tokenize_documents(documents, tokenizer)
    assert len(text.tokens) == 2 + 4_100 * 5
    assert text.documents == 4_100


def test_where_documents_begin():
    tokenizer = train_tokenizer("character", ["abc\n"])
    text = tokenize_documents(["a", "bc", ""], tokenizer)
    assert tokenizer.decode(text.tokens) == "\n\na\n\nbc\n\n\n\n"
    assert np.flatnonzero(text.begins()).tolist() == [0, 3, 7]


@given(st.lists(st.lists(st.text("abc\n", max_size=4), max_size=4), min_size=1, max_size=4))
def test_joined_texts_are_the_text_of_all_documents(parts: list[list[str]]):
    tokenizer = train_tokenizer("character", ["abc\n"])
    whole = tokenize_documents([document for part in parts for document in part], tokenizer)
    joined = join_texts([tokenize_documents(part, tokenizer) for part in parts], tokenizer)
    assert joined.tokens.tolist() == whole.tokens.tolist()
    assert (joined.documents, joined.bytes) == (whole.documents, whole.bytes)
    assert joined.begins().tolist() == whole.begins().tolist()


def test_only_answers_count_in_conversations():
    talk = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "é"}]
    tokenizer = train_tokenizer("bpe", DOCUMENTS, vocab_size=270)
    ensure_chat_template(tokenizer)
    text = tokenize_documents([talk], tokenizer)
    assert text.learnt is not None
    assert tokenizer.decode(text.tokens[text.learnt]) == f" é{tokenizer.eos_token}"
    assert text.bytes == len(f" é{tokenizer.eos_token}".encode())
    joined = join_texts([tokenize_documents(["abc"], tokenizer), text], tokenizer)
    assert joined.learnt is not None
    assert joined.learnt.sum() == len(joined.tokens) - len(text.tokens) + text.learnt.sum()
