from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import GenerationConfig, pipeline
from transformers.generation.streamers import BaseStreamer

from i3lm.models.i3 import I3ForCausalLM
from i3lm.models.i3.generation_i3 import count_visible
from i3lm.tokenizers import train_tokenizer
from tests.models.tiny_i3 import KINDS, LIMITED, UNLIMITED, draw_ids, make_model

every_kind = pytest.mark.parametrize("kind", KINDS)
limited_kinds = pytest.mark.parametrize("kind", LIMITED)
every_case = pytest.mark.parametrize(
    ("kind", "overflow"),
    [(kind, overflow) for kind in LIMITED for overflow in ("window", "shift")]
    + [(kind, "window") for kind in UNLIMITED],  # which never looks at it
)
both_policies = pytest.mark.parametrize("overflow", ["window", "shift"])
with_and_without_cache = pytest.mark.parametrize(
    "use_cache", [True, False], ids=["cache", "no cache"]
)


def generate(model: I3ForCausalLM, ids: Tensor, new: int, **options: Any) -> Tensor:
    """The whole sequences that `generate` gives, prompt included."""
    mask = options.pop("attention_mask", torch.ones_like(ids))
    settings = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": new, **options}
    return model.generate(ids, attention_mask=mask, generation_config=GenerationConfig(**settings))


def visible_by_hand(length: int, limit: int | None, overflow: str) -> int:
    """How many last tokens are left when tokens come one at a time."""
    visible = 0
    for _ in range(length):
        if limit is not None and visible == limit:
            visible -= 1 if overflow == "window" else (limit + 1) // 2
        visible += 1
    return visible


def continue_by_hand(
    model: I3ForCausalLM, ids: Tensor, new: int, overflow: str = "window"
) -> Tensor:
    """The likeliest tokens, each from a full pass over the last tokens that are left."""
    for _ in range(new):
        visible = visible_by_hand(ids.shape[1], model.config.position_limit, overflow)
        window = ids[:, -visible:]
        with torch.no_grad():
            best = model(window, use_cache=False).logits[:, -1].argmax(dim=-1, keepdim=True)
        ids = torch.cat([ids, best], dim=1)
    return ids


@every_case
@with_and_without_cache
@pytest.mark.parametrize("prompt_length", [1, 50])
def test_greedy_text_is_that_of_full_passes(
    kind: str, overflow: str, use_cache: bool, prompt_length: int
):
    model, prompt = make_model(kind), draw_ids(2, prompt_length)
    expected = continue_by_hand(model, prompt, 40, overflow)  # past the context of 24
    output = generate(model, prompt, 40, use_cache=use_cache, context_overflow=overflow)
    assert torch.equal(output, expected)


@pytest.mark.parametrize("overflow", ["window", "shift"])
@given(length=st.integers(0, 200), limit=st.integers(1, 40))
def test_what_is_visible_follows_from_the_length(overflow: str, length: int, limit: int):
    visible = count_visible(length, limit, overflow)
    assert visible == visible_by_hand(length, limit, overflow)
    assert min(length, limit // 2 + 1) <= visible <= limit


@every_case
@with_and_without_cache
def test_left_padded_prompts_continue_as_they_do_alone(kind: str, overflow: str, use_cache: bool):
    model, ids = make_model(kind), draw_ids(3, 9)
    mask = (torch.arange(9) >= torch.tensor([[0], [3], [8]])).long()
    padded = torch.where(mask.bool(), ids, 0)
    options = {"use_cache": use_cache, "context_overflow": overflow}
    together = generate(model, padded, 45, attention_mask=mask, **options)
    for row, start in enumerate((0, 3, 8)):
        alone = generate(model, ids[row : row + 1, start:], 45, **options)
        assert torch.equal(together[row, start:], alone[0])


@every_case
def test_beam_search_is_the_same_with_and_without_cache(kind: str, overflow: str):
    model, ids = make_model(kind), draw_ids(2, 5)
    mask = (torch.arange(5) >= torch.tensor([[0], [2]])).long()
    options = {"num_beams": 3, "num_return_sequences": 2, "context_overflow": overflow}
    cached, uncached = (
        generate(model, ids, 40, attention_mask=mask, use_cache=use_cache, **options)
        for use_cache in (True, False)
    )
    assert cached.shape == (4, 45)
    assert torch.equal(cached, uncached)


@every_case
def test_sampling_repeats_with_its_seed(kind: str, overflow: str):
    model, prompt = make_model(kind), draw_ids(2, 5)
    options = {"do_sample": True, "top_k": 20, "context_overflow": overflow}
    texts = []
    for seed, use_cache in ((1, True), (1, False), (2, True)):
        torch.manual_seed(seed)
        texts.append(generate(model, prompt, 30, use_cache=use_cache, **options))
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])


