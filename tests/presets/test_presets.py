from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from i3lm.errors import ConfigurationError
from i3lm.models.i3 import I3Config
from i3lm.planning import count_parameters
from i3lm.presets import list_presets, load_preset, make_config

# Published numbers where there are any, and the arithmetic of the published shape elsewhere.
PARAMETERS = {
    "i3-tiny": 711_106,
    "i3-12m": 12_691_186,
    "i3-22m": 22_640_626,
    "i3-80m": 76_861_160,
    "i3-200m": 169_847_552,
    "i3-ethan-base": 170_437_376,
    "i3-1b": 1_106_697_472,
}

MINIMAL = """
model:
  vocab_size: 50
  hidden_size: 16
  layer_types: 2 x linear_attention, full_attention
  num_attention_heads: 2
"""


def write(folder: Path, text: str, name: str = "mine.yaml") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_are_those_of_the_family(name: str):
    assert count_parameters(load_preset(name).config()) == PARAMETERS[name]


@pytest.mark.parametrize(
    ("name", "changes", "parameters"),
    [
        ("i3-80m", {"vocab_size": 41_320}, 82_765_160),  # the size of the published checkpoint
        ("i3-200m", {"max_position_embeddings": 512}, 170_044_160),  # the released code's default
    ],
)
def test_parameter_counts_of_the_variants(name: str, changes: dict[str, Any], parameters: int):
    assert count_parameters(load_preset(name).config(**changes)) == parameters


def test_presets_are_listed_from_the_smallest_and_all_load():
    names = list_presets()
    assert set(PARAMETERS) <= set(names)
    known = [name for name in names if name in PARAMETERS]
    assert known == list(PARAMETERS)
    for name in names:
        preset = load_preset(name)
        assert preset.name == name
        assert preset.description
        assert preset.tokenizer in ("bpe", "chunk", "character")
        assert isinstance(preset.config(), I3Config)


def test_published_members_start_as_the_original_does():
    for name in PARAMETERS:
        assert load_preset(name).config().initialization == "original"


def test_only_i3_tiny_lower_cases_its_characters():
    assert load_preset("i3-tiny").tokenizer == "character"
    assert load_preset("i3-tiny").lowercase
    assert not load_preset("i3-200m").lowercase


def test_a_users_file_is_an_equal_citizen(tmp_path: Path):
    preset = load_preset(write(tmp_path, MINIMAL + "description: small\ntokenizer: chunk\n"))
    assert (preset.name, preset.description, preset.tokenizer) == ("mine", "small", "chunk")
    config = preset.config(hidden_size=24)
    assert config.hidden_size == 24
    assert config.vocab_size == 50
    assert config.layer_types == ["linear_attention", "linear_attention", "full_attention"]
    assert load_preset(write(tmp_path, "name: other\n" + MINIMAL, "a.yml")).name == "other"


def test_a_published_preset_is_not_changed_by_an_override():
    preset = load_preset("i3-tiny")
    preset.config(vocab_size=99)
    assert preset.config().vocab_size == 34


def test_another_architecture_trains_in_the_same_loop(tmp_path: Path):
    text = "model:\n  model_type: gpt2\n  n_embd: 12\n  n_layer: 2\n  n_head: 3\n  vocab_size: 31\n"
    config = load_preset(write(tmp_path, text)).config(n_positions=16)
    assert config.model_type == "gpt2"
    assert (config.hidden_size, config.vocab_size, config.n_positions) == (12, 31, 16)
    # GPT-2: (V + T) C + L (12 C^2 + 13 C) + 2 C, the head tied.
    assert count_parameters(config) == (31 + 16) * 12 + 2 * (12 * 144 + 13 * 12) + 24


def refused(source: str) -> str:
    with pytest.raises(ConfigurationError) as caught:
        load_preset(source).config()
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_an_unknown_preset_is_refused_with_the_known_ones():
    message = refused("i3-12M")
    assert message.startswith("unknown preset 'i3-12M': use one of i3-tiny, i3-12m, ")
    assert message.endswith("the path of a YAML file, or a checkpoint folder")


