from __future__ import annotations

from pathlib import Path

import pytest
import torch

from i3lm import I3Config, I3ForCausalLM
from i3lm.data.sources import read_documents
from i3lm.data.split import is_held_out
from i3lm.errors import ConfigurationError, KernelError, TokenizerError
from i3lm.ops.dispatch import use_implementation
from i3lm.presets import Preset
from i3lm.tokenizers import lowercases, train_tokenizer
from i3lm.training.build import (
    Starting,
    choose_kernels,
    make_model,
    make_tokenizer,
    resolve_start,
)
from i3lm.training.options import DataOptions, ModelOptions, TokenizerOptions

DATA = DataOptions(source="stories", size=60, held_out_fraction=0.3)
START = Starting(Preset("new model"), None)


def test_tokenizer_sees_the_training_part_only(tmp_path: Path):
    texts = [f"number {n} {chr(0x4E00 + n)}" for n in range(40)]
    (tmp_path / "text.txt").write_text("\n<|endoftext|>\n".join(texts))
    data = DataOptions(source=str(tmp_path / "text.txt"), held_out_fraction=0.5)
    vocabulary = make_tokenizer(TokenizerOptions("character"), START, data).get_vocab()
    for text in texts:
        assert (text[-1] in vocabulary) == (not is_held_out(text, 0.5))


def test_tokenizer_is_trained_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = make_tokenizer(TokenizerOptions("character"), START, DATA)
    monkeypatch.setattr("i3lm.training.build.train_character_tokenizer", None)
    again = make_tokenizer(TokenizerOptions("character"), START, DATA)
    assert again.get_vocab() == first.get_vocab()


def test_cache_that_cannot_be_written_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(make_tokenizer(TokenizerOptions("character"), START, DATA)) > 20


@pytest.mark.parametrize(("lowercase", "expected"), [(True, True), (None, True), (False, False)])
def test_lowercase_follows_the_preset_unless_told(lowercase: bool | None, expected: bool):
    start = Starting(Preset("lower", tokenizer="character", lowercase=True), None)
    tokenizer = make_tokenizer(TokenizerOptions(lowercase=lowercase), start, DATA)
    assert lowercases(tokenizer) == expected


def test_preset_wins_over_a_folder_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("i3-tiny").mkdir()
    assert resolve_start(ModelOptions("i3-tiny")).checkpoint is None


def test_preset_with_changes():
    start = resolve_start(ModelOptions("i3-tiny", {"num_attention_heads": 1}))
    assert start.preset.config().num_attention_heads == 1
    with pytest.raises(ConfigurationError, match=r"i3-tiny with model.config: unknown key 'x'"):
        resolve_start(ModelOptions("i3-tiny", {"x": 1}))


def test_model_follows_the_tokenizer():
    tokenizer = train_tokenizer("bpe", read_documents("stories", size=60), vocab_size=280)
    fields = {"hidden_size": 16, "num_attention_heads": 2, "layer_types": "full_attention"}
    start = resolve_start(ModelOptions(config={**fields, "vocab_size": 5}))
    model = make_model(start, tokenizer, seed=1)
    assert model.config.vocab_size == len(tokenizer) == 280
    assert model.config.eos_token_id == tokenizer.eos_token_id
    same, other = (make_model(start, tokenizer, seed=seed) for seed in (1, 2))
    weight = model.lm_head.weight
    assert weight.equal(same.lm_head.weight)
    assert not weight.equal(other.lm_head.weight)


def test_tokenizer_must_fit_the_checkpoint(tiny_run: Path):
    start = resolve_start(ModelOptions(str(tiny_run)))
    assert start.checkpoint == tiny_run / "best"
    tokenizer = train_tokenizer("bpe", read_documents("stories", size=60), vocab_size=300)
    with pytest.raises(TokenizerError, match=r"has 300 tokens, but the model's vocab_size is \d+"):
        make_model(start, tokenizer, seed=0)


def test_slow_kernels_are_refused_where_asked_for():
    config = I3Config(vocab_size=9, hidden_size=8, layer_types=["linear_attention", "attention"])
    model, device = I3ForCausalLM(config), torch.device("cpu")
    assert [name for _, name, _ in choose_kernels(model, device, strict=True)] == ["numba"]
    with use_implementation(wkv="scan"):
        assert [name for _, name, _ in choose_kernels(model, device, strict=False)] == ["scan"]
        message = r"wkv would run as scan on cpu .*training.strict_kernels is set: leave it out"
        with pytest.raises(KernelError, match=message):
            choose_kernels(model, device, strict=True)
