from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import BertTokenizer, PreTrainedTokenizerFast

import i3lm.tokenizers
from i3lm.errors import TokenizerError
from i3lm.tokenizers import (
    build_chunk_tokenizer,
    encode_documents,
    load_tokenizer,
    lowercases,
    read_original_chunk_tokenizer,
    tokenizer_fingerprint,
    train_bpe_tokenizer,
    train_character_tokenizer,
    train_tokenizer,
)
from tests.tokenizers.fixtures import (
    BARE_BPE_FOLDER,
    CHUNK_FILE,
    read_chunk_cases,
    read_chunk_vocabulary,
)

CORPUS = read_chunk_cases()["corpus"]


def test_public_names_are_sorted_and_exist():
    names = i3lm.tokenizers.__all__
    assert names == sorted(names)
    assert all(hasattr(i3lm.tokenizers, name) for name in names)


def test_importing_is_cheap():
    code = "import sys, i3lm.tokenizers; print({'torch', 'transformers'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "set()", result.stderr


# load_tokenizer


@pytest.mark.parametrize("kind", ["bpe", "chunk", "character"])
def test_saved_folder_loads_as_it_was(kind: str, tmp_path: Path):
    tokenizer = train_tokenizer(kind, CORPUS)
    tokenizer.save_pretrained(tmp_path)
    # A model's config.json lies in the same folder; its type is unknown to transformers.
    (tmp_path / "config.json").write_text('{"model_type": "i3"}')
    for path in (tmp_path, str(tmp_path), tmp_path / "tokenizer.json"):
        loaded = load_tokenizer(path)
        assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(tokenizer)
        assert encode_documents(loaded, CORPUS) == encode_documents(tokenizer, CORPUS)


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json", "chunk_vocab_combined.json"])
def test_original_chunk_tokenizer_loads_from_file_and_folder(name: str, tmp_path: Path):
    shutil.copyfile(CHUNK_FILE, tmp_path / name)
    for path in (tmp_path, tmp_path / name):
        assert load_tokenizer(path).get_vocab() == read_chunk_vocabulary()


def test_bare_tokenizer_json_loads_with_its_special_tokens():
    for path in (BARE_BPE_FOLDER, BARE_BPE_FOLDER / "tokenizer.json"):
        tokenizer = load_tokenizer(path)
        assert tokenizer.unk_token_id == 0
        assert tokenizer.pad_token_id == 1
        assert tokenizer.bos_token_id == 2
        assert tokenizer.eos_token_id == 3
        text = "the wind is strong ."
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_in_brackets_are_recognised(tmp_path: Path):
    content = (BARE_BPE_FOLDER / "tokenizer.json").read_text()
    for old, new in (("<UNK>", "[UNK]"), ("<BOS>", "<CLS>"), ("<EOS>", "[MASK]")):
        content = content.replace(old, new)
    (tmp_path / "tokenizer_bert.json").write_text(content)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.special_tokens_map == {
        "unk_token": "[UNK]",
        "pad_token": "<PAD>",
        "cls_token": "<CLS>",
        "mask_token": "[MASK]",
    }


def test_folder_without_tokenizer_is_an_error(tmp_path: Path):
    with pytest.raises(TokenizerError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)


def test_path_to_nothing_is_an_error(tmp_path: Path):
    with pytest.raises(TokenizerError, match=r"there is no tokenizer at .*nothing"):
        load_tokenizer(tmp_path / "nothing")


def test_file_that_is_no_tokenizer_is_an_error(tmp_path: Path):
    path = tmp_path / "some.json"
    for content, message in (
        ('{"a": 1}', "is not a tokenizer that can be read"),
        ("[]", "holds a JSON list"),
        ("text", "not a JSON file"),
    ):
        path.write_text(content)
        with pytest.raises(TokenizerError, match=message) as caught:
            load_tokenizer(path)
        assert "\n" not in str(caught.value)


def test_damaged_folder_is_an_error(tmp_path: Path):
    train_tokenizer("character", ["abc"]).save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text()[:200])
    with pytest.raises(TokenizerError, match=r"cannot be loaded .* damaged") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["no-such-owner/no-such-tokenizer", "no-such-tokenizer"])