def test_several_samples_of_one_prompt():
    model, prompt = make_model("rwkv4"), draw_ids(2, 5)
    torch.manual_seed(0)
    texts = generate(model, prompt, 12, do_sample=True, num_return_sequences=3)
    assert texts.shape == (6, 17)
    assert torch.equal(texts[:, :5], prompt.repeat_interleave(3, dim=0))
    assert len({tuple(text) for text in texts.tolist()}) > 2


@every_case
def test_several_sequences_of_padded_prompts_past_the_context(kind: str, overflow: str):
    model, ids = make_model(kind), draw_ids(2, 9)
    options = {
        "attention_mask": (torch.arange(9) >= torch.tensor([[0], [4]])).long(),
        "context_overflow": overflow,
    }
    expected = generate(model, ids, 40, **options)
    # Of one token there is one choice.
    drawn = generate(model, ids, 40, do_sample=True, top_k=1, num_return_sequences=3, **options)
    assert torch.equal(drawn, expected.repeat_interleave(3, dim=0))


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


@every_case
@pytest.mark.parametrize("prompt_length", [5, 27])
def test_embeddings_may_be_the_prompt(kind: str, overflow: str, prompt_length: int):
    model, prompt = make_model(kind), draw_ids(2, prompt_length)
    expected = generate(model, prompt, 30, context_overflow=overflow)
    output = model.generate(
        inputs_embeds=model.get_input_embeddings()(prompt).detach(),
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=30,
        do_sample=False,
        pad_token_id=0,
        context_overflow=overflow,
    )
    assert torch.equal(output, expected[:, prompt_length:])


@every_case
@pytest.mark.parametrize(("size", "prompt_length"), [(1, 14), (7, 14), (4, 30)])
def test_a_prompt_may_be_read_in_chunks(kind: str, overflow: str, size: int, prompt_length: int):
    model, ids = make_model(kind), draw_ids(2, prompt_length)
    mask = (torch.arange(prompt_length) >= torch.tensor([[0], [5]])).long()
    options = {"attention_mask": mask, "context_overflow": overflow}
    output = generate(model, ids, 15, prefill_chunk_size=size, **options)
    assert torch.equal(output, generate(model, ids, 15, **options))


