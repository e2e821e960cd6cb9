from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from i3lm.data.tokens import TokenizedText, tokenize_documents
from i3lm.errors import DataError
from i3lm.evaluation import evaluate_text
from i3lm.models.i3 import I3Config, I3ForCausalLM
from i3lm.ops.cross_entropy import PIECE_BYTES
from i3lm.tokenizers import train_tokenizer


class Bigram(nn.Module):
    """Logits that depend on the last token only: log-probabilities in a table (V, V)."""

    def __init__(self, probabilities: list[list[float]]) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.tensor(probabilities).log())
        self.rows: list[tuple[int, ...]] = []

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        self.rows.append(tuple(input_ids.shape))
        return SimpleNamespace(logits=self.table[input_ids])


def text_of(tokens: list[int], size: int) -> TokenizedText:
    return TokenizedText(np.array(tokens, dtype=np.uint16), documents=1, bytes=size)


def test_by_hand():
    model = Bigram([[0.5, 0.5], [0.25, 0.75]])
    evaluation = evaluate_text(model, text_of([0, 1, 1, 0], 3), context_length=2)
    # 0 -> 1 (1/2), 1 -> 1 (3/4), 1 -> 0 (1/4)
    nats = -(math.log(0.5) + math.log(0.75) + math.log(0.25))
    assert evaluation.tokens == 3
    assert evaluation.loss == pytest.approx(nats / 3, rel=1e-6)
    assert evaluation.perplexity == pytest.approx(math.exp(nats / 3), rel=1e-6)
    assert evaluation.bits_per_byte == pytest.approx(nats / math.log(2) / 3, rel=1e-6)
    assert model.rows == [(1, 2), (1, 1)]


@pytest.mark.parametrize("V", [2, 7, 64])
def test_uniform_model(V: int):
    tokens = [n % V for n in range(100)]
    model = Bigram([[1 / V] * V] * V)
    evaluation = evaluate_text(model, text_of(tokens, 250), context_length=8)
    assert evaluation.bits_per_byte == pytest.approx(math.log2(V) * 99 / 250, rel=1e-5)


def test_batch_size_and_rows_cover_every_token():
    model = Bigram([[0.5, 0.5], [0.25, 0.75]])
    tokens = np.random.default_rng(0).integers(0, 2, 101).tolist()
    results = [
        evaluate_text(model, text_of(tokens, 50), context_length=T, batch_size=B)
        for T, B in ((8, 1), (8, 3), (8, 100), (100, 1), (7, 16))
    ]
    # A bigram model sees enough in any row, so even the cut does not matter to it.
    for result in results:
        assert result.tokens == 100
        assert result.loss == pytest.approx(results[0].loss, rel=1e-6)


def test_bytes_are_of_the_documents_alone():
    documents = ["café", "tea"]
    text = tokenize_documents(documents, train_tokenizer("character", documents))
    assert (text.documents, text.bytes) == (2, 8)


def test_model_goes_back_to_training():
    model = Bigram([[0.5, 0.5], [0.5, 0.5]]).train()
    evaluate_text(model, text_of([0, 1], 1), context_length=1)
    assert model.training


def test_too_short():
    with pytest.raises(DataError, match=r"the text has 0 bytes in 1 tokens, too few"):
        evaluate_text(Bigram([[1.0]]), text_of([0], 0), context_length=1)


# Loss in pieces


def i3_and_its_logits(**fields: object) -> tuple[I3ForCausalLM, nn.Module]:
    """A model, and the same one hidden behind a call that gives only its logits."""
    torch.manual_seed(0)
    model = I3ForCausalLM(I3Config(hidden_size=16, num_attention_heads=2, **fields))

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
            return SimpleNamespace(logits=self.model(input_ids, use_cache=use_cache).logits)

    return model, Plain()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "fields",
    [
        {"layer_types": "linear_attention, full_attention"},
        {"layer_types": "hybrid", "recurrence": "state_space", "low_rank": 4},
    ],
    ids=["rwkv4", "low_rank"],
)
def test_an_i3_model_scores_the_same_in_pieces(fields: dict, precision: str):
    model, plain = i3_and_its_logits(vocab_size=53, max_position_embeddings=16, **fields)
    tokens = np.random.default_rng(0).integers(0, 53, 300).tolist()
    settings = {"context_length": 16, "batch_size": 4, "precision": precision}
    pieces, whole = (evaluate_text(m, text_of(tokens, 500), **settings) for m in (model, plain))
    assert pieces.tokens == whole.tokens
    # Both take softmax and loss in float32, of the same logits; only the sums' order differs.
    assert pieces.loss == pytest.approx(whole.loss, rel=1e-6)
    assert pieces.bits_per_byte == pytest.approx(whole.bits_per_byte, rel=1e-6)


class LargestTensor(TorchDispatchMode):
    """Notes the most elements that an operation gave."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if isinstance(output, Tensor):
            self.elements = max(self.elements, output.numel())
        return output


def test_an_i3_model_never_holds_all_logits():
    V, B, T = 60_000, 32, 16
    fields = {"layer_types": "linear_attention", "max_position_embeddings": T}
    model, plain = i3_and_its_logits(vocab_size=V, **fields)
    text = text_of([n % V for n in range(B * T + 1)], 1_000)
    largest = {}
    for name, scored in (("pieces", model), ("plain", plain)):
        with LargestTensor() as seen:
            evaluate_text(scored, text, context_length=T, batch_size=B)
        largest[name] = seen.elements
    assert largest["plain"] == B * T * V
    assert 4 * largest["pieces"] <= PIECE_BYTES
