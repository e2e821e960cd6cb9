from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from i3lm.layers import CausalSelfAttention, RotaryEmbedding
from i3lm.layers.attention import rotate
from tests.layers.building import count, draw, with_random_parameters

# Softmax over a few float64 numbers.
EXACT = {"rtol": 1e-10, "atol": 1e-10}


class GrowingStore:
    """Keeps all keys and values it was given."""

    def __init__(self) -> None:
        self.kept: tuple[Tensor, Tensor] | None = None

    def __call__(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if self.kept is not None:
            key = torch.cat([self.kept[0], key], dim=2)
            value = torch.cat([self.kept[1], value], dim=2)
        self.kept = key, value
        return self.kept


@pytest.mark.parametrize("C", [8, 32])
def test_parameter_count(C: int):
    assert count(CausalSelfAttention(C, 4)) == (3 * C * C + 3 * C) + (C * C + C)


@pytest.mark.parametrize(("C", "rank"), [(8, 2), (32, 5)])
def test_parameter_count_of_low_rank(C: int, rank: int):
    expected = 6 * C * rank + 3 * rank + 3 * C + C * C + C
    assert count(CausalSelfAttention(C, 4, rank)) == expected


def test_heads_must_divide_the_width():
    with pytest.raises(
        ValueError, match=r"^num_attention_heads \(5\) must divide hidden_size \(512\)$"
    ):
        CausalSelfAttention(512, 5)


def test_equation():
    layer = with_random_parameters(CausalSelfAttention(6, 2))
    x = draw(1, 5, 6)
    qkv = x @ layer.query_key_value.weight.T + layer.query_key_value.bias
    query, key, value = qkv.split(6, dim=-1)
    heads = []
    for h in (slice(0, 3), slice(3, 6)):
        scores = query[..., h] @ key[..., h].mT / math.sqrt(3)
        scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -math.inf)
        heads.append(scores.softmax(dim=-1) @ value[..., h])
    expected = torch.cat(heads, dim=-1) @ layer.output.weight.T + layer.output.bias
    torch.testing.assert_close(layer(x), expected, **EXACT)


def test_low_rank_is_full_rank_with_a_product_of_matrices():
    narrow = with_random_parameters(CausalSelfAttention(6, 2, rank=2))
    full = CausalSelfAttention(6, 2).double()
    pairs = list(zip(narrow.query_key_value.narrow, narrow.query_key_value.widen, strict=True))
    with torch.no_grad():
        full.query_key_value.weight.copy_(torch.cat([w.weight @ n.weight for n, w in pairs]))
        full.query_key_value.bias.copy_(torch.cat([w(n.bias) for n, w in pairs]))
    full.output = narrow.output
    x = draw(2, 5, 6)
    torch.testing.assert_close(narrow(x), full(x), **EXACT)


@pytest.mark.parametrize("rank", [None, 2])
def test_a_store_gives_what_the_whole_gives(rank: int | None):
    layer = with_random_parameters(CausalSelfAttention(6, 2, rank))
    x = draw(2, 7, 6)
    store = GrowingStore()
    outputs = [layer(x[:, :4], store=store)]
    outputs += [layer(x[:, t : t + 1], store=store) for t in (4, 5, 6)]
    torch.testing.assert_close(torch.cat(outputs, dim=1), layer(x), **EXACT)


def test_a_longer_piece_after_a_store_takes_a_mask():
    layer = with_random_parameters(CausalSelfAttention(6, 2))
    x = draw(2, 7, 6)
    store = GrowingStore()
    causal = torch.ones(7, 7).tril().bool()
    outputs = [layer(x[:, :4], causal[:4, :4], store), layer(x[:, 4:], causal[4:], store)]
    torch.testing.assert_close(torch.cat(outputs, dim=1), layer(x), **EXACT)


@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_a_mask_hides_tokens(kind: str):
    layer = with_random_parameters(CausalSelfAttention(6, 2))
    x = draw(2, 7, 6)
    mask = torch.ones(7, 7).tril().bool()
    mask[:, :3] = False  # the first three are padding
    mask[:3, 0] = True  # which must look somewhere
    if kind == "additive":
        mask = torch.zeros(7, 7, dtype=x.dtype).masked_fill(~mask, -math.inf)
    torch.testing.assert_close(layer(x, mask)[:, 3:], layer(x[:, 3:]), **EXACT)


def test_the_future_does_not_change_the_past():
    layer = with_random_parameters(CausalSelfAttention(6, 2))
    x = draw(2, 9, 6)
    before = layer(x)
    x[:, 5:] += 1
    torch.testing.assert_close(layer(x)[:, :5], before[:, :5], **EXACT)


@pytest.mark.parametrize("theta", [10_000.0, 300.0])
def test_rotary_positions_are_those_of_transformers(theta: float):
    config = LlamaConfig(
        hidden_size=24, num_attention_heads=3, rope_parameters={"rope_theta": theta}
    )
    query, key = draw(2, 3, 7, 8).float(), draw(2, 3, 7, 8).float()
    positions = torch.tensor([[0, 1, 2, 3, 50, 51, 400], [0, 0, 0, 1, 2, 3, 4]])
    cosine, sine = LlamaRotaryEmbedding(config)(query, positions)
    expected = apply_rotary_pos_emb(query, key, cosine, sine)
    rotation = RotaryEmbedding(8, theta)(positions)
    for ours, theirs in zip(
        (rotate(query, rotation), rotate(key, rotation)), expected, strict=True
    ):
        # They compute the angles in float32: 400 is known to 3e-5.
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_scores_of_rotary_positions_depend_on_distance_alone_millions_of_tokens_on():
    rotary = RotaryEmbedding(8, 10_000.0)
    query, key = draw(1, 1, 1, 8).float(), draw(1, 1, 1, 8).float()
    scores = []
    for start in (0, 100_000, 50_000_000):
        rotations = [rotary(torch.tensor([[start + distance]])) for distance in (0, 9)]
        scores.append((rotate(key, rotations[0]) * rotate(query, rotations[1])).sum())
    # float32 sums of eight products; angles in float32 would be off by 4 at the last.
    torch.testing.assert_close(torch.stack(scores), scores[0].expand(3), rtol=1e-5, atol=1e-5)


def test_rotation_keeps_the_precision_of_its_input():
    layer = with_random_parameters(CausalSelfAttention(6, 1)).bfloat16()
    x, rotary = draw(1, 4, 6).bfloat16(), RotaryEmbedding(6, 100.0).bfloat16()
    assert layer(x, rotation=rotary(torch.arange(4)[None])).dtype == torch.bfloat16
