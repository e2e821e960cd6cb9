from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from i3lm.errors import OutputError
from i3lm.inference.verification import Check, verify_model
from i3lm.models.i3 import cache_i3, modeling_i3
from i3lm.ops.dispatch import use_implementation
from i3lm.ops.wkv import WKV
from tests.models.tiny_i3 import KINDS, make_model

pytestmark = pytest.mark.usefixtures("one_thread")

INVARIANCES = [
    "batch = single",
    "left pad = none",
    "chunked prefill = full forward",
    "decode = parallel forward",
    "split state = whole",
    "saved and read back = native",
    "torch.export = native",
]


def outcomes(model: Any, precision: str = "fp32") -> dict[str, Check]:
    return {check.name: check for check in verify_model(model, precision)}


def failures(model: Any) -> set[str]:
    return {name for name, check in outcomes(model).items() if check.passed is False}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("kind", KINDS)
def test_our_models_hold(kind: str, precision: str):
    found = outcomes(make_model(kind), precision)
    op = {"rwkv4": "wkv", "state_space": "state_space"}[KINDS[kind].get("recurrence", "rwkv4")]
    kernels = [f"{op} {name} = reference" for name in ("numba", "triton", "scan")]
    if kind == "all attention":
        kernels = ["kernels = reference"]
    assert list(found) == INVARIANCES + kernels
    for name, check in found.items():
        if name.endswith("triton = reference") or name == "kernels = reference":
            assert (check.passed, check.difference) == (None, None)
            assert check.reason in (
                "runs on CUDA devices, not on cpu",
                "Triton is not installed (pip install triton)",
                "the model has no recurrent layers",
            )
            continue
        assert check.passed is True, check
        assert check.difference is not None
        assert (
            check.difference
            <= check.tolerance
            == {"fp32": 1e-4, "bf16": 3e-2, "fp16": 4e-3}[precision]
        )


def test_a_model_of_another_architecture():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=11, n_positions=40, n_embd=8, n_layer=2, n_head=2)
    found = outcomes(GPT2LMHeadModel(config).eval())
    assert {name for name, check in found.items() if check.passed} >= set(INVARIANCES[:-1])
    assert found["kernels = reference"].reason == "the model has no recurrent layers"


def test_a_context_of_two():
    found = outcomes(make_model("rwkv4", max_position_embeddings=2))
    assert found["left pad = none"].reason == "the context of 2 leaves no room for padding"
    assert found["decode = parallel forward"].passed


# Broken on purpose


def _lose(slot: int) -> Callable[..., None]:
    def write(cache: Any, layer_idx: int, written: int, state: Any) -> None:
        cache_i3.write_state(cache, layer_idx, written, state * (written != slot))

    return write


@pytest.mark.parametrize("slot", [0, 1, 2])
def test_a_state_that_is_lost(slot: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(modeling_i3, "write_state", _lose(slot))
    assert failures(make_model("rwkv4")) >= {
        "left pad = none",
        "chunked prefill = full forward",
        "decode = parallel forward",
    }


def test_padding_that_changes_the_state(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(modeling_i3, "padding_mask", lambda *arguments: None)
    assert failures(make_model("rwkv4")) == {"left pad = none"}


def test_rows_that_see_each_other(monkeypatch: pytest.MonkeyPatch):
    forward = modeling_i3.I3DecoderLayer.forward

    def leak(self: Any, x: torch.Tensor, **options: Any) -> torch.Tensor:
        return forward(self, x + 0.01 * x.mean(dim=0), **options)

    monkeypatch.setattr(modeling_i3.I3DecoderLayer, "forward", leak)
    assert "batch = single" in failures(make_model("state_space"))


@pytest.mark.parametrize("kind", ["rwkv4", "state_space"])
def test_a_cache_that_forgets_keys(kind: str, monkeypatch: pytest.MonkeyPatch):
    update = modeling_i3.I3Cache.update

    def forget(self: Any, keys: torch.Tensor, values: torch.Tensor, *rest: Any, **options: Any):
        update(self, keys, values, *rest, **options)
        return keys, values

    monkeypatch.setattr(modeling_i3.I3Cache, "update", forget)
    with use_implementation(decoding_step="modules"):  # whose kernels write keys themselves
        found = outcomes(make_model(kind))
    # The mask no longer fits the keys, which PyTorch refuses.
    assert found["decode = parallel forward"].passed is False
    assert found["chunked prefill = full forward"].passed is False


def test_a_state_that_depends_on_the_pieces(monkeypatch: pytest.MonkeyPatch):
    def write(cache: Any, layer_idx: int, slot: int, state: Any) -> None:
        cache_i3.write_state(cache, layer_idx, slot, state + 1e-3)

    monkeypatch.setattr(modeling_i3, "write_state", write)
    assert "split state = whole" in failures(make_model("all state_space"))


def test_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch):
    scan = WKV.named("scan")
    forward = scan.forward

    def wrong(*inputs: Any) -> tuple[torch.Tensor, ...]:
        output, state = forward(*inputs)
        return output * 1.01, state

    object.__setattr__(scan, "forward", wrong)
    try:
        assert failures(make_model("rwkv4")) == {"wkv scan = reference"}
    finally:
        object.__setattr__(scan, "forward", forward)


def test_weights_that_are_not_saved(monkeypatch: pytest.MonkeyPatch):
    save = modeling_i3.I3ForCausalLM.save_pretrained

    def damage(self: Any, folder: str) -> None:
        weight = self.model.norm.weight.detach()
        kept = weight.clone()
        weight += 0.01
        save(self, folder)
        weight.copy_(kept)

    monkeypatch.setattr(modeling_i3.I3ForCausalLM, "save_pretrained", damage)
    assert failures(make_model("rwkv4")) == {"saved and read back = native"}


def test_logits_that_are_not_numbers():
    model = make_model("rwkv4")
    with torch.no_grad():
        model.model.norm.bias[0] = float("nan")
    assert failures(model) >= set(INVARIANCES[:4])


def test_a_copy_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(modeling_i3.I3ForCausalLM, "save_pretrained", fail)
    with pytest.raises(OutputError, match=r"cannot be written \(.*\): set TMPDIR to"):
        outcomes(make_model("rwkv4"))
