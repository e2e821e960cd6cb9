from __future__ import annotations

import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from i3lm.errors import TokenizerError
from i3lm.tokenizers import train_character_tokenizer
from i3lm.tokenizers.pieces import lowercase_like_python

# A vowel sign that later versions of Unicode no longer call case-ignorable.
CHANGED_SINCE_UNICODE_14 = {"\U0001171e"}


def assigned_characters() -> list[str]:
    return [
        chr(code)
        for code in range(sys.maxunicode + 1)
        if unicodedata.category(chr(code)) not in ("Cs", "Cn")
    ]


def test_ids_follow_code_points_after_unknown():
    tokenizer = train_character_tokenizer(["cab", "", "é\n🙂a"])
    assert tokenizer.get_vocab() == {
        "<UNK>": 0, "\n": 1, "a": 2, "b": 3, "c": 4, "é": 5, "🙂": 6,
    }  # fmt: skip


def test_order_and_number_of_texts_do_not_matter():
    one = train_character_tokenizer(["abc", "xyz"])
    other = train_character_tokenizer(iter(["zyx", "b", "ca", "abc"]))
    assert one.get_vocab() == other.get_vocab()


def test_text_comes_back_without_added_spaces():
    text = "To be ,  or not\nto be ?\t'tis 🙂"
    tokenizer = train_character_tokenizer([text])
    ids = tokenizer.encode(text)
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text


def test_unlisted_characters_become_unknown():
    tokenizer = train_character_tokenizer(["ab"])
    assert tokenizer.encode("axb") == [1, 0, 2]
    assert tokenizer.decode([1, 0, 2]) == "a<UNK>b"


def test_the_text_of_the_unknown_token_is_five_characters():
    tokenizer = train_character_tokenizer(["<UNK>"])
    ids = tokenizer.encode("<UNK>")
    assert len(ids) == 5
    assert 0 not in ids


def test_case_is_kept_unless_asked():
    assert "A" in train_character_tokenizer(["A"]).get_vocab()


def test_lowercase_holds_for_vocabulary_and_for_encoding():
    tokenizer = train_character_tokenizer(["ΑΣ İ"], lowercase=True)
    assert set(tokenizer.get_vocab()) == {"<UNK>", *"ας i\u0307"}
    assert tokenizer.decode(tokenizer.encode("ΑΣ İ")) == "ΑΣ İ".lower()


def test_round_trip_through_auto_tokenizer(tmp_path: Path):
    tokenizer = train_character_tokenizer(["hello, World ."], lowercase=True)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("Hello . <UNK>", "WORLD", ""):
        assert loaded.encode(text) == tokenizer.encode(text)
        assert loaded.decode(loaded.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    assert loaded.unk_token_id == 0


@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_no_text_is_an_error(texts: list[str]):
    with pytest.raises(TokenizerError, match="0 characters"):
        train_character_tokenizer(texts)


def test_a_single_string_is_an_error():
    with pytest.raises(TypeError, match=r"\[text\]"):
        train_character_tokenizer("abc")


def test_a_lone_surrogate_is_an_error():
    with pytest.raises(TokenizerError, match=r"text 1 .* U\+D800 at character 2"):
        train_character_tokenizer(["ab", "ab\ud800"])


def test_lowercase_agrees_with_python_on_every_character():
    text = " ".join(assigned_characters())
    assert lowercase_like_python().normalize_str(text) == text.lower()


def test_final_sigma_agrees_with_python_beside_every_character():
    normalize = lowercase_like_python().normalize_str
    for pattern in (" {}Σ ", "A{}Σ ", "AΣ{} ", "AΣ{}A "):
        cases = [
            pattern.format(character)
            for character in assigned_characters()
            if character not in CHANGED_SINCE_UNICODE_14
        ]
        assert normalize("\n".join(cases)) == "\n".join(cases).lower(), pattern


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="ΣσAb1 .'\u0301\u00adªİ", max_size=12))
def test_final_sigma_agrees_with_python_in_any_row(text: str):
    assert lowercase_like_python().normalize_str(text) == text.lower()