class Collector(BaseStreamer):
    """Keeps what `generate` streams."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.ids += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


@every_case
def test_a_streamer_gets_every_token(kind: str, overflow: str):
    model, prompt, streamer = make_model(kind), draw_ids(1, 6), Collector()
    settings = GenerationConfig(max_new_tokens=30, pad_token_id=0, context_overflow=overflow)
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        generation_config=settings,
        streamer=streamer,
    )
    assert streamer.ids == output[0].tolist()
    assert streamer.ended


@every_case
def test_a_stopping_criterion_stops(kind: str, overflow: str):
    model, prompt = make_model(kind), draw_ids(1, 6)

    def long_enough(ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(ids),), ids.shape[1] >= 33)

    options = {"context_overflow": overflow, "pad_token_id": 0}
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=60,
        do_sample=False,
        stopping_criteria=[long_enough],
        **options,
    )
    assert torch.equal(output, generate(model, prompt, 27, context_overflow=overflow))


@every_case
@pytest.mark.parametrize("new", [6, 30])
def test_a_cache_carries_a_conversation_on(kind: str, overflow: str, new: int):
    model, prompt = make_model(kind), draw_ids(1, 5)
    settings = {
        "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True,
        "context_overflow": overflow,
    }  # fmt: skip
    first = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, **settings
    )
    more = torch.cat([first.sequences, draw_ids(1, 3, seed=2)], dim=1)
    again = model.generate(
        more,
        attention_mask=torch.ones_like(more),
        cache=first.cache,
        max_new_tokens=6,
        **settings,
    )
    assert torch.equal(again.sequences, continue_by_hand(model, more, 6, overflow))


@limited_kinds
@both_policies
def test_a_cache_alone_cannot_go_past_the_context(kind: str, overflow: str):
    model, prompt = make_model(kind), draw_ids(1, 20)
    cache = model(prompt, use_cache=True).cache
    message = (
        r"^past the context of 24 tokens, the last \d+ are read again, and only \d+ were given"
    )
    with pytest.raises(ValueError, match=message):
        model.generate(
            draw_ids(1, 2),
            attention_mask=torch.ones(1, 22, dtype=torch.long),
            cache=cache,
            max_new_tokens=10,
            pad_token_id=0,
            context_overflow=overflow,
        )


@limited_kinds
def test_shifting_reads_each_token_about_twice(kind: str, monkeypatch: pytest.MonkeyPatch):
    model, prompt, read = make_model(kind), draw_ids(1, 6), []
    forward = model.model.forward

    def count(*args: Any, **kwargs: Any) -> Any:
        read.append(kwargs["input_ids"].shape[1])
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.model, "forward", count)
    generate(model, prompt, 100, context_overflow="shift")
    # Half of 24 is dropped, and 13 are read, at 25, 37, 49, ... tokens; the last is not read.
    assert read == [6] + [13 if n >= 25 and (n - 25) % 12 == 0 else 1 for n in range(7, 106)]


@every_kind
def test_the_policy_is_a_field_of_the_saved_generation_settings(kind: str, tmp_path: Path):
    model, prompt = make_model(kind), draw_ids(1, 6)
    model.generation_config.context_overflow = "shift"
    model.save_pretrained(tmp_path)
    loaded = I3ForCausalLM.from_pretrained(tmp_path)
    assert loaded.generation_config.context_overflow == "shift"
    expected = continue_by_hand(model, prompt, 40, "shift")
    assert torch.equal(generate(loaded, prompt, 40), expected)
    windowed = continue_by_hand(model, prompt, 40, "window")
    assert torch.equal(generate(loaded, prompt, 40, context_overflow="window"), windowed)
    options = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(prompt)
    given = loaded.generate(prompt, attention_mask=mask, context_overflow="window", **options)
    assert torch.equal(given, windowed)


@every_kind
def test_an_empty_prompt_is_refused_and_no_token_gives_no_logits(kind: str):
    model, nothing = make_model(kind), torch.zeros(2, 0, dtype=torch.long)
    with pytest.raises(ValueError, match=r"^the prompt is empty: give at least one token$"):
        model.generate(nothing, max_new_tokens=3)
    assert model(nothing).logits.shape == (2, 0, model.config.vocab_size)


TOO_LONG = (
    "the prompt has {} tokens and {} more are asked for, but this model's context is 24: shorten "
    "the prompt, ask for fewer, or set context_overflow to window or shift"
)


@limited_kinds
@with_and_without_cache
def test_policy_error_refuses_before_it_computes(
    kind: str, use_cache: bool, monkeypatch: pytest.MonkeyPatch
):
    model, ids = make_model(kind), draw_ids(2, 10)
    options = {"context_overflow": "error", "use_cache": use_cache}
    assert torch.equal(generate(model, ids, 14, **options), continue_by_hand(model, ids, 14))
    mask = (torch.arange(10) >= torch.tensor([[4], [6]])).long()
    assert generate(model, ids, 18, attention_mask=mask, **options).shape == (2, 28)
    monkeypatch.setattr(model.model, "forward", None)
    for new, changes, prompt in (
        (15, {}, 10),
        (19, {"attention_mask": mask}, 6),
        (15, {"num_beams": 2}, 10),
        (None, {"max_length": 25}, 10),
    ):
        message = re.escape(TOO_LONG.format(prompt, new or 15))
        with pytest.raises(ValueError, match=f"^{message}$"):
            generate(model, ids, new, **changes, **options)
    with pytest.raises(ValueError, match=re.escape(TOO_LONG.format(30, 1))):
        generate(model, draw_ids(1, 30), 1, **options)
    embeds = model.get_input_embeddings()(ids)
    with pytest.raises(ValueError, match=re.escape(TOO_LONG.format(10, 15))):
        model.generate(inputs_embeds=embeds, max_new_tokens=15, context_overflow="error")


@pytest.mark.parametrize("kind", UNLIMITED)
@pytest.mark.parametrize("overflow", ["error", "window", "shift"])
def test_where_positions_do_not_end_there_is_no_policy(kind: str, overflow: str):
    model, prompt = make_model(kind), draw_ids(1, 30)
    output = generate(model, prompt, 30, context_overflow=overflow)
    assert torch.equal(output, continue_by_hand(model, prompt, 30))


def test_settings_that_cannot_be_followed():
    model, ids = make_model("rwkv4"), draw_ids(1, 5)
    message = r"^context_overflow \('drop'\) must be one of error, window, shift$"
    with pytest.raises(ValueError, match=message):
        generate(model, ids, 5, context_overflow="drop")
    with pytest.raises(ValueError, match=r"^cache_implementation \('quantized'\) cannot keep"):
        generate(model, ids, 5, cache_implementation="quantized")
    embeds = model.get_input_embeddings()(ids)
    with pytest.raises(ValueError, match=r"^prefill_chunk_size \(3\) cuts token ids only"):
        model.generate(inputs_embeds=embeds, max_new_tokens=5, prefill_chunk_size=3)


@both_policies
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    new=st.integers(1, 60),
    kind=st.sampled_from(LIMITED),
)
def test_rows_of_any_length_go_on_as_they_do_alone(
    overflow: str, lengths: list[int], new: int, kind: str
):
    model, T = make_model(kind), max(lengths)
    ids = draw_ids(len(lengths), T)
    mask = (torch.arange(T) >= T - torch.tensor(lengths)[:, None]).long()
    together = generate(model, ids, new, attention_mask=mask, context_overflow=overflow)
    for row, length in enumerate(lengths):
        alone = continue_by_hand(model, ids[row : row + 1, T - length :], new, overflow)
        assert torch.equal(together[row, T - length :], alone[0])


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
