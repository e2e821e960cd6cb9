from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from i3lm.errors import GenerationError
from i3lm.inference import SamplingOptions, TextGenerator
from i3lm.inference.loading import load_checkpoint

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
