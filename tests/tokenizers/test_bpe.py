from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from i3lm.errors import TokenizerError
from i3lm.tokenizers import train_bpe_tokenizer
from tests.tokenizers.fixtures import read_chunk_cases


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_bpe_tokenizer(iter(read_chunk_cases()["corpus"]), vocab_size=300)


def test_special_tokens_come_first_and_have_their_roles(tokenizer: PreTrainedTokenizerFast):
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3]) == ["<UNK>", "<PAD>", "<BOS>", "<EOS>"]
    assert tokenizer.unk_token_id == 0
    assert tokenizer.pad_token_id == 1
    assert tokenizer.bos_token_id == 2
    assert tokenizer.eos_token_id == 3


def test_vocabulary_has_the_size_asked_for(tokenizer: PreTrainedTokenizerFast):
    assert len(tokenizer) == 300


def test_small_text_gives_a_smaller_vocabulary():
    assert len(train_bpe_tokenizer(["abab"], vocab_size=1000)) < 270


def test_min_frequency_keeps_rare_pairs_apart():
    assert len(train_bpe_tokenizer(["xyz"], vocab_size=300)) == 260
    assert len(train_bpe_tokenizer(["xyz"], vocab_size=300, min_frequency=1)) == 262


def test_frequent_pairs_are_merged(tokenizer: PreTrainedTokenizerFast):
    assert tokenizer.tokenize(" the") == ["Ġthe"]


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_any_text_comes_back(tokenizer: PreTrainedTokenizerFast, text: str):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_encoding_adds_no_token(tokenizer: PreTrainedTokenizerFast):
    assert tokenizer.encode("") == []
    assert tokenizer.encode("a . b") == tokenizer.encode("a . b", add_special_tokens=False)


def test_text_of_a_special_token_is_that_token(tokenizer: PreTrainedTokenizerFast):
    assert tokenizer.encode("<EOS>") == [3]


def test_padding_stands_on_the_left(tokenizer: PreTrainedTokenizerFast):
    batch = tokenizer(["a", "a b c"], padding=True)
    assert batch["input_ids"][0][:2] == [1, 1]
    assert batch["attention_mask"][0][-1] == 1


def test_round_trip_through_auto_tokenizer(tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "It 's here , isn't it ?  <EOS>\n東京 🙂"
    assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.decode(loaded.encode(text)) == text
    assert loaded.special_tokens_map == tokenizer.special_tokens_map
    assert loaded.padding_side == "left"


def test_vocabulary_without_room_for_bytes_is_an_error():
    with pytest.raises(TokenizerError, match=r"vocab_size \(259\) must be at least 260"):
        train_bpe_tokenizer(["abc"], vocab_size=259)
    assert len(train_bpe_tokenizer(["abc"], vocab_size=260)) == 260


def test_no_text_is_an_error():
    with pytest.raises(TokenizerError, match="0 characters"):
        train_bpe_tokenizer(iter([""]), vocab_size=300)


def test_a_lone_surrogate_late_in_the_stream_is_an_error():
    texts = (("fine" if number < 1000 else "\udc80") for number in range(1001))
    with pytest.raises(TokenizerError, match=r"text 1000 .* U\+DC80"):
        train_bpe_tokenizer(texts, vocab_size=300)
