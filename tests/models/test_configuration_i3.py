from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from i3lm.models.i3 import I3Config
from i3lm.models.i3.configuration_i3 import expand_layer_pattern

L, F, H = "linear_attention", "full_attention", "hybrid"
TYPES = "linear_attention, full_attention, sliding_attention, hybrid"
FORM = f"is not of the form 'N x TYPE' with TYPE one of {TYPES}"


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("hybrid", [H]),
        ("3 x hybrid", [H, H, H]),
        ("2 x linear_attention, full_attention", [L, L, F]),
        ("linear_attention,full_attention,linear_attention", [L, F, L]),
        ("  2x  full_attention ,1 x hybrid ", [F, F, H]),
        ("10 x linear_attention, 6 x full_attention", [L] * 10 + [F] * 6),
    ],
)
def test_patterns_name_layers_from_the_bottom(pattern: str, expected: list[str]):
    assert expand_layer_pattern(pattern) == expected
    config = I3Config(layer_types=pattern)
    assert config.layer_types == expected
    assert config.num_hidden_layers == len(expected)


@pytest.mark.parametrize(
    ("pattern", "part"),
    [
        ("", ""),
        ("hybrid,", ""),
        ("2 x mamba", "2 x mamba"),
        ("hybrid, 3 linear_attention", "3 linear_attention"),
        ("0 x hybrid", "0 x hybrid"),
        ("-1 x hybrid", "-1 x hybrid"),
        ("hybrid x 2", "hybrid x 2"),
        ("chunked_attention", "chunked_attention"),
    ],
)
def test_a_bad_pattern_is_refused_with_its_part(pattern: str, part: str):
    with pytest.raises(ValueError, match=rf"^{re.escape(f'layer_types: {part!r} {FORM}')}$"):
        expand_layer_pattern(pattern)


def test_positions_end_where_they_are_learned():
    assert I3Config().position_limit == 256
    assert I3Config().rope_parameters is None
    assert I3Config(position_embedding_type="none").position_limit is None
    rope = I3Config(position_embedding_type="rope", rope_parameters={"rope_theta": 500})
    assert rope.position_limit is None
    assert rope.rope_parameters == {"rope_theta": 500, "rope_type": "default"}
    assert I3Config(position_embedding_type="rope").rope_parameters["rope_theta"] == 10_000


def test_defaults_follow_from_each_other():
    config = I3Config(hidden_size=96)
    assert config.layer_types == [L] * 6 + [F] * 2
    assert config.num_hidden_layers == 8
    assert config.intermediate_size == 384
    assert config.recurrence == "rwkv4"
    assert config.model_type == "i3"
    assert I3Config(hidden_size=96, intermediate_size=100).intermediate_size == 100
    assert I3Config(layer_types=[H, F], num_hidden_layers=2).layer_types == [H, F]


