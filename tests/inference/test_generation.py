from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from i3lm.errors import GenerationError
from i3lm.inference import SamplingOptions, TextGenerator
from i3lm.inference.loading import load_checkpoint
from i3lm.models.i3 import I3Config, I3ForCausalLM
from i3lm.tokenizers import train_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def generator(tiny_run: Path) -> TextGenerator:
    return TextGenerator(*load_checkpoint(tiny_run))


def test_greedy_by_hand(generator: TextGenerator):
    ids = generator.encode_prompt("Once")
    for _ in range(6):
        with torch.no_grad():
            logits = generator.model(torch.tensor([ids])).logits
        ids.append(int(logits[0, -1].argmax()))
    completion = generator.complete("Once", SamplingOptions(6, temperature=0))
    assert completion.text == generator.tokenizer.decode(ids[4:])
    assert (completion.prompt_tokens, completion.new_tokens) == (4, 6)


@pytest.mark.parametrize(
    ("options", "allowed"), [({"top_k": 3}, 3), ({"top_k": 0, "top_p": 0.8}, None)]
)
def test_draws_stay_among_the_likeliest(
    generator: TextGenerator, options: dict, allowed: int | None
):
    ids = generator.encode_prompt("Once")
    with torch.no_grad():
        probabilities = generator.model(torch.tensor([ids])).logits[0, -1].softmax(0)
    ordered, order = probabilities.sort(descending=True)
    if allowed is None:  # the fewest that together reach top_p
        allowed = int((ordered.cumsum(0) < options["top_p"]).sum()) + 1
    likeliest = {generator.tokenizer.decode([i]) for i in order[:allowed].tolist()}
    drawn = Counter(
        generator.complete("Once", SamplingOptions(1, 1.0, seed=seed, **options)).text
        for seed in range(40)
    )
    assert set(drawn) <= likeliest
    assert len(drawn) > 1


def test_draws_do_not_disturb_other_random_numbers(generator: TextGenerator):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    generator.complete("Once", SamplingOptions(3))
    assert torch.rand(2).equal(expected)


def test_prompts_that_cannot_be_read(generator: TextGenerator):
    with pytest.raises(GenerationError, match="the prompt is empty: give at least one character"):
        generator.encode_prompt("")
    with pytest.raises(GenerationError, match="has 33 tokens, and this model's context is 32"):
        generator.encode_prompt("x" * 33)
    with pytest.raises(GenerationError, match=r"is not UTF-8 text \(character 2 cannot be encoded"):
        generator.encode_prompt("a\udce9")
    assert len(generator.encode_prompt("x" * 32)) == 32


def test_token_ids_out_of_range(generator: TextGenerator):
    size = generator.model.config.vocab_size
    for wrong in (-1, size):
        message = f"token id {wrong} is outside the vocabulary: ids run from 0 to {size - 1}"
        with pytest.raises(ValueError, match=message):
            generator.model(torch.tensor([[0, wrong]]))


def test_more_tokens_than_positions(generator: TextGenerator):
    message = r"33 tokens are more than max_position_embeddings \(32\) allows"
    with pytest.raises(ValueError, match=message):
        generator.model(torch.zeros(1, 33, dtype=torch.long))


ENDLESS: dict[str, dict[str, Any]] = {
    "sliding rope": {
        "layer_types": "linear_attention, sliding_attention",
        "sliding_window": 6,
        "position_embedding_type": "rope",
    },
    "recurrent": {"layer_types": "2 x linear_attention", "position_embedding_type": "none"},
}


def make_generator(seed: int = 0, **changes: Any) -> TextGenerator:
    """A generator with a tiny model of random weights, which never ends a document by itself."""
    tokenizer = train_tokenizer(
        "bpe", ["the quick brown fox jumps over the lazy dog. "], vocab_size=270
    )
    tokenizer.eos_token = None
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "max_position_embeddings": 16}
    config = I3Config(vocab_size=len(tokenizer), initialization="original", **sizes, **changes)
    return TextGenerator(I3ForCausalLM(config).eval(), tokenizer)


@pytest.mark.parametrize("overflow", [None, "window", "shift"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "draws",
    [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 0.7, "top_k": 5, "top_p": 0.9}],
)
def test_a_stream_is_the_text_of_complete(
    tiny_run: Path, overflow: str | None, precision: str, draws: dict[str, Any]
):
    generator = TextGenerator(*load_checkpoint(tiny_run), precision)
    options = SamplingOptions(80, seed=3, context_overflow=overflow, **draws)  # 32 fit
    expected = generator.complete("Once", options)
    pieces = list(generator.stream("Once", options))
    assert "".join(pieces) == expected.text
    assert len(pieces) == expected.new_tokens
    endless = generator.stream("Once", dataclasses.replace(options, max_new_tokens=None))
    assert list(itertools.islice(endless, 10)) == pieces[:10]