def test_a_missing_file_is_refused(tmp_path: Path):
    path = str(tmp_path / "none.yaml")
    assert refused(path) == f"{path}: no such file; give the path of a YAML preset"


@pytest.mark.parametrize("text", ["model: [1, 2", "a: b: c", "\tmodel:\n"])
def test_bad_yaml_is_refused_in_one_line(tmp_path: Path, text: str):
    path = write(tmp_path, text)
    assert refused(path).startswith(f"{path}: not readable as YAML: ")


def test_bytes_that_are_no_text_are_refused(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"model: \xff\xfe")
    assert refused(str(path)).startswith(f"{path}: not readable as YAML: ")


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "folder.yaml").mkdir()
    path = str(tmp_path / "folder.yaml")
    way_out = "give the path of a YAML preset"
    assert refused(path) == f"{path}: cannot be read (Is a directory); {way_out}"

    def refuse(*arguments, **settings):
        raise PermissionError(13, "Permission denied")

    path = write(tmp_path, MINIMAL)
    monkeypatch.setattr(Path, "read_text", refuse)
    assert refused(path) == f"{path}: cannot be read (Permission denied); {way_out}"


@pytest.mark.parametrize("text", ["", "[1, 2]", "model: 3", "description: nothing"])
def test_a_file_without_a_model_is_refused(tmp_path: Path, text: str):
    path = write(tmp_path, text)
    assert refused(path) == f"{path}: a preset is a mapping with a `model` mapping in it"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MINIMAL + "tokeniser: bpe\n", "{path}: unknown key 'tokeniser'; did you mean "
            "'tokenizer'?"),
        (MINIMAL + "  hiden_size: 8\n", "preset mine: unknown key 'hiden_size'; did you mean "
            "'hidden_size'?"),
        (MINIMAL + "  model_type: gtp2\n", "preset mine: model_type 'gtp2' is unknown: use i3, "
            "or a causal model that transformers knows, such as gpt2 or llama"),
        (MINIMAL + "  model_type: t5\n", "preset mine: model_type 't5' is no causal model: use i3, "
            "or a causal model that transformers knows, such as gpt2 or llama"),
        ("model: {model_type: gpt2, n_embd: 1.5}", "preset mine: Validation error for field "
            "'n_embd': TypeError: Field 'n_embd' expected int, got float (value: 1.5)"),
        (MINIMAL + "tokenizer: [bpe]\n", "{path}: tokenizer (['bpe']) must be a text"),
        (MINIMAL + "lowercase: 3\n", "{path}: lowercase (3) must be true or false"),
        (MINIMAL + "  low_rank: 0\n", "preset mine: low_rank (0) must be at least 1, or null for "
            "none"),
        (MINIMAL.replace("heads: 2", "heads: 3"), "preset mine: num_attention_heads (3) must "
            "divide hidden_size (16)"),
    ],
)  # fmt: skip
def test_a_bad_field_is_refused_with_its_rule(tmp_path: Path, text: str, message: str):
    path = write(tmp_path, text)
    assert refused(path) == message.format(path=path)


def test_a_key_like_no_other_is_refused_with_all_known_ones(tmp_path: Path):
    path = write(tmp_path, MINIMAL + "zzz: 1\n")
    expected = f"{path}: unknown key 'zzz'; known: name, description, tokenizer, lowercase, model"
    assert refused(path) == expected


def test_a_key_of_an_i3_model_is_unknown_to_another_architecture():
    with pytest.raises(ConfigurationError, match=re.escape("here: unknown key 'low_rank'; ")):
        make_config({"model_type": "gpt2", "low_rank": 3}, where="here")


def test_the_callers_fields_are_left_alone():
    fields = {"model_type": "i3", "hidden_size": 16}
    make_config(fields)
    assert fields == {"model_type": "i3", "hidden_size": 16}