def test_hub_name_offline_is_an_error_of_one_line(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = f"'{name}' cannot be loaded .* no such path"
    with pytest.raises(TokenizerError, match=message) as caught:
        load_tokenizer(name)
    assert "\n" not in str(caught.value)


# train_tokenizer


def test_kinds_are_trained_from_a_stream():
    assert train_tokenizer("bpe", iter(CORPUS), vocab_size=300).eos_token == "<EOS>"
    assert train_tokenizer("chunk", iter(CORPUS)).get_vocab() == read_chunk_vocabulary()
    assert len(train_tokenizer("chunk", iter(CORPUS), vocab_size=9)) == 9
    assert train_tokenizer("character", iter(["ba"])).get_vocab() == {"<UNK>": 0, "a": 1, "b": 2}


def test_unknown_kind_is_an_error_that_names_the_choices():
    with pytest.raises(TokenizerError, match=r"'words' is unknown: .* bpe, chunk, character,"):
        train_tokenizer("words", ["abc"])


def test_size_for_the_character_tokenizer_is_an_error():
    with pytest.raises(TokenizerError, match=r"vocab_size \(64\) does not apply"):
        train_tokenizer("character", ["abc"], vocab_size=64)


# encode_documents


def test_bulk_encoding_is_the_ordinary_encoding():
    tokenizer = train_bpe_tokenizer(CORPUS, vocab_size=300)
    texts = [*CORPUS, "", "ends with <EOS>"]
    expected = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    assert encode_documents(tokenizer, texts) == expected
    assert encode_documents(tokenizer, []) == []


def test_bulk_encoding_neither_cuts_nor_pads_nor_warns(caplog: pytest.LogCaptureFixture):
    tokenizer = train_character_tokenizer(["abc"])
    tokenizer.model_max_length = 4
    tokenizer.pad_token = "a"
    tokenizer(["abcabc", "a"], padding=True, truncation=True)  # leaves both switched on
    assert encode_documents(tokenizer, ["abcabc", "a"]) == [[1, 2, 3, 1, 2, 3], [1]]
    assert not caplog.records


def test_bulk_encoding_adds_no_special_tokens(tmp_path: Path):
    words = tmp_path / "vocab.txt"
    words.write_text("[UNK]\n[PAD]\n[CLS]\n[SEP]\n[MASK]\nhello\n")
    tokenizer = BertTokenizer(str(words))
    assert encode_documents(tokenizer, ["hello hello"]) == [[5, 5]]


def test_bulk_encoding_names_the_text_that_is_not_unicode():
    tokenizer = train_character_tokenizer(["abc"])
    with pytest.raises(TokenizerError, match=r"text 1 holds the lone surrogate U\+D800"):
        encode_documents(tokenizer, ["abc", "\ud800"])


# tokenizer_fingerprint, lowercases


def test_fingerprint_is_stable_and_ignores_the_order_of_the_vocabulary():
    vocabulary = read_chunk_vocabulary()
    backwards = dict(reversed(vocabulary.items()))
    fingerprint = tokenizer_fingerprint(build_chunk_tokenizer(vocabulary))
    assert len(fingerprint) == 64
    assert fingerprint == tokenizer_fingerprint(build_chunk_tokenizer(backwards))
    assert fingerprint == tokenizer_fingerprint(read_original_chunk_tokenizer(CHUNK_FILE))


def test_fingerprint_ignores_what_an_encoding_call_leaves_behind():
    tokenizer = train_bpe_tokenizer(CORPUS, vocab_size=300)
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["a", "abc"], padding=True, truncation=True, max_length=2)
    assert tokenizer_fingerprint(tokenizer) == before


def changed_id(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    vocabulary = tokenizer.get_vocab()
    vocabulary[" t"], vocabulary[" w"] = vocabulary[" w"], vocabulary[" t"]
    return build_chunk_tokenizer(vocabulary)


def changed_end(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    tokenizer.eos_token = tokenizer.unk_token
    return tokenizer


def changed_splitting(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    tokenizer.split_special_tokens = False
    return tokenizer


@pytest.mark.parametrize("change", [changed_id, changed_end, changed_splitting])
def test_fingerprint_sees_a_change_of_behaviour(change):
    tokenizer = read_original_chunk_tokenizer(CHUNK_FILE)
    before = tokenizer_fingerprint(tokenizer)
    assert tokenizer_fingerprint(change(tokenizer)) != before


def test_fingerprint_is_the_same_in_another_process():
    code = (
        "import sys; from i3lm.tokenizers import *;"
        "print(tokenizer_fingerprint(read_original_chunk_tokenizer(sys.argv[1])))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(CHUNK_FILE)], capture_output=True, text=True
    )
    here = tokenizer_fingerprint(read_original_chunk_tokenizer(CHUNK_FILE))
    assert result.stdout.strip() == here, result.stderr


def test_lowercasing_is_recognised():
    assert lowercases(read_original_chunk_tokenizer(CHUNK_FILE))
    assert lowercases(train_character_tokenizer(["abc"], lowercase=True))
    assert not lowercases(train_character_tokenizer(["abc"]))
    assert not lowercases(train_bpe_tokenizer(CORPUS, vocab_size=300))