def test_a_stream_ends_at_the_end_of_a_document():
    generator = make_generator(**ENDLESS["recurrent"])
    generator.tokenizer.eos_token = generator.tokenizer.convert_ids_to_tokens(100)
    whole = generator.complete("the fox", SamplingOptions(5000, 1.0, top_k=0))
    assert 100 < whole.new_tokens < 5000  # one in 270 is an end
    pieces = list(generator.stream("the fox", SamplingOptions(None, 1.0, top_k=0)))
    assert len(pieces) == whole.new_tokens
    text = "".join(pieces)
    assert whole.text.startswith(text)
    assert set(whole.text[len(text) :]) <= {"\ufffd"}  # bytes that begin a character


@pytest.mark.parametrize("name", ENDLESS)
def test_a_stream_goes_far_past_the_context(name: str):
    generator = make_generator(**ENDLESS[name])
    read = []
    generator.model.model.register_forward_hook(
        lambda module, args, kwargs, output: read.append(
            (kwargs["input_ids"].shape[1], output.cache)
        ),
        with_kwargs=True,
    )
    prompt = "the quick brown fox jumps over the lazy dog. " * 3
    tokens = len(generator.encode_prompt(prompt))
    assert tokens > 16
    options = SamplingOptions(None, temperature=1.0, top_k=0)
    pieces = list(itertools.islice(generator.stream(prompt, options), 500))
    assert len("".join(pieces)) > 300
    assert [length for length, _ in read] == [tokens] + [1] * 499
    for layer in read[-1][1].layers:
        if hasattr(layer, "keys"):
            assert layer.keys.shape[2] == 5  # and the next makes six


def test_a_stream_neither_disturbs_random_numbers_nor_training(generator: TextGenerator):
    generator.model.train()
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    pieces = generator.stream("Once", SamplingOptions(3))
    drawn = [torch.rand(1) for _ in pieces]
    assert torch.cat(drawn).equal(expected)
    assert generator.model.training


def test_long_prompts_need_a_policy(generator: TextGenerator):
    long = "x" * 40
    with pytest.raises(GenerationError, match="has 40 tokens, and this model's context is 32"):
        generator.complete(long, SamplingOptions(5))
    completion = generator.complete(long, SamplingOptions(5, context_overflow="shift"))
    assert (completion.prompt_tokens, completion.new_tokens) == (40, 5)


def test_policies_that_cannot_be_followed(generator: TextGenerator):
    with pytest.raises(GenerationError, match=r"^context_overflow \(drop\) must be one of error"):
        SamplingOptions(context_overflow="drop")
    error = SamplingOptions(29, context_overflow="error")
    message = (
        "^the prompt has 4 tokens and 29 more are asked for, but this model's context is 32: "
        "shorten the prompt, ask for fewer, or set context_overflow to window or shift$"
    )
    for call in (generator.complete, lambda *arguments: next(generator.stream(*arguments))):
        with pytest.raises(GenerationError, match=message):
            call("Once", error)
    assert generator.complete("Once", SamplingOptions(28, context_overflow="error")).text
    endless = SamplingOptions(None)
    with pytest.raises(GenerationError, match=r"^max_new_tokens \(None\) has no end: give a numbe"):
        generator.complete("Once", endless)
    generator.model.generation_config.context_overflow = "error"
    with pytest.raises(GenerationError, match=r"^a stream without end goes past this model's cont"):
        next(generator.stream("Once", endless))
    with pytest.raises(GenerationError, match=message):
        generator.complete("Once", SamplingOptions(29))


def test_policies_are_for_our_own_models(generator: TextGenerator):
    config = GPT2Config(n_layer=1, n_embd=8, n_head=2, n_positions=32, vocab_size=100)
    peer = TextGenerator(GPT2LMHeadModel(config), generator.tokenizer)
    message = r"^context_overflow \(shift\) is for models of the i3 family, not gpt2: leave it out$"
    with pytest.raises(GenerationError, match=message):
        peer.complete("Once", SamplingOptions(5, context_overflow="shift"))
    with pytest.raises(GenerationError, match="the prompt has 4 tokens and 29 more are asked for"):
        peer.complete("Once", SamplingOptions(29, context_overflow="error"))
    options = SamplingOptions(20, temperature=0)
    assert "".join(peer.stream("Once", options)) == peer.complete("Once", options).text
