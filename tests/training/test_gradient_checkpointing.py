from __future__ import annotations

from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM

from i3lm.errors import ConfigurationError
from i3lm.presets import make_config
from i3lm.training.gradient_checkpointing import checkpoint_gradients

TINY = {"vocab_size": 16, "hidden_size": 8, "num_attention_heads": 2}
KINDS = "linear_attention, full_attention, sliding_attention, hybrid"


def make_model(**fields: object):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(make_config({**TINY, **fields}))


def count(passes: list[int], index: int, *_) -> None:
    passes[index] += 1


@pytest.mark.parametrize(
    ("which", "expected"),
    [
        (False, [1, 1, 1, 1]),
        (True, [2, 2, 2, 2]),
        ("attention", [1, 2, 2, 2]),
        ("recurrent", [2, 1, 1, 2]),
    ],
)
def test_layers_of_the_kind_are_computed_twice_with_the_same_gradients(which, expected: list[int]):
    gradients = []
    for choice in (False, which):
        model = make_model(
            layer_types=KINDS, sliding_window=4, recurrence="state_space", state_size=4
        ).train()
        checkpoint_gradients(model, choice)
        passes = [0] * 4
        for index, layer in enumerate(model.model.layers):
            layer.mixer_norm.register_forward_hook(partial(count, passes, index))
        ids = torch.arange(12).view(2, 6)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert passes == expected
    assert all(a.equal(b) for a, b in zip(*gradients, strict=True))


def test_a_kind_that_is_not_there():
    with pytest.raises(ConfigurationError, match=r"\(recurrent\): the model has no recurrent"):
        checkpoint_gradients(make_model(layer_types="2 x full_attention"), "recurrent")
