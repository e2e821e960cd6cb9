from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, pipeline

from i3lm.models.i3 import I3ForCausalLM
from i3lm.tokenizers import train_tokenizer
from tests.models.tiny_i3 import KINDS, draw_ids, make_model

every_kind = pytest.mark.parametrize("kind", KINDS)


def generate(model: I3ForCausalLM, ids: Tensor, new: int, **options: Any) -> Tensor:
    """The whole sequences that `generate` gives, prompt included."""
    mask = options.pop("attention_mask", torch.ones_like(ids))
    settings = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": new, **options}
    return model.generate(ids, attention_mask=mask, generation_config=GenerationConfig(**settings))


def continue_by_hand(model: I3ForCausalLM, ids: Tensor, new: int) -> Tensor:
    """The likeliest tokens, each from a full pass over the last tokens that fit."""
    limit = model.config.position_limit or 0  # [:, -0:] is all
    for _ in range(new):
        window = ids[:, -limit:]
        with torch.no_grad():
            best = model(window, use_cache=False).logits[:, -1].argmax(dim=-1, keepdim=True)
        ids = torch.cat([ids, best], dim=1)
    return ids


@every_kind
@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("prompt_length", [1, 6])
def test_greedy_text_is_that_of_full_passes(kind: str, use_cache: bool, prompt_length: int):
    model, prompt = make_model(kind), draw_ids(2, prompt_length)
    expected = continue_by_hand(model, prompt, 30)  # past the context of 24
    assert torch.equal(generate(model, prompt, 30, use_cache=use_cache), expected)


@every_kind
def test_a_prompt_longer_than_the_context_slides(kind: str):
    model, prompt = make_model(kind), draw_ids(1, 27)
    assert torch.equal(generate(model, prompt, 4), continue_by_hand(model, prompt, 4))


@every_kind
@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
def test_left_padded_prompts_continue_as_they_do_alone(kind: str, use_cache: bool):
    model, ids = make_model(kind), draw_ids(3, 9)
    mask = (torch.arange(9) >= torch.tensor([[0], [3], [8]])).long()
    padded = torch.where(mask.bool(), ids, 0)
    together = generate(model, padded, 12, attention_mask=mask, use_cache=use_cache)
    for row, start in enumerate((0, 3, 8)):
        alone = generate(model, ids[row : row + 1, start:], 12, use_cache=use_cache)
        assert torch.equal(together[row, start:], alone[0])


@every_kind
def test_beam_search_is_the_same_with_and_without_cache(kind: str):
    model, prompt = make_model(kind), draw_ids(2, 5)
    options = {"num_beams": 3, "num_return_sequences": 2}
    cached = generate(model, prompt, 10, use_cache=True, **options)
    assert cached.shape == (4, 15)
    assert torch.equal(cached, generate(model, prompt, 10, use_cache=False, **options))


@every_kind
def test_sampling_repeats_with_its_seed(kind: str):
    model, prompt = make_model(kind), draw_ids(2, 5)
    texts = []
    for seed, use_cache in ((1, True), (1, False), (2, True)):
        torch.manual_seed(seed)
        texts.append(generate(model, prompt, 15, do_sample=True, top_k=20, use_cache=use_cache))
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])


def test_several_samples_of_one_prompt():
    model, prompt = make_model("rwkv4"), draw_ids(2, 5)
    torch.manual_seed(0)
    texts = generate(model, prompt, 12, do_sample=True, num_return_sequences=3)
    assert texts.shape == (6, 17)
    assert torch.equal(texts[:, :5], prompt.repeat_interleave(3, dim=0))
    assert len({tuple(text) for text in texts.tolist()}) > 2


@every_kind
def test_a_row_stops_at_its_end_token(kind: str):
    model, prompt = make_model(kind), draw_ids(2, 5)
    free = generate(model, prompt, 12)
    end = int(free[0, 9])
    stopped = generate(model, prompt, 12, eos_token_id=end, pad_token_id=36)
    for row, expected in zip(stopped[:, 5:].tolist(), free[:, 5:].tolist(), strict=True):
        length = expected.index(end) + 1 if end in expected else 12
        assert row[:length] == expected[:length]
        assert set(row[length:]) <= {36}


@every_kind
def test_embeddings_may_be_the_prompt(kind: str):
    model, prompt = make_model(kind), draw_ids(2, 5)
    expected = generate(model, prompt, 12)
    output = model.generate(
        inputs_embeds=model.get_input_embeddings()(prompt).detach(),
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=12,
        do_sample=False,
        pad_token_id=0,
    )
    assert torch.equal(output, expected[:, 5:])


@every_kind
def test_a_cache_carries_a_conversation_on(kind: str):
    model, prompt = make_model(kind), draw_ids(1, 5)
    settings = {"do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    first = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, **settings
    )
    more = torch.cat([first.sequences, draw_ids(1, 3, seed=2)], dim=1)
    again = model.generate(
        more,
        attention_mask=torch.ones_like(more),
        past_key_values=first.past_key_values,
        max_new_tokens=6,
        **settings,
    )
    assert torch.equal(again.sequences, continue_by_hand(model, more, 6))


@pytest.mark.parametrize("kind", ["rwkv4", "v1", "all state_space"])
def test_the_text_generation_pipeline_works(kind: str):
    tokenizer = train_tokenizer(
        "bpe", ["the quick brown fox jumps over the lazy dog. "], vocab_size=270
    )
    model = make_model(kind, vocab_size=len(tokenizer))
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    options = {"do_sample": False, "max_new_tokens": 8}
    answer = generator("fox", **options)[0]["generated_text"]
    assert answer.startswith("fox")
    ids = tokenizer("fox", return_tensors="pt")["input_ids"]
    expected = continue_by_hand(model, ids, 8)[0]
    assert answer == tokenizer.decode(expected, skip_special_tokens=True)
    answers = generator(["fox", "the dog jumps"], batch_size=2, **options)
    assert answers[0][0]["generated_text"] == answer
