from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from i3lm.errors import CheckpointError, ConfigurationError
from i3lm.inference import SamplingOptions, TextGenerator
from i3lm.inference import int8_linear as int8_linear_module
from i3lm.inference.int8_linear import Int8Linear, use_int8_products
from i3lm.inference.loading import load_checkpoint
from i3lm.inference.quantization import (
    check_can_load,
    check_can_quantize,
    quantize_checkpoint,
    quantized_parameters,
)
from i3lm.inference.sessions import Session, model_fingerprint
from i3lm.ops.dispatch import use_implementation
from tests.models.tiny_i3 import KINDS, draw_ids, make_config, make_model

pytest.importorskip("torchao")
pytestmark = pytest.mark.usefixtures("one_thread")

every_kind = pytest.mark.parametrize("kind", KINDS)


def quantized(kind: str, folder: Path, **changes: Any) -> tuple[Any, Any]:
    """A tiny model, and the same with int8 weights, read back from its folder."""
    model = make_model(kind, **changes)
    model.save_pretrained(folder / "full")
    quantize_checkpoint(folder / "full").save_pretrained(folder / "int8")
    return model, AutoModelForCausalLM.from_pretrained(folder / "int8").eval()


@every_kind
def test_the_result_is_the_model_with_rounded_weights(kind: str, tmp_path: Path):
    model, small = quantized(kind, tmp_path)
    weights = dict(small.named_parameters())
    with torch.no_grad():
        for name, weight in model.named_parameters():
            other = weights[name]
            if not hasattr(other, "qdata"):
                torch.testing.assert_close(other, weight, atol=0, rtol=0)
                continue
            # Half a step of 255 steps between the row's extremes, and the fp32 scale's rounding.
            step = weight.abs().amax(dim=1, keepdim=True) / 127.5
            other = other.dequantize()
            assert bool(((other - weight).abs() <= 0.501 * step).all()), name
            weight.copy_(other)
    ids = draw_ids(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(small(ids).logits, model(ids).logits, atol=1e-5, rtol=0)
        in_pieces = {"shift_labels": draw_ids(2, 9), "skip_logits": True}
        torch.testing.assert_close(small(ids, **in_pieces).loss, model(ids, **in_pieces).loss)


@every_kind
def test_all_matrices_of_linear_maps_are_quantised_and_nothing_else(kind: str, tmp_path: Path):
    model, small = quantized(kind, tmp_path)
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    assert quantized_parameters(small) == linear > 0
    assert small.model.embed_tokens.weight.dtype == torch.float32
    assert not hasattr(small.model.embed_tokens.weight, "qdata")
    maps = sum(isinstance(m, torch.nn.Linear) for m in model.modules())
    assert use_int8_products(small) == maps


def test_a_head_that_shares_the_embedding_stays_with_it(tmp_path: Path):
    _, small = quantized("rwkv4", tmp_path, tie_word_embeddings=True)
    assert small.lm_head.weight is small.model.embed_tokens.weight
    assert quantized_parameters(small) > 0


@pytest.mark.parametrize("rows", [1, 2, 15, 16, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(12, 12), (48, 37), (33, 301), (2, 5)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_products(rows: int, dtype: torch.dtype, shape: tuple[int, int], with_bias: bool):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    torch.manual_seed(rows)
    model = torch.nn.Sequential(torch.nn.Linear(*shape, bias=with_bias))
    quantize_(model, Int8WeightOnlyConfig(version=2))
    weight, bias = model[0].weight.dequantize(), model[0].bias
    assert use_int8_products(model) == 1
    assert type(model[0]) is Int8Linear
    x = torch.randn(1, rows, shape[0], dtype=dtype)
    expected = torch.nn.functional.linear(
        x.double(), weight.double(), None if bias is None else bias.double()
    )
    if dtype == torch.bfloat16 and rows >= 16 and with_bias:
        model.bfloat16()  # as a bfloat16 model has it
    with torch.no_grad():
        y = model(x)
    assert (y.dtype, y.shape) == (dtype, (1, rows, shape[1]))
    # float32 sums of up to 48 terms; in bfloat16, weights and results of 8 bits.
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(y.double(), expected, atol=tolerance, rtol=tolerance)


def test_gradients_flow_through_to_the_input(tmp_path: Path):
    _, small = quantized("rwkv4", tmp_path)
    use_int8_products(small)
    embeds = torch.randn(1, 3, 12, requires_grad=True)
    small(inputs_embeds=embeds).logits.sum().backward()
    assert embeds.grad is not None
    assert bool(embeds.grad.any())


def test_loading_runs_the_fast_products_and_sessions_work(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from i3lm.tokenizers import load_tokenizer

    quantize_checkpoint(tiny_run / "best").save_pretrained(tmp_path / "int8")
    load_tokenizer(tiny_run / "best").save_pretrained(tmp_path / "int8")
    model, tokenizer = load_checkpoint(tmp_path / "int8")
    calls: list[int] = []
    kernel = int8_linear_module.few_rows
    monkeypatch.setattr(
        int8_linear_module, "few_rows", lambda x, *rest: (calls.append(len(x)), kernel(x, *rest))[1]
    )
    generator = TextGenerator(model, tokenizer)
    with use_implementation(decoding_step="modules"):  # its kernels take several products at once
        generator.complete("Once", SamplingOptions(3, temperature=0))
    linear = sum(type(module) is Int8Linear for module in model.modules())
    # The prompt's four rows, and the head's one; then single rows.
    assert sorted(calls) == [1] * (2 * linear + 1) + [4] * (linear - 1)

    again, _ = load_checkpoint(tmp_path / "int8")
    assert model_fingerprint(again) == model_fingerprint(model)
    session = Session(generator)
    session.say("Once", SamplingOptions(3))
    session.save(tmp_path / "s")
    assert Session.load(tmp_path / "s", TextGenerator(again, tokenizer)).tokens == session.tokens


# What cannot be done


def test_quantising_what_is_quantised(tmp_path: Path):
    _, small = quantized("rwkv4", tmp_path)
    with pytest.raises(CheckpointError, match=r"here: is quantised already \(by torchao\): quant"):
        check_can_quantize(small.config, "here")


def test_torchao_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    _, small = quantized("rwkv4", tmp_path)
    monkeypatch.setattr("i3lm.inference.quantization.has_torchao", lambda: False)
    with pytest.raises(ConfigurationError, match=r"torchao, which is not installed: pip install"):
        check_can_quantize(make_config("rwkv4"), "here")
    with pytest.raises(CheckpointError, match=r"here: is quantised, and reading it needs torchao"):
        check_can_load(small.config, "here")
    check_can_load(make_config("rwkv4"), "here")


def test_a_model_without_linear_maps(tmp_path: Path):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(
        GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    ).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="a gpt2 model without linear maps that could be"):
        quantize_checkpoint(tmp_path)
