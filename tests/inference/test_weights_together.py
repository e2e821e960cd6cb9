"""Models whose weights lie in one block of memory for inference on a CPU."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from i3lm.device import empty_in_large_pages
from i3lm.inference.loading import hold_weights_in_bf16, hold_weights_together, make_generator
from tests.models.tiny_i3 import draw_ids, make_model

KINDS = ["rwkv4", "state_space", "v1"]


@torch.no_grad()
def logits_of(model, ids: torch.Tensor) -> list[torch.Tensor]:
    output = model(ids, use_cache=True)
    step = model(ids[:, :1], cache=output.cache)
    return [output.logits, step.logits]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("narrow", [False, True], ids=["fp32", "bf16"])
def test_the_same_weights_in_one_block(kind: str, narrow: bool):
    model, ids = make_model(kind), draw_ids(2, 7)
    if narrow:
        hold_weights_in_bf16(model)
    before = copy.deepcopy(model)
    parameters = list(model.parameters())
    assert hold_weights_together(model) is model
    assert list(map(id, model.parameters())) == list(map(id, parameters))
    assert len({p.untyped_storage().data_ptr() for p in parameters}) == 1
    assert all(p.data_ptr() % 64 == 0 and p.requires_grad for p in parameters if not narrow)
    for new, old in zip(model.parameters(), before.parameters(), strict=True):
        assert new.dtype == old.dtype
        assert torch.equal(new, old)
    for new, old in zip(logits_of(model, ids), logits_of(before, ids), strict=True):
        assert torch.equal(new, old)


def test_they_are_saved_and_copied_as_others_are(tmp_path: Path):
    model = hold_weights_together(make_model("rwkv4", tie_word_embeddings=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    for other in (AutoModelForCausalLM.from_pretrained(tmp_path), copy.deepcopy(model)):
        with torch.no_grad():
            other.model.norm.weight += 0.0
        for new, old in zip(other.parameters(), model.parameters(), strict=True):
            assert new.data_ptr() != old.data_ptr()
            assert torch.equal(new, old)


def test_they_learn_as_others_do():
    models = [make_model("state_space").train() for _ in range(2)]
    hold_weights_together(models[0])
    for model in models:
        ids = draw_ids(2, 9)
        model(ids, labels=ids).loss.backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    for new, old in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(new, old)


def test_a_generator_on_a_cpu_holds_them_so():
    generator = make_generator(make_model("rwkv4"), None, "fp32")
    assert len({p.untyped_storage().data_ptr() for p in generator.model.parameters()}) == 1


@pytest.mark.parametrize("size", [0, 1, 5_000_000])
def test_memory_in_large_pages_is_memory(size: int):
    memory = empty_in_large_pages(size)
    assert memory.shape == (size,)
    assert memory.dtype == torch.uint8
    memory.fill_(7)
    assert int(memory.sum(dtype=torch.int64)) == 7 * size
