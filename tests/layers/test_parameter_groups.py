from __future__ import annotations

import pytest
from torch import nn
from transformers import AutoModelForCausalLM

from i3lm.layers import parameter_groups
from i3lm.presets import make_config

TINY = {"vocab_size": 32, "hidden_size": 16, "num_attention_heads": 2}
Roles = dict[str, set[str]]


def named_groups(fields: dict) -> Roles:
    """The names of a model's parameters, by the role that they are given."""
    model = AutoModelForCausalLM.from_config(make_config({**TINY, **fields}))
    names = {id(p): name for name, p in model.named_parameters()}
    groups = model.parameter_groups(0.1)
    listed = [names[id(p)] for group in groups for p in group["params"]]
    assert sorted(listed) == sorted(names.values())  # every one in exactly one group
    for group in groups:
        assert group["weight_decay"] == (0.0 if group["role"] == "other" else 0.1)
    found = {group["role"]: {names[id(p)] for p in group["params"]} for group in groups}
    return {"head": set()} | found


@pytest.mark.parametrize(
    "fields",
    [
        {"layer_types": "linear_attention, full_attention"},
        {"layer_types": "linear_attention, full_attention", "tie_word_embeddings": True},
        {"layer_types": "linear_attention, full_attention", "recurrence": "state_space"},
        {"layer_types": "2 x hybrid", "recurrence": "state_space", "low_rank": 4},
        {"layer_types": "2 x hybrid", "recurrence": "rwkv4"},
    ],
    ids=["rwkv4", "tied", "state_space", "low_rank", "hybrid"],
)
def test_matrices_of_the_layers_the_head_and_the_rest(fields: dict):
    groups = named_groups(fields)
    spared = ("embed", "norm", "bias", "time_decay", "time_first", "time_mix_")
    for name in groups["matrix"] | groups["head"]:
        assert not [word for word in spared if word in name.removeprefix("model.layers")], name
    for name in groups["other"]:
        leaf = name.rsplit(".", 1)[-1]
        is_matrix = leaf == "weight" and "norm" not in name and "embed" not in name
        assert not is_matrix, name
        assert leaf not in ("lora_A", "lora_B", "B", "C"), name
    assert all(name.startswith("lm_head.") for name in groups["head"])
    assert not [name for name in groups["matrix"] if name.startswith("lm_head.")]


def test_named_cases():
    groups = named_groups({"layer_types": "linear_attention, full_attention"})
    assert groups["head"] == {"lm_head.weight"}
    assert "model.embed_tokens.weight" in groups["other"]
    assert "model.layers.1.mixer.query_key_value.weight" in groups["matrix"]
    groups = named_groups({"layer_types": "full_attention", "tie_word_embeddings": True})
    assert groups["head"] == set()
    assert "model.embed_tokens.weight" in groups["other"]
    groups = named_groups({"layer_types": "linear_attention", "recurrence": "state_space"})
    assert {"model.layers.0.mixer.A", "model.layers.0.mixer.D"} <= groups["other"]
    assert {"model.layers.0.mixer.B", "model.layers.0.mixer.C"} <= groups["matrix"]
    groups = named_groups({"layer_types": "full_attention", "low_rank": 4})
    assert groups["head"] == {"lm_head.lora_A", "lm_head.lora_B"}


def test_frozen_parameters_are_left_out():
    model = AutoModelForCausalLM.from_config(make_config({**TINY, "layer_types": "full_attention"}))
    model.model.embed_tokens.weight.requires_grad_(False)
    listed = {id(p) for group in model.parameter_groups(0.1) for p in group["params"]}
    assert id(model.model.embed_tokens.weight) not in listed


def test_a_plain_module_without_a_head():
    module = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    groups = parameter_groups(module, 0.3)
    assert [(g["role"], g["weight_decay"], len(g["params"])) for g in groups] == [
        ("matrix", 0.3, 1), ("other", 0.0, 3),
    ]  # fmt: skip
