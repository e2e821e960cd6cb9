from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from i3lm.errors import TokenizerError
from i3lm.tokenizers import (
    build_chunk_tokenizer,
    encode_documents,
    read_original_chunk_tokenizer,
    tokenizer_fingerprint,
    train_chunk_tokenizer,
)
from tests.tokenizers.fixtures import CHUNK_FILE, read_chunk_cases, read_chunk_vocabulary

TRIGRAMS = (
    "the and ing ion tio for tha ter hat his ere ent her was "
    "you are not but can all whi one our out whe hav thi wit"
)


# The rule, stated literally: one position after another, nothing looked up in advance.


def aim(text: str, position: int) -> int:
    """How many characters the rule would like to take at ``position``."""
    following = text[position : position + 3]
    if len(following) == 3:
        listed = following in TRIGRAMS.split()
        after_space = text[:position].endswith(" ")
        before_space = text[position + 3 :].startswith(" ")
        if listed or after_space or before_space:
            return 3
    return min(2, len(following))


def literal_ids(text: str, vocabulary: dict[str, int]) -> list[int]:
    text = text.lower()
    ids, position = [], 0
    while position < len(text):
        for length in range(aim(text, position), 0, -1):
            chunk = text[position : position + length]
            if chunk in vocabulary or length == 1:
                break
        ids.append(vocabulary.get(chunk, 0))
        position += length
    return ids


def literal_vocabulary(texts: list[str]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for text in map(str.lower, texts):
        position = 0
        while position < len(text):
            length = aim(text, position)
            counts[text[position : position + length]] += 1
            position += length
    ranked = sorted(counts, key=lambda chunk: (-counts[chunk], chunk))
    return {chunk: index for index, chunk in enumerate(["<UNK>", *ranked])}


# Text with many spaces, trigrams, capitals and expression syntax, and any character besides
# those that the running Python does not know (newer Unicode lower-cases more of them).
PIECES = [*TRIGRAMS.split(), " ", " ", "a", "T", "th", "İ", "Σ", "<UNK>", "\n", "\\", "[]", "^-&"]
TEXTS = st.lists(
    st.sampled_from(PIECES)
    | st.text(alphabet=st.characters(exclude_categories=["Cs", "Cn"]), max_size=4),
    max_size=20,
).map("".join)


@st.composite
def vocabularies(draw: st.DrawFn, text: str) -> dict[str, int]:
    """Any chunks of the text, so that some steps hit, some fall back and some are unknown."""
    lowered = text.lower()
    pieces = [
        lowered[start : start + length]
        for start in range(len(lowered))
        for length in (1, 2, 3)
        if start + length <= len(lowered)
    ]
    chosen = draw(st.lists(st.sampled_from(pieces), unique=True)) if pieces else []
    return {chunk: index for index, chunk in enumerate(["<UNK>", *chosen])}


def test_ids_and_text_are_the_originals():
    tokenizer = read_original_chunk_tokenizer(CHUNK_FILE)
    cases = read_chunk_cases()["cases"]
    assert len(cases) == 326
    for case in cases:
        assert tokenizer.encode(case["text"]) == case["ids"], case["text"]
        assert tokenizer.decode(case["ids"]) == case["decoded"], case["text"]


def test_bulk_encoding_gives_the_originals_ids():
    tokenizer = read_original_chunk_tokenizer(CHUNK_FILE)
    cases = read_chunk_cases()["cases"]
    ids = encode_documents(tokenizer, [case["text"] for case in cases])
    assert ids == [case["ids"] for case in cases]


def test_trained_vocabulary_is_the_originals():
    tokenizer = train_chunk_tokenizer(iter(read_chunk_cases()["corpus"]))
    assert tokenizer.get_vocab() == read_chunk_vocabulary()


@settings(max_examples=300, deadline=None)
@given(st.data(), TEXTS)
def test_encoding_agrees_with_the_literal_rule(data: st.DataObject, text: str):
    vocabulary = data.draw(vocabularies(text))
    assert build_chunk_tokenizer(vocabulary).encode(text) == literal_ids(text, vocabulary)


@settings(max_examples=100, deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=4).filter(any))
@example(["<UNK> <unk>", "<UNK>"])
def test_training_agrees_with_the_literal_rule(texts: list[str]):
    assert train_chunk_tokenizer(texts).get_vocab() == literal_vocabulary(texts)


