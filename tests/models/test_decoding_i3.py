"""Decoding through the cache is the full pass, whatever the cuts, paddings, states and beams."""

from __future__ import annotations

import copy
from functools import lru_cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from i3lm.models.i3 import I3Cache, I3ForCausalLM
from i3lm.models.i3.cache_i3 import read_state, write_state
from tests.models.tiny_i3 import KINDS, draw_ids, make_model

# float32 logits of size 1 to 10 through three layers, summed in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}

model_of = lru_cache(make_model)
every_kind = pytest.mark.parametrize("kind", KINDS)


@st.composite
def texts(draw: st.DrawFn) -> dict:
    """A batch of padded texts, where to cut it, and how to reorder it at every cut."""
    B, T = draw(st.integers(1, 4)), draw(st.integers(2, 24))
    cuts = sorted(draw(st.sets(st.integers(1, T - 1))))
    rows = st.lists(st.integers(0, B - 1), min_size=B, max_size=B)
    return {
        "padding": torch.tensor([draw(st.integers(0, T - 1)) for _ in range(B)]),
        "sizes": [b - a for a, b in zip([0, *cuts], [*cuts, T], strict=True)],
        "orders": [torch.tensor(draw(rows)) for _ in cuts],
        "seed": draw(st.integers(0, 2**16)),
        "starts_with_a_state": draw(st.booleans()),
    }


def draw_states(model: I3ForCausalLM, B: int, seed: int) -> I3Cache:
    """A cache whose recurrent layers remember a random past, and whose attention has none."""
    torch.manual_seed(seed)
    past = model(inputs_embeds=torch.randn(B, 7, 12), use_cache=True).cache
    cache = I3Cache(model.config)
    for index, layer in enumerate(past.layers):
        for slot in range(len(getattr(layer, "recurrent_states", ()))):
            state = read_state(past, index, slot)
            if state is not None:
                write_state(cache, index, slot, state)
    assert cache.get_seq_length() == 0
    return cache


@every_kind
@settings(max_examples=20, deadline=None, derandomize=True)
@given(text=texts())
@torch.no_grad()
def test_pieces_and_reordered_rows_give_the_full_pass(kind: str, text: dict):
    model, padding, sizes = model_of(kind), text["padding"], text["sizes"]
    B, T = len(padding), sum(sizes)
    ids = draw_ids(B, T, seed=text["seed"])
    mask = (torch.arange(T) >= padding[:, None]).long()
    start = I3Cache(model.config)
    if text["starts_with_a_state"]:
        start = draw_states(model, B, text["seed"])

    # As a beam search does: rows are exchanged between steps, with all that they have read.
    cache, row, seen = copy.deepcopy(start), torch.arange(B), 0
    pieces: list[Tensor] = []
    for size, order in zip(sizes, [*text["orders"], None], strict=True):
        end = seen + size
        output = model(ids[row, seen:end], attention_mask=mask[row, :end], cache=cache)
        pieces.append(output.logits)
        if order is not None:
            cache.reorder_cache(order)
            pieces, row = [piece[order] for piece in pieces], row[order]
        seen = end
    decoded = torch.cat(pieces, dim=1)

    start.reorder_cache(row)
    whole = model(ids[row], attention_mask=mask[row], cache=start).logits
    real = mask[row].bool()
    torch.testing.assert_close(decoded[real], whole[real], **CLOSE)


@every_kind
@settings(max_examples=15, deadline=None, derandomize=True)
@given(text=texts())
@torch.no_grad()
def test_padding_changes_nothing(kind: str, text: dict):
    model, padding = model_of(kind), text["padding"]
    T = sum(text["sizes"])
    ids = draw_ids(len(padding), T, seed=text["seed"])
    mask = (torch.arange(T) >= padding[:, None]).long()
    together = model(ids, attention_mask=mask).logits
    for row, start in enumerate(padding.tolist()):
        alone = model(ids[row : row + 1, start:]).logits
        torch.testing.assert_close(together[row : row + 1, start:], alone, **CLOSE)
