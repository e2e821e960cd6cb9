from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch

from i3lm.ops.dispatch import (
    Implementation,
    Op,
    accumulation_dtype,
    full_precision,
    use_implementation,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def refuse_cpu(device: torch.device, dtype: torch.dtype) -> str | None:
    return "needs a GPU" if device.type == "cpu" else None


def refuse_float64(device: torch.device, dtype: torch.dtype) -> str | None:
    return f"computes in float32, not in {dtype}" if dtype == torch.float64 else None


@pytest.fixture
def op() -> Op:
    return Op(
        "wave",
        [
            Implementation("gpu", str, refuses=refuse_cpu),
            Implementation("quick", str, refuses=refuse_float64),
            Implementation("reference", str),
        ],
    )


def test_the_first_that_accepts_is_taken_and_the_reason_given(op: Op):
    assert op.names == ["gpu", "quick", "reference"]
    on_gpu = op.choose(CUDA, torch.float32)
    assert on_gpu.implementation.name == "gpu"
    assert on_gpu.reason == "the fastest there is for this device and dtype"
    on_cpu = op.choose(CPU, torch.float32)
    assert on_cpu.implementation.name == "quick"
    assert on_cpu.reason == "gpu: needs a GPU"
    exact = op.choose(CPU, torch.float64)
    assert exact.implementation.name == "reference"
    assert exact.reason == "gpu: needs a GPU; quick: computes in float32, not in torch.float64"


def test_the_argument_goes_before_the_override_and_the_override_before_the_best(op: Op):
    with use_implementation(wave="reference"):
        choice = op.choose(CPU, torch.float32)
        assert (choice.implementation.name, choice.reason) == (
            "reference",
            "asked for by an override",
        )
        choice = op.choose(CPU, torch.float32, "quick")
        assert (choice.implementation.name, choice.reason) == ("quick", "asked for by the call")
    assert op.choose(CPU, torch.float32).implementation.name == "quick"


def test_overrides_nest_and_touch_only_the_ops_they_name(op: Op):
    with use_implementation(wave="reference"):
        with use_implementation(other="quick"):
            assert op.choose(CPU, torch.float32).implementation.name == "reference"
            with use_implementation(wave="quick"):
                assert op.choose(CPU, torch.float32).implementation.name == "quick"
        assert op.choose(CPU, torch.float32).implementation.name == "reference"


def test_an_override_ends_with_its_block_even_after_an_error(op: Op):
    with pytest.raises(RuntimeError, match="stop"), use_implementation(wave="reference"):
        raise RuntimeError("stop")
    assert op.choose(CPU, torch.float32).implementation.name == "quick"


def test_an_unknown_name_is_refused_with_the_known_ones(op: Op):
    message = r"^wave has no implementation 'fats'; it has gpu, quick, reference$"
    with pytest.raises(ValueError, match=message):
        op.choose(CPU, torch.float32, "fats")
    with use_implementation(wave="fats"), pytest.raises(ValueError, match=message):
        op.choose(CPU, torch.float32)


def test_a_named_implementation_that_refuses_says_why(op: Op):
    with pytest.raises(ValueError, match=r"^wave: implementation 'gpu' refuses: needs a GPU$"):
        op.choose(CPU, torch.float32, "gpu")


def test_nothing_that_accepts_is_an_error():
    op = Op("wave", [Implementation("gpu", str, refuses=refuse_cpu)])
    with pytest.raises(ValueError, match=r"no implementation of wave accepts torch.float16 on cpu"):
        op.choose(CPU, torch.float16)


def test_a_choice_is_logged_once_with_its_reason(op: Op, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, logger="i3lm"):
        for _ in range(3):
            op.choose(CPU, torch.float32)
    assert caplog.messages == ["wave runs as quick (gpu: needs a GPU)"]


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_recurrences_accumulate_in_float32_or_float64(dtype: torch.dtype, expected: torch.dtype):
    assert accumulation_dtype(dtype) == expected


def test_full_precision_switches_autocast_off_for_its_block():
    x = torch.ones(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        with full_precision(CPU):
            assert (x @ x).dtype == torch.float32
        assert (x @ x).dtype == torch.bfloat16


def test_a_broken_numba_leaves_the_ops_to_scan_and_says_why():
    program = """
import sys
sys.modules["i3lm.ops.numba_bridge"] = None  # its import raises
import torch
from i3lm.ops.self_check import RECURRENCES
for name, op in RECURRENCES.items():
    choice = op.choose(torch.device("cpu"), torch.float32)
    print(name, choice.implementation.name, choice.reason, sep="|")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120
    )
    for line in done.stdout.splitlines():
        _, chosen, reason = line.split("|")
        assert chosen == "scan", line
        assert "numba: numba does not work here (ModuleNotFoundError: " in reason, line
    assert len(done.stdout.splitlines()) == 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_broken_numba_stops_neither_a_loss_nor_decoding(dtype: str):
    program = f"""
import sys
sys.modules["i3lm.ops.numba_bridge"] = None  # its import raises
import torch
from i3lm.ops import linear, linear_cross_entropy
x, weight = torch.ones(2, 3).to(torch.{dtype}), torch.ones(5, 3).to(torch.{dtype})
loss = linear_cross_entropy(x.requires_grad_(), weight, None, torch.tensor([0, 4]))
loss.backward()
with torch.no_grad():
    print(round(loss.item(), 4), linear(x, weight).sum().item())
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, "1.6094 30.0\n"), done.stderr