def test_thousands_of_first_characters():
    """The expression splits large choices; the split must not lose or add a chunk."""
    generator = random.Random(0)
    characters = [chr(code) for code in range(0x4E00, 0x4E00 + 6000)]
    texts = [" ".join("".join(generator.choices(characters, k=5)) for _ in range(400))]
    texts.append("".join(character + "a" for character in characters))
    tokenizer = train_chunk_tokenizer(texts)
    unseen = "".join(generator.choices(characters + [" ", "a"], k=20_000))
    for text in [*texts, unseen]:
        assert tokenizer.encode(text) == literal_ids(text, tokenizer.get_vocab())


def test_the_text_of_the_unknown_token_is_plain_text():
    tokenizer = train_chunk_tokenizer(["<unk> x"])
    ids = tokenizer.encode("<UNK> x")
    assert 0 not in ids
    assert tokenizer.decode(ids) == "<unk> x"
    assert tokenizer.unk_token_id == 0


def test_limited_vocabulary_keeps_the_first_ids():
    corpus = read_chunk_cases()["corpus"]
    first = {chunk: index for chunk, index in read_chunk_vocabulary().items() if index < 40}
    tokenizer = train_chunk_tokenizer(corpus, max_vocab_size=40)
    assert tokenizer.get_vocab() == first
    for text in corpus:
        assert tokenizer.encode(text) == literal_ids(text, first)


def test_limit_without_room_for_a_chunk_is_an_error():
    with pytest.raises(TokenizerError, match=r"max_vocab_size \(1\) must be at least 2"):
        train_chunk_tokenizer(["abc"], max_vocab_size=1)


def test_no_text_is_an_error():
    with pytest.raises(TokenizerError, match="0 characters"):
        train_chunk_tokenizer(iter([]))


def test_round_trip_through_auto_tokenizer(tmp_path: Path):
    tokenizer = read_original_chunk_tokenizer(CHUNK_FILE)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(tokenizer)
    for case in [*read_chunk_cases()["cases"], {"text": "<UNK>", "ids": [0] * 5}]:
        assert loaded.encode(case["text"]) == case["ids"]
        assert loaded.decode(case["ids"]) == case.get("decoded", "<UNK>" * 5)


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [
        ({"a": 0}, "the id of <UNK> is None"),
        ({"<UNK>": 1, "a": 0}, "the id of <UNK> is 1"),
        ({"<UNK>": 0, "a": 2}, "integers 0 to 1"),
        ({"<UNK>": 0, "a": 1, "b": 1}, "integers 0 to 2"),
        ({"<UNK>": 0, "a": "1"}, "integers 0 to 1"),
        ({"<UNK>": 0, "": 1}, "chunk with id 1 is ''"),
        ({"<UNK>": 0, "\ud800": 1}, "chunk with id 1 is '.ud800'"),
    ],
)
def test_impossible_vocabulary_is_an_error(vocabulary: dict[str, Any], message: str):
    with pytest.raises(TokenizerError, match=message):
        build_chunk_tokenizer(vocabulary)


def change(content: dict[str, Any], **changes: Any) -> str:
    return json.dumps({key: value for key, value in (content | changes).items() if value != "drop"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunk_to_idx": "drop"}, "lacks chunk_to_idx"),
        ({"idx_to_chunk": {"0": "<UNK>"}}, "not the reverse"),
        ({"idx_to_chunk": []}, "must be objects"),
        ({"vocab_size": 7}, "188 entries, vocab_size says 7"),
        ({"unk_idx": 3}, r"\('<UNK>', 3\)"),
        ({"chunk_to_idx": {"a": 0}, "idx_to_chunk": {"0": "a"}, "vocab_size": 1}, "id of <UNK>"),
    ],
)
def test_damaged_file_is_an_error(tmp_path: Path, changes: dict[str, Any], message: str):
    path = tmp_path / "tokenizer.json"
    path.write_text(change(json.loads(CHUNK_FILE.read_text()), **changes))
    with pytest.raises(TokenizerError, match=message) as caught:
        read_original_chunk_tokenizer(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_cut_off_file_is_an_error(tmp_path: Path):
    path = tmp_path / "tokenizer.json"
    path.write_text(CHUNK_FILE.read_text()[:1000])
    with pytest.raises(TokenizerError, match="not a JSON file"):
        read_original_chunk_tokenizer(path)


def test_missing_file_is_an_error(tmp_path: Path):
    with pytest.raises(TokenizerError, match=r"nowhere\.json cannot be read"):
        read_original_chunk_tokenizer(tmp_path / "nowhere.json")
