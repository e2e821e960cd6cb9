"""Whole tiny models under torch.compile and torch.export."""

from __future__ import annotations

import pytest
import torch

from tests.models.tiny_i3 import draw_ids, make_model


@pytest.mark.parametrize("kind", ["rwkv4", "state_space"])
def test_a_compiled_forward_gives_the_eager_logits(kind: str):
    model, ids = make_model(kind), draw_ids(2, 9)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        got = compiled(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(got, expected)
