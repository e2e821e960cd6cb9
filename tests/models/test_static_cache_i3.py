"""Generation with a cache of one size, whose steps can be compiled."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo import lookup_backend
from transformers import CompileConfig

from i3lm.models.i3 import I3ForCausalLM
from i3lm.models.i3.cache_i3 import I3StaticCache
from tests.models.test_generation_i3 import continue_by_hand, every_kind, generate
from tests.models.tiny_i3 import LIMITED, draw_ids, make_model


@every_kind
@pytest.mark.parametrize("prompt_length", [1, 9])
def test_greedy_text_is_that_of_full_passes(kind: str, prompt_length: int):
    model, prompt = make_model(kind), draw_ids(2, prompt_length)
    output = generate(model, prompt, 15, cache_implementation="static")  # up to the context of 24
    assert torch.equal(output, continue_by_hand(model, prompt, 15))


MODES = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "several": {"do_sample": True, "top_k": 1, "num_return_sequences": 2},
    "chunks": {"prefill_chunk_size": 4},
    "single tokens": {"prefill_chunk_size": 1},
}


def check_modes(model: I3ForCausalLM, ids: Tensor, mask: Tensor, new: int) -> None:
    """Holds what all modes give with a static cache against what they give with a growing one."""
    ids = torch.where(mask.bool(), ids, 0)
    for mode, options in MODES.items():
        static, growing = (
            generate(
                model, ids, new, attention_mask=mask, cache_implementation=implementation, **options
            )
            for implementation in ("static", None)
        )
        assert torch.equal(static, growing), mode


@every_kind
def test_all_modes_give_what_they_give_with_a_growing_cache(kind: str):
    mask = (torch.arange(9) >= torch.tensor([[0], [3], [8]])).long()
    check_modes(make_model(kind), draw_ids(3, 9), mask, 12)
    check_modes(make_model(kind), draw_ids(3, 9), torch.ones_like(mask), 12)
    # Of one column, and in the second row that is padding.
    check_modes(make_model(kind), draw_ids(2, 1), torch.tensor([[1], [0]]), 12)


@pytest.mark.parametrize("window", [9, 20, 70, 300])
@pytest.mark.parametrize("kind", ["sliding", "sliding rope", "sliding none"])
def test_windows_of_all_sizes(kind: str, window: int):
    """Shorter than the prompt, than the text, than the usual room, and wider than it."""
    model, ids = (
        make_model(kind, sliding_window=window, max_position_embeddings=100),
        draw_ids(2, 12),
    )
    mask = (torch.arange(12) >= torch.tensor([[0], [3]])).long()
    for attention_mask in (torch.ones_like(mask), mask):
        check_modes(model, ids, attention_mask, 80)
    cache = I3StaticCache(model.config, 100, model.device)
    with torch.no_grad():
        parts = [model(part, cache=cache).logits for part in ids.split([6, 1, 5], dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(ids).logits)


@pytest.mark.parametrize("kind", ["sliding rope", "sliding none"])
def test_a_cache_has_room_for_a_window_at_least(kind: str):
    model, ids = make_model(kind, sliding_window=21), draw_ids(1, 60)
    cache = I3StaticCache(model.config, 8, model.device)
    with torch.no_grad():
        parts = [model(token, cache=cache).logits for token in ids.split(1, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(ids).logits)


@every_kind
def test_a_step_is_compiled_once_for_all_calls(kind: str):
    torch._dynamo.reset()
    model, compiled = make_model(kind), []

    def backend(graph, inputs):
        compiled.append(graph)
        return lookup_backend("aot_eager")(graph, inputs)

    compiling = CompileConfig(fullgraph=True, backend=backend, mode=None)
    compiling._compile_all_devices = True  # by itself `generate` compiles on accelerators only
    for length, chunk in ((5, None), (9, None), (9, 4)):
        prompt = draw_ids(2, length)
        mask = (torch.arange(length) >= torch.tensor([[0], [length - 3]])).long()
        for attention_mask in (torch.ones_like(prompt), mask):
            asked = {"attention_mask": attention_mask, "prefill_chunk_size": chunk}
            static, growing = (
                generate(model, prompt, 12, **asked, **options)
                for options in (
                    {"cache_implementation": "static", "compile_config": compiling},
                    {},
                )
            )
            assert torch.equal(static, growing)
    # transformers' layer with a window counts by a number, which is compiled as itself at first.
    assert len(compiled) == (2 if "sliding" in kind else 1)


@every_kind
@pytest.mark.parametrize("with_positions", [True, False])
def test_a_loop_of_ones_own_is_compiled_whole(kind: str, with_positions: bool):
    torch._dynamo.reset()
    model, ids = make_model(kind), draw_ids(2, 8)
    cache = I3StaticCache(model.config, 24, model.device)
    step = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        parts = [model(ids[:, :3], cache=cache).logits]
        for t in range(3, 8):
            positions = {"position_ids": torch.tensor([[t]])} if with_positions else {}
            parts.append(step(ids[:, t : t + 1], cache=cache, **positions).logits)
        torch.testing.assert_close(torch.cat(parts, dim=1), model(ids).logits)


@every_kind
@pytest.mark.parametrize("asks_always", [False, True])
def test_a_cache_carries_a_conversation_on(kind: str, asks_always: bool):
    model, prompt = make_model(kind), draw_ids(1, 5)
    if asks_always:
        model.generation_config.cache_implementation = "static"
    settings = {"do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    first = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=6,
        cache_implementation="static",
        **settings,
    )
    assert isinstance(first.cache, I3StaticCache)
    more = torch.cat([first.sequences, draw_ids(1, 3, seed=2)], dim=1)
    again = model.generate(
        more,
        attention_mask=torch.ones_like(more),
        cache=first.cache,
        max_new_tokens=6,
        **settings,
    )
    assert torch.equal(again.sequences, continue_by_hand(model, more, 6))


@every_kind
def test_a_cache_that_was_reset_begins_anew(kind: str):
    model, ids = make_model(kind), draw_ids(2, 9)
    cache = I3StaticCache(model.config, 24, model.device)
    with torch.no_grad():
        expected = model(ids).logits
        for _ in range(2):
            parts = [model(part, cache=cache).logits for part in ids.split([4, 1, 4], dim=1)]
            torch.testing.assert_close(torch.cat(parts, dim=1), expected)
            assert int(cache.get_seq_length()) == 9
            cache.reset()


def test_what_does_not_fit_is_refused():
    message = r"^a text of 25 tokens, with its padding and all new ones, is longer than a static "
    model = make_model("rwkv4")
    for overflow in ("window", "shift"):
        options = {"cache_implementation": "static", "context_overflow": overflow}
        with pytest.raises(ValueError, match=message + "cache of 24 can keep: ask for fewer"):
            generate(model, draw_ids(1, 20), 5, **options)
    for kind, room, limit in (("rope", 20, 20), ("rwkv4", 100, 24)):
        model = make_model(kind)
        cache = I3StaticCache(model.config, room, model.device)
        with pytest.raises(ValueError, match=message + f"cache of {limit} can keep"):
            model.generate(draw_ids(1, 20), max_new_tokens=5, cache=cache)
    with pytest.raises(ValueError, match=r"^masks that were made before need position_ids"):
        model.model(draw_ids(1, 2), attention_mask={})


@every_kind
def test_a_text_past_the_context_is_refused_or_needs_no_room(kind: str):
    model, prompt = make_model(kind), draw_ids(1, 20)
    if kind in LIMITED:
        with pytest.raises(ValueError, match=r"^a text of 120 tokens"):
            generate(model, prompt, 100, cache_implementation="static")
        return
    output = generate(model, prompt, 100, cache_implementation="static")
    assert torch.equal(output, continue_by_hand(model, prompt, 100))
