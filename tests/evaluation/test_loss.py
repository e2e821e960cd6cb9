from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    JambaConfig,
    MambaConfig,
    MistralConfig,
    PreTrainedConfig,
)

from i3lm.data.tokens import TokenizedText, tokenize_documents
from i3lm.errors import ConfigurationError, DataError
from i3lm.evaluation import evaluate_text, next_token_loss
from i3lm.models.i3 import CarriedState, I3Config, I3ForCausalLM
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
    lengths = np.array([len(tokens)], dtype=np.uint32)
    return TokenizedText(np.array(tokens, dtype=np.uint16), 1, size, lengths)


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


# Packed rows, and labels that do not count


V = 29
ATTENTION = {
    "gpt2": GPT2Config(vocab_size=V, n_embd=8, n_layer=2, n_head=2, n_positions=24),
    "mistral": MistralConfig(
        vocab_size=V, hidden_size=8, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, sliding_window=4,
    ),
}  # fmt: skip


def peer(config: PreTrainedConfig, attention: str = "sdpa") -> nn.Module:
    """A small model of transformers in float64, without dropout."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return model.double().eval()


def packed_documents(lengths: list[int]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Documents of random ids, and what a row that holds them all gives to the loss."""
    generator = torch.Generator().manual_seed(3)
    documents = [torch.randint(0, V, (1, n + 1), generator=generator) for n in lengths]
    row = {
        "input_ids": torch.cat([d[:, :-1] for d in documents], dim=1),
        "labels": torch.cat([d[:, 1:] for d in documents], dim=1),
        "reset": torch.cat([torch.arange(n)[None] == 0 for n in lengths], dim=1),
    }
    return documents, row


def check_packed_loss(model: nn.Module, lengths: list[int], in_pieces: bool) -> None:
    """Loss and gradients of a packed row are the weighted mean of the documents' own."""
    documents, row = packed_documents(lengths)
    packed = next_token_loss(model, **row, in_pieces=in_pieces)
    alone = sum(
        next_token_loss(model, d[:, :-1], d[:, 1:], in_pieces=in_pieces) * (d.shape[1] - 1)
        for d in documents
    ) / sum(lengths)
    # Sums of float64 numbers.
    torch.testing.assert_close(packed, alone, rtol=1e-10, atol=1e-10)
    parameters = list(model.parameters())
    for got, expected in zip(
        torch.autograd.grad(packed, parameters), torch.autograd.grad(alone, parameters), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ATTENTION)
@settings(max_examples=6, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(1, 8), min_size=2, max_size=3))
def test_packed_documents_of_other_architectures_are_apart(
    name: str, attention: str, lengths: list[int]
):
    check_packed_loss(peer(ATTENTION[name], attention), lengths, in_pieces=False)


@pytest.mark.parametrize("in_pieces", [True, False])
def test_packed_documents_of_an_i3_model_are_apart(in_pieces: bool):
    model, plain = i3_and_its_logits(
        vocab_size=V, layer_types="linear_attention, full_attention", max_position_embeddings=24
    )
    check_packed_loss(model.double() if in_pieces else plain.model.double(), [1, 9, 5], True)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (MambaConfig(vocab_size=V, hidden_size=8, num_hidden_layers=1), "no position_ids"),
        (JambaConfig(vocab_size=V, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                     num_attention_heads=2, num_key_value_heads=1, use_mamba_kernels=False,
                     attn_layer_offset=0, attn_layer_period=2, expert_layer_offset=1),
         "recurrent layers"),
    ],
    ids=["mamba", "jamba"],
)  # fmt: skip
def test_models_that_cannot_keep_documents_apart_are_refused(config: PreTrainedConfig, reason: str):
    model, (_, row) = peer(config, "eager"), packed_documents([3, 4])
    with pytest.raises(ConfigurationError, match=rf"keep the documents .* apart: it has {reason}"):
        next_token_loss(model, **row, in_pieces=False)


