from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM

from i3lm.presets import make_config
from i3lm.training.optimizers import parameter_groups

TINY = {"vocab_size": 32, "hidden_size": 16, "num_attention_heads": 2}


def split(fields: dict) -> tuple[set[str], set[str], set[str]]:
    """The names of all parameters, of those that decay and of those that do not."""
    model = AutoModelForCausalLM.from_config(make_config({**TINY, **fields}))
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, 0.1)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    listed = [names[id(p)] for group in groups for p in group["params"]]
    assert sorted(listed) == sorted(names.values())  # every one in exactly one group
    decayed, kept = ({names[id(p)] for p in group["params"]} for group in groups)
    return set(names.values()), decayed, kept


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
def test_matrices_decay_and_nothing_else(fields: dict):
    _, decayed, kept = split(fields)
    spared = ("embed", "norm", "bias", "time_decay", "time_first", "time_mix_")
    for name in decayed:
        assert not [word for word in spared if word in name.removeprefix("model.layers")], name
    for name in kept:
        leaf = name.rsplit(".", 1)[-1]
        is_matrix = leaf == "weight" and "norm" not in name and "embed" not in name
        assert not is_matrix, name
        assert leaf not in ("lora_A", "lora_B", "B", "C"), name


def test_named_cases():
    _, decayed, kept = split({"layer_types": "linear_attention, full_attention"})
    assert "lm_head.weight" in decayed
    assert "model.embed_tokens.weight" in kept
    _, decayed, kept = split({"layer_types": "full_attention", "tie_word_embeddings": True})
    assert "lm_head.weight" not in decayed
    _, decayed, kept = split({"layer_types": "linear_attention", "recurrence": "state_space"})
    assert any(name.endswith(".A") for name in kept)
    assert any(name.endswith(".B") for name in decayed)


def test_transposed_matrices_of_gpt2_decay():
    fields = {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2}
    model = AutoModelForCausalLM.from_config(make_config({"vocab_size": 32, **fields}))
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, kept = (
        {names[id(p)] for p in group["params"]} for group in parameter_groups(model, 0.1)
    )
    assert "transformer.h.0.attn.c_attn.weight" in decayed
    assert {"transformer.wte.weight", "transformer.wpe.weight"} <= kept


def test_frozen_parameters_are_left_out():
    model = AutoModelForCausalLM.from_config(make_config({**TINY, "layer_types": "full_attention"}))
    model.model.embed_tokens.weight.requires_grad_(False)
    listed = {id(p) for group in parameter_groups(model, 0.1) for p in group["params"]}
    assert id(model.model.embed_tokens.weight) not in listed
