"""Models whose matrices are held in bfloat16 for inference on a CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from i3lm.inference.loading import hold_weights_in_bf16, make_generator
from tests.models.tiny_i3 import draw_ids, make_model

KINDS = ["rwkv4", "state_space", "v1"]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_rounded_weights(kind: str):
    model = make_model(kind)
    held = hold_weights_in_bf16(copy.deepcopy(model))
    rounded = copy.deepcopy(model)
    low = {name for name, p in held.named_parameters() if p.dtype == torch.bfloat16}
    with torch.no_grad():
        for name, parameter in rounded.named_parameters():
            if name in low:
                parameter.copy_(parameter.bfloat16())
        assert low
        cache, ids = None, draw_ids(2, 9)
        expected = rounded(ids).logits
        for t in range(9):  # few rows: inputs, sums and outputs are float32
            output = held(ids[:, t : t + 1], cache=cache, use_cache=True)
            cache = output.cache
            torch.testing.assert_close(output.logits[:, 0], expected[:, t], rtol=1e-4, atol=1e-4)
        # Many rows: the inputs of products are rounded to 8 bits.
        assert (held(ids).logits - expected).abs().max() < 3e-2 * expected.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_only_matrices_of_linear_maps_are_rounded(kind: str):
    held = hold_weights_in_bf16(make_model(kind))
    for name, parameter in held.named_parameters():
        if parameter.dtype == torch.bfloat16:
            assert parameter.dim() == 2
            assert not name.endswith(("embed_tokens.weight", "embed_positions.weight"))
        else:
            assert parameter.dtype == torch.float32


def test_a_head_that_shares_the_embedding_stays_with_it():
    held = hold_weights_in_bf16(make_model("rwkv4", tie_word_embeddings=True))
    assert held.lm_head.weight is held.model.embed_tokens.weight
    assert held.lm_head.weight.dtype == torch.float32
    assert isinstance(held.lm_head.weight, nn.Parameter)


def test_precision_decides():
    exact = make_generator(make_model("rwkv4"), None, "fp32")
    fast = make_generator(make_model("rwkv4"), None, "bf16")
    assert exact.model.lm_head.weight.dtype == torch.float32
    assert fast.model.lm_head.weight.dtype == torch.bfloat16
    assert fast.precision == "fp32"  # autocast would round the states' inputs too