WHOLE = "must be a whole number of at least 1"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab_size": 0}, f"vocab_size (0) {WHOLE}"),
        ({"vocab_size": "many"}, f"vocab_size ('many') {WHOLE}"),
        ({"hidden_size": 2.5}, f"hidden_size (2.5) {WHOLE}"),
        ({"hidden_size": -8}, f"hidden_size (-8) {WHOLE}"),
        ({"intermediate_size": 0}, f"intermediate_size (0) {WHOLE}"),
        ({"state_size": 0}, f"state_size (0) {WHOLE}"),
        ({"num_attention_heads": 0}, f"num_attention_heads (0) {WHOLE}"),
        ({"max_position_embeddings": 0}, f"max_position_embeddings (0) {WHOLE}"),
        ({"num_hidden_layers": 0}, f"num_hidden_layers (0) {WHOLE}"),
        ({"low_rank": 0}, "low_rank (0) must be at least 1, or null for none"),
        ({"low_rank": -2}, "low_rank (-2) must be at least 1, or null for none"),
        ({"layer_norm_eps": -1e-5}, "layer_norm_eps (-1e-05) must be a number above 0"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps (0.0) must be a number above 0"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps (nan) must be a number above 0"),
        ({"layer_norm_eps": "small"}, "layer_norm_eps ('small') must be a number above 0"),
        ({"initializer_range": -0.02}, "initializer_range (-0.02) must be a number above 0"),
        (
            {"hidden_size": 512, "num_attention_heads": 5},
            "num_attention_heads (5) must divide hidden_size (512)",
        ),
        (
            {"layer_types": "2 x hybrid", "num_hidden_layers": 3},
            "num_hidden_layers (3) must equal the number of layer_types (2); "
            "leave it out and it follows",
        ),
        (
            {"layer_types": ["chunked_attention"]},
            f"layer_types ('chunked_attention') must be one of {TYPES}",
        ),
        ({"recurrence": "mamba"}, "recurrence ('mamba') must be one of rwkv4, state_space"),
        ({"recurrence": ""}, "recurrence ('') must be one of rwkv4, state_space"),
        ({"initialization": "zeros"}, "initialization ('zeros') must be one of original, rwkv"),
        (
            {"low_rank": 4, "tie_word_embeddings": True},
            "tie_word_embeddings needs a full-rank head: set low_rank to null or untie",
        ),
        (
            {"position_embedding_type": "absolute"},
            "position_embedding_type ('absolute') must be one of learned, rope, none",
        ),
        (
            {"position_embedding_type": "none", "rope_parameters": {"rope_theta": 500.0}},
            "rope_parameters are of no use with position_embedding_type ('none'): set that to "
            "rope, or leave them out",
        ),
        (
            {"position_embedding_type": "rope", "layer_types": "3 x linear_attention"},
            "position_embedding_type 'rope' needs an attention layer, and layer_types has none: "
            "take 'none'",
        ),
        (
            {"position_embedding_type": "rope", "hidden_size": 24},
            "position_embedding_type 'rope' needs an even size per head: hidden_size (24) / "
            "num_attention_heads (8) is 3",
        ),
        (
            {"position_embedding_type": "rope", "rope_parameters": {"rope_theta": 1}},
            "rope_theta (1) must be a number above 1",
        ),
        (
            {
                "position_embedding_type": "rope",
                "rope_parameters": {"rope_theta": 9.0, "rope_type": "dynamic", "factor": 2.0},
            },
            "rope_parameters ({'rope_theta': 9.0, 'rope_type': 'dynamic', 'factor': 2.0}) may "
            "set rope_theta only",
        ),
        (
            {"layer_types": "sliding_attention"},
            "sliding_attention layers need sliding_window: say how many tokens",
        ),
        (
            {"sliding_window": 64},
            "sliding_window (64) is of no use: no layer of layer_types is sliding_attention",
        ),
        (
            {"layer_types": "sliding_attention", "sliding_window": 1},
            "sliding_window (1) must be at least 2",
        ),
    ],
)
def test_a_bad_value_is_refused_with_its_rule(fields: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=rf"^{re.escape(message)}$"):
        I3Config(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"layer_types": "2 x hybrid", "recurrence": "state_space", "low_rank": 4},
        {"tie_word_embeddings": True, "eos_token_id": [1, 2], "pad_token_id": 0},
        {"layer_types": [F, L], "initialization": "original", "intermediate_size": 7},
        {"layer_types": "2 x sliding_attention", "sliding_window": 9},
        {
            "position_embedding_type": "rope",
            "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"},
        },
    ],
)
def test_a_configuration_comes_back_from_a_mapping_and_a_folder(
    fields: dict[str, Any], tmp_path: Path
):
    config = I3Config(**fields)
    again = I3Config.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()
    config.save_pretrained(tmp_path)
    loaded = I3Config.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    for name, value in fields.items():
        if name != "layer_types":
            assert getattr(loaded, name) == value
    assert loaded.layer_types == config.layer_types