def test_only_i3_models_go_on_from_the_row_before():
    carried = CarriedState(I3Config(layer_types="linear_attention"))
    _, row = packed_documents([7])
    with pytest.raises(ConfigurationError, match=r"^GPT2LMHeadModel cannot go on from the row be"):
        next_token_loss(peer(ATTENTION["gpt2"]), **row, in_pieces=False, carried_state=carried)


def test_a_compiled_model_is_looked_at_through_its_wrapper():
    compiled = torch.compile(peer(ATTENTION["gpt2"]), backend="eager")
    check_packed_loss(compiled, [3, 4], in_pieces=False)


def test_an_i3_model_goes_on_from_the_row_before():
    model, _ = i3_and_its_logits(
        vocab_size=V, layer_types="2 x linear_attention", position_embedding_type="none"
    )
    model.double()
    _, row = packed_documents([8, 4])
    carried, parts = CarriedState(model.config), []
    for part in (slice(0, 6), slice(6, 12)):
        piece = {name: tensor[:, part] for name, tensor in row.items()}
        parts.append(next_token_loss(model, **piece, in_pieces=True, carried_state=carried))
        carried.advance()
    whole = next_token_loss(model, **row, in_pieces=True)
    torch.testing.assert_close(sum(parts) / 2, whole, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("in_pieces", [True, False], ids=["pieces", "logits"])
def test_the_mean_is_over_the_labels_that_count(in_pieces: bool):
    model, plain = i3_and_its_logits(vocab_size=V, layer_types="linear_attention")
    scored = model if in_pieces else plain
    _, row = packed_documents([8])
    ids, labels = row["input_ids"], row["labels"]
    log_probs = model(ids, use_cache=False).logits.log_softmax(dim=-1)
    nats = -log_probs.gather(2, labels[..., None])[0, :, 0]
    masked = labels.clone()
    masked[0, 2:6] = -100
    loss = next_token_loss(scored, ids, masked, in_pieces=in_pieces)
    torch.testing.assert_close(loss, torch.cat([nats[:2], nats[6:]]).mean())
    none = next_token_loss(scored, ids, torch.full_like(labels, -100), in_pieces=in_pieces)
    none.backward()
    assert none.item() == 0
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


def test_separate_documents_score_as_each_alone():
    torch.manual_seed(0)
    config = I3Config(
        vocab_size=7, hidden_size=16, num_attention_heads=2, max_position_embeddings=16,
        layer_types="linear_attention, full_attention", initializer_range=0.5,
    )  # fmt: skip
    model = I3ForCausalLM(config)
    documents = [[0, 3, 5, 1], [0, 2, 2], [0, 4, 1, 1, 6]]
    tokens = [token for document in documents for token in document] + [0]
    text = TokenizedText(
        np.array(tokens, dtype=np.uint16), 3, 9, np.array([4, 3, 5], dtype=np.uint32)
    )
    alone = 0.0
    for document in documents:
        part = text_of([*document, 0], 1)
        score = evaluate_text(model, part, context_length=16)
        alone += score.loss * score.tokens
    together = evaluate_text(model, text, context_length=16, separate_documents=True)
    assert together.loss * together.tokens == pytest.approx(alone, rel=1e-5)
    run_on = evaluate_text(model, text, context_length=16)
    assert abs(run_on.loss * run_on.tokens - alone) > 1e-3


def test_only_what_is_learnt_is_scored():
    model = Bigram([[0.5, 0.5], [0.25, 0.75]])
    learnt = np.array([True, False, False, True])
    text = TokenizedText(np.array([0, 1, 1, 0], np.uint16), 1, 1, np.array([4], np.uint32), learnt)
    evaluation = evaluate_text(model, text, context_length=2)
    assert evaluation.tokens == 1
    assert evaluation.loss == pytest.approx(-math.log(0.25), rel=1e-6)  # the last 1 -> 0 alone
