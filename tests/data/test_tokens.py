from __future__ import annotations

import numpy as np
import pytest

from i3lm.data.tokens import ContiguousRows, TokenizedText, separator_ids, tokenize_documents
from i3lm.errors import DataError
from i3lm.tokenizers import train_tokenizer

DOCUMENTS = ["one document", "another", "a third é"]


def stream(length: int) -> TokenizedText:
    return TokenizedText(np.arange(length, dtype=np.uint16), documents=1, bytes=length)


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


def test_rows():
    rows = ContiguousRows(stream(10), 3)
    assert len(rows) == 3
    assert [row["input_ids"].tolist() for row in (rows[0], rows[2])] == [[0, 1, 2], [6, 7, 8]]
    assert [row["labels"].tolist() for row in (rows[0], rows[2])] == [[1, 2, 3], [7, 8, 9]]


def test_rows_of_a_short_stream():
    assert len(ContiguousRows(stream(4), 3)) == 1
    message = r"the text has 3 tokens, and one row needs 4 \(the context length and one more\)"
    with pytest.raises(DataError, match=message):
        ContiguousRows(stream(3), 3)
