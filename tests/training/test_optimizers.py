from __future__ import annotations

import copy
import io
import re
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM

from i3lm.cli import main
from i3lm.errors import ConfigurationError
from i3lm.presets import make_config
from i3lm.training.optimizers import (
    STATE_DTYPES,
    MuonWithAdamW,
    OnePassAdamW,
    leave_gradients_small,
    make_optimizer,
    model_groups,
)
from i3lm.training.options import TrainingOptions
from tests.cli.test_train import losses
from tests.conftest import TINY_TRAINING

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = {"vocab_size": 32, "hidden_size": 16, "num_attention_heads": 2}
KINDS = {
    "rwkv4": {"layer_types": "linear_attention, full_attention"},
    "state_space": {"layer_types": "2 x hybrid", "recurrence": "state_space", "low_rank": 4},
}
IDS = torch.arange(64).view(2, 32).remainder(32)


def tiny_model(kind: str = "rwkv4") -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make_config({**TINY, **KINDS[kind]}))
    with torch.no_grad():
        for parameter in model.parameters():  # some begin at zero, and hide others' gradients
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def optimizer_of(model: nn.Module, name: str = "muon", rate: float = 1e-2):
    settings = {"weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "fused": True}
    return make_optimizer(name, model, learning_rate=rate, **settings)


def train(model: nn.Module, optimizer, schedule=None, steps: int = 5) -> list[float]:
    values = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        optimizer.zero_grad()
        values.append(loss.item())
    return values


@pytest.mark.parametrize("kind", KINDS)
def test_muon_moves_matrices_and_adamw_the_rest(kind: str):
    model = tiny_model(kind)
    apart = copy.deepcopy(model)
    optimizer = optimizer_of(model)
    ours = train(model, optimizer)
    groups = {group["role"]: group["params"] for group in apart.parameter_groups(0.1)}
    assert all(p.dim() == 2 for p in groups["matrix"])
    muon = torch.optim.Muon(
        groups["matrix"], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    others = [
        {"params": groups["head"], "weight_decay": 0.1},
        {"params": groups["other"], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(others, lr=1e-2, betas=(0.9, 0.95), fused=True)
    expected = []
    for _ in range(5):
        loss = apart(input_ids=IDS, labels=IDS).loss
        loss.backward()
        for part in (muon, adamw):
            part.step()
            part.zero_grad()
        expected.append(loss.item())
    assert ours == expected
    for one, other in zip(model.parameters(), apart.parameters(), strict=True):
        assert one.equal(other)


def test_one_learning_rate_serves_both_parts():
    """The size of Muon's updates is that of AdamW's usual ones, 0.2 to 0.4 of the rate."""
    model = tiny_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer(
        "muon", model, learning_rate=1e-3, weight_decay=0.0, betas=(0.9, 0.95), eps=1e-8, fused=True
    )
    train(model, optimizer, steps=1)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = next(n for n, p in model.named_parameters() if p is parameter)
            if group["role"] == "matrix" and min(parameter.shape) == max(parameter.shape):
                size = (parameter - before[name]).square().mean().sqrt() / 1e-3
                assert 0.1 < size < 0.3, name


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_loss_falls_and_a_model_without_groups_of_its_own_trains(name: str):
    fields = {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 32}
    for model in (tiny_model(), AutoModelForCausalLM.from_config(make_config(fields))):
        values = train(model, optimizer_of(model, name), steps=30)
        assert values[-1] < values[0] - 0.5


def test_transposed_matrices_of_gpt2_decay_and_its_tied_head_does_not():
    fields = {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 32}
    model = AutoModelForCausalLM.from_config(make_config(fields))
    names = {id(p): name for name, p in model.named_parameters()}
    groups = {g["role"]: {names[id(p)] for p in g["params"]} for g in model_groups(model, 0.1)}
    assert "transformer.h.0.attn.c_attn.weight" in groups["matrix"]
    assert {"transformer.wte.weight", "transformer.wpe.weight"} <= groups["other"]
    assert "head" not in groups


def test_a_model_sorts_its_own_parameters():
    model = nn.Linear(2, 2)
    model.parameter_groups = lambda weight_decay: [
        {"params": [model.weight, model.bias], "role": "other", "weight_decay": weight_decay / 2}
    ]
    assert optimizer_of(model, "adamw").param_groups[0]["weight_decay"] == 0.05


@pytest.mark.parametrize("name", ["muon", "adamw"])
@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_it_goes_on_bit_for_bit(kind: str, name: str):
    def begin():
        model = tiny_model(kind)
        optimizer = optimizer_of(model, name)
        return model, optimizer, LambdaLR(optimizer, lambda step: 1 / (1 + step))

    straight, optimizer, schedule = begin()
    train(straight, optimizer, schedule, steps=3)
    buffer = io.BytesIO()
    torch.save((straight.state_dict(), optimizer.state_dict(), schedule.state_dict()), buffer)
    expected = train(straight, optimizer, schedule, steps=3)

    buffer.seek(0)
    states = torch.load(buffer, weights_only=True)
    resumed, *parts = begin()
    for part, state in zip((resumed, *parts), states, strict=True):
        part.load_state_dict(state)
    assert train(resumed, *parts, steps=3) == expected
    for ours, theirs in zip(resumed.parameters(), straight.parameters(), strict=True):
        assert ours.equal(theirs)


def test_adamw_in_one_pass_is_clipping_and_adamw():
    """The same up to last bits, over steps of which some are clipped and some are not."""
    model = tiny_model()
    apart = copy.deepcopy(model)
    ours = optimizer_of(model, "adamw", rate=1e-3)
    assert isinstance(ours, OnePassAdamW)
    groups = apart.parameter_groups(0.1)
    theirs = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    clipped = []
    for step in range(6):
        (model(input_ids=IDS, labels=IDS).loss * (0.01 if step % 2 else 10)).backward()
        for one, other in zip(model.parameters(), apart.parameters(), strict=True):
            other.grad = one.grad.clone()
        norm = ours.clip_grad_norm(1.0)
        for one, other in zip(model.parameters(), apart.parameters(), strict=True):
            assert one.grad.equal(other.grad)
        expected = nn.utils.clip_grad_norm_(apart.parameters(), 1.0)
        torch.testing.assert_close(norm, expected, rtol=1e-5, atol=0)
        clipped.append(norm.item() > 1)
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
    assert set(clipped) == {True, False}
    for one, other in zip(model.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    # A clipped step leaves the next one alone, and the state is PyTorch's own.
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())


@pytest.mark.parametrize("before", STATE_DTYPES.values(), ids=str)
@pytest.mark.parametrize("after", STATE_DTYPES.values(), ids=str)
def test_one_pass_takes_averages_of_any_kind(before: torch.dtype, after: torch.dtype):
    """As near as the narrower of the two; of the same kind bit for bit."""
    parameter = nn.Parameter(torch.randn(37, 11, generator=torch.Generator().manual_seed(0)))
    one, other, wide = (
        OnePassAdamW([parameter], dtype) for dtype in (before, after, torch.float32)
    )
    for _ in range(2):
        parameter.grad = torch.randn(37, 11, generator=torch.Generator().manual_seed(1))
        one.step()
    other.load_state_dict(one.state_dict())
    wide.load_state_dict(other.state_dict())
    direct = OnePassAdamW([parameter])
    direct.load_state_dict(one.state_dict())
    for name in ("exp_avg", "exp_avg_sq"):
        kept, got = one.state[parameter][name], other.state[parameter][name]
        assert got.dtype == after
        assert before != after or got.equal(kept)
        averages = wide.state[parameter][name], direct.state[parameter][name]
        assert {x.shape for x in averages} == {parameter.shape}
        torch.testing.assert_close(*averages, rtol=1 / 16, atol=1e-5)
    assert direct.state[parameter]["exp_avg_sq"].count_nonzero() == parameter.numel()


def test_averages_in_8_bits_go_on_in_the_adamw_of_pytorch():
    """As where no kernel serves; a parameter without a state stays without one."""
    matrix, vector = nn.Parameter(torch.ones(37, 11)), nn.Parameter(torch.ones(37))
    ours = OnePassAdamW([{"params": [matrix]}, {"params": [vector]}], torch.uint8)
    matrix.grad = torch.randn(37, 11, generator=torch.Generator().manual_seed(1))
    ours.step()
    saved = ours.state_dict()
    saved["state"].pop(1)
    settings = {"weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "fused": False}
    model = nn.Linear(11, 37).double()
    plain = make_optimizer("adamw", model, learning_rate=1e-3, **settings)
    plain.load_state_dict(saved)
    average = plain.state[model.weight]["exp_avg"]
    torch.testing.assert_close(average, 0.1 * matrix.grad.double(), rtol=1 / 8, atol=1e-5)
    assert model.bias not in plain.state
    assert saved["state"][0]["exp_avg"].dtype == torch.uint8  # what is loaded stays as it was
    model(torch.ones(2, 11).double()).sum().backward()
    plain.step()


def test_averages_of_other_shapes_are_refused():
    one, other = (nn.Parameter(torch.ones(shape)) for shape in ((37, 12), (37, 11)))
    wide, narrow = OnePassAdamW([one]), OnePassAdamW([other], torch.uint8)
    with pytest.raises(ValueError, match=r"shape \(37, 12\) is not that .* shape \(37, 11\)"):
        narrow.load_state_dict(wide.state_dict())


def test_one_pass_is_copied_whole_and_passes_over_empty_steps():
    parameter = nn.Parameter(torch.ones(37, 11))
    optimizer = OnePassAdamW([parameter], torch.uint8)
    assert optimizer.step(lambda: torch.tensor(3.0)) == 3
    copied = copy.deepcopy(optimizer)
    (twin,) = copied.param_groups[0]["params"]
    for one, p in ((optimizer, parameter), (copied, twin)):
        p.grad = torch.randn(37, 11, generator=torch.Generator().manual_seed(1))
        one.step()
    assert twin is not parameter
    assert twin.equal(parameter)
    assert copied.state_dtype == torch.uint8


def test_one_pass_takes_a_sparse_gradient_for_a_dense_one():
    """Bit for bit, over clipped steps whose batches have other ids; it stays sparse."""
    results = []
    for small in (False, True):
        model = tiny_model()
        optimizer = optimizer_of(model, "adamw")
        if small:
            leave_gradients_small(model)
        for step in range(4):
            ids = IDS[:, step : step + 5] // 2
            (3 * model(input_ids=ids, labels=ids).loss).backward()
            optimizer.clip_grad_norm(1.0)
            optimizer.step()
            assert model.model.embed_tokens.weight.grad.is_sparse == small
            optimizer.zero_grad()
        results.append([*model.parameters()])
    assert all(one.equal(other) for one, other in zip(*results, strict=True))


def test_one_pass_passes_over_parameters_without_a_gradient():
    model = tiny_model()
    optimizer = optimizer_of(model, "adamw")
    first, *others = model.parameters()
    first.grad = torch.ones_like(first)
    before = [p.detach().clone() for p in others]
    optimizer.step()
    assert all(p.equal(b) for p, b in zip(others, before, strict=True))
    assert optimizer.state[first]["step"] == 1
    for parameter in others:
        assert not any(value.any() for value in optimizer.state[parameter].values())


def test_one_pass_takes_parameters_and_states_that_come_later():
    first, second = (nn.Parameter(torch.ones(40)) for _ in range(2))
    optimizer = OnePassAdamW([{"params": [first]}], lr=0.1)
    saved = optimizer.state_dict()
    optimizer.add_param_group({"params": [second]})
    first.grad, second.grad = torch.ones(40), torch.ones(40)
    optimizer.step()
    assert first.equal(second)
    other = OnePassAdamW([{"params": [first]}], lr=0.1)
    other.load_state_dict({**saved, "state": {}})  # as PyTorch's before its first step
    other.step()
    assert not first.equal(second)


def test_parameters_that_no_kernel_serves_get_the_adamw_of_pytorch():
    assert type(optimizer_of(tiny_model().double(), "adamw")) is torch.optim.AdamW
    model = nn.Linear(3, 4)
    model.weight = nn.Parameter(torch.zeros(3, 4).T)  # not contiguous
    assert type(optimizer_of(model, "adamw")) is torch.optim.AdamW


@pytest.mark.parametrize("kind", KINDS)
def test_small_gradients_are_those_that_products_give(kind: str):
    """Bit for bit: the gradients of matrices alone stay in bfloat16, and lose nothing by it.

    Those of the embeddings have a row per token.
    """
    model = tiny_model(kind)
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=IDS, shift_labels=IDS, skip_logits=True).loss.backward()
    wide = {name: p.grad for name, p in model.named_parameters()}
    assert {grad.dtype for grad in wide.values()} == {torch.float32}
    model.zero_grad()
    leave_gradients_small(model)
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=IDS, shift_labels=IDS, skip_logits=True).loss.backward()
    kinds = set()
    for name, p in model.named_parameters():
        assert p.grad.to_dense().float().equal(wide[name]), name
        assert p.grad.is_sparse == (".embed_" in name)
        kinds.add((p.dim() == 2, p.grad.dtype))
    assert (True, torch.bfloat16) in kinds
    embedding = model.model.embed_tokens.weight.grad
    assert (embedding.dtype, embedding._nnz()) == (torch.float32, IDS.numel())
    assert (False, torch.bfloat16) not in kinds


def test_a_tied_head_keeps_gradients_in_float32_and_whole():
    torch.manual_seed(0)
    fields = {**TINY, **KINDS["rwkv4"], "tie_word_embeddings": True}
    model = AutoModelForCausalLM.from_config(make_config(fields))
    leave_gradients_small(model)
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=IDS, shift_labels=IDS, skip_logits=True).loss.backward()
    assert model.lm_head.weight.grad.dtype == torch.float32
    assert not model.lm_head.weight.grad.is_sparse
    assert model.model.layers[0].mixer.key.weight.grad.dtype == torch.bfloat16


def test_a_schedule_scales_both_parts():
    model = tiny_model()
    optimizer = optimizer_of(model, rate=1.0)
    schedule = LambdaLR(optimizer, lambda step: 0.0)
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, schedule, steps=2)
    assert [group["lr"] for group in optimizer.param_groups] == [0.0] * 3
    assert all(p.equal(b) for p, b in zip(model.parameters(), before, strict=True))


def test_under_accelerate_with_a_loss_scaler():
    """An overflow in any part skips the step of both; the next one is taken."""
    accelerator = Accelerator(cpu=True)
    try:
        model = tiny_model()
        bare = optimizer_of(model)
        assert isinstance(bare, MuonWithAdamW)
        model, optimizer = accelerator.prepare(model, bare)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        before = [p.detach().clone() for p in model.parameters()]
        for poison in (True, False):
            scaler.scale(model(input_ids=IDS, labels=IDS).loss).backward()
            if poison:
                bare.param_groups[-1]["params"][0].grad.flatten()[0] = float("inf")
            scaler.unscale_(bare)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(bare)
            scaler.update()
            optimizer.zero_grad()
            same = [p.equal(b) for p, b in zip(model.parameters(), before, strict=True)]
            assert all(same) if poison else not any(same[:1])
        assert all(p.grad is None for p in model.parameters())
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(
    "chosen", ["optimizer=muon", "optimizer_state=bf16", "optimizer_state=fp8"]
)
def test_a_run_resumes_exactly(chosen: str, tmp_path: Path):
    name, value = chosen.split("=")
    options = [*TINY_TRAINING, f"--training.{name}", value, "--training.max_steps", "12"]
    options += ["--training.save_every", "5"]
    straight, run = tmp_path / "straight", tmp_path / "run"
    for output in (straight, run):
        assert main(["train", "--output", str(output), *options]) == 0
    for checkpoint in (run / "checkpoints").glob("checkpoint-1*"):
        shutil.rmtree(checkpoint)
    (run / "metrics.jsonl").write_text("")
    assert main(["train", "--output", str(run), "--resume", *options]) == 0
    tail = {step: loss for step, loss in losses(straight).items() if step > 5}
    assert losses(run) == tail
    assert losses(straight)[12] < losses(straight)[1] - 0.3
    if name == "optimizer_state":
        state = torch.load(run / "checkpoints" / "checkpoint-12" / "optimizer.pt")["state"]
        kinds = {entry[k].dtype for entry in state.values() for k in ("exp_avg", "exp_avg_sq")}
        assert kinds == {STATE_DTYPES[value]}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"optimizer_state": "int8"}, "(int8) must be one of fp32, bf16, fp8"),
        ({"optimizer_state": "fp8", "optimizer": "muon"}, "goes with training.optimizer adamw"),
    ],
)
def test_states_that_cannot_be(options: dict[str, str], reason: str):
    with pytest.raises(ConfigurationError, match=re.escape(reason)):
        TrainingOptions(**options)


def test_a_narrow_state_needs_the_kernel():
    settings = {"weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "fused": True}
    with pytest.raises(ConfigurationError, match=r"optimizer_state \(bf16\) is for weights in"):
        make_optimizer("adamw", nn.Linear(2, 2).double(), learning_rate=1, state="bf16", **settings)


def test_a_narrow_state_on_shards_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = [*TINY_TRAINING, "--training.optimizer_state", "bf16", "--training.sharding", "full"]
    assert main(["train", "--output", str(tmp_path / "run"), *options]) == 2
    assert capsys.readouterr().err == (
        "i3lm train: error: training.optimizer_state (bf16) is for a CPU and whole models, not "
        "with training.sharding full: choose fp32\n"
    )
    assert not (tmp_path / "run").exists()


def test_unknown_optimizer_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = [*TINY_TRAINING, "--training.optimizer", "sgd"]
    assert main(["train", "--output", str(tmp_path / "run"), *options]) == 2
    assert capsys.readouterr().err == (
        "i3lm train: error: training.optimizer (sgd) must be one of adamw, muon\n"
    )
