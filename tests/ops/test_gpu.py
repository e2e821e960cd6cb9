"""The kernels on a CUDA device; `test_wkv.py` and `test_state_space.py` have the properties."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from i3lm.ops.dispatch import TRITON_INTERPRETS
from i3lm.ops.self_check import RECURRENCES, TOLERANCE, largest_difference
from tests.ops import test_state_space, test_wkv

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _device():
    assert torch.cuda.is_available() or TRITON_INTERPRETS, "this test needs a CUDA device"


@pytest.mark.parametrize("op", RECURRENCES)
@pytest.mark.parametrize("kernel", ["triton", "scan"])
def test_kernels_agree_with_the_reference_on_a_gpu(op: str, kernel: str):
    assert largest_difference(op, kernel, "cuda") <= TOLERANCE


@pytest.mark.parametrize("op", RECURRENCES)
def test_triton_is_what_runs_on_a_gpu(op: str):
    choice = RECURRENCES[op].choose(torch.device("cuda"), torch.float32)
    assert choice.implementation.name == "triton"


def check(op: str) -> None:
    """Holds the kernels against the reference, across tiles of steps and of channels."""
    rest = ("reset and mask", False, True)
    if op == "wkv":
        test_wkv.check_against_reference("triton", torch.float32, 1, 40, 6, *rest)
    else:
        test_state_space.check_against_reference("triton", torch.float32, (1, 40, 6, 5), *rest)


def tuned_kernels(op: str) -> list[Any]:
    """The kernels of an op whose tiles are chosen by measuring."""
    from triton.runtime.autotuner import Autotuner

    kernels = vars(importlib.import_module(f"i3lm.ops.{op}.triton")).values()
    return [kernel for kernel in kernels if isinstance(kernel, Autotuner)]


def tiles() -> list[Any]:
    """All settings that may be chosen, and one that never is."""
    import triton

    from i3lm.ops.triton_bridge import CONFIGURATIONS

    return [*CONFIGURATIONS, triton.Config({"L": 32, "BLOCK": 8}, num_warps=4)]


@pytest.mark.parametrize("op", RECURRENCES)
def test_tiles_do_not_matter(op: str, monkeypatch: pytest.MonkeyPatch):
    for settings in tiles():
        for kernel in tuned_kernels(op):
            monkeypatch.setattr(kernel, "configs", [settings])
        check(op)


@pytest.mark.parametrize("op", RECURRENCES)
def test_tiles_are_measured_without_a_trace(op: str, monkeypatch: pytest.MonkeyPatch):
    runs = []

    def measure(run: Any, quantiles: Any) -> list[float]:
        run()
        run()
        runs.append(run)
        return [float(len(runs))] * 3

    kernels = tuned_kernels(op)
    for kernel in kernels:
        monkeypatch.setattr(kernel, "configs", [tiles()[0], tiles()[-1]])
        monkeypatch.setattr(kernel, "early_config_prune", None)  # which spares small problems
        monkeypatch.setattr(kernel, "cache", {})
        monkeypatch.setattr(kernel, "cache_results", False)
        monkeypatch.setitem(vars(kernel), "do_bench", measure)
    check(op)
    assert len(runs) == 2 * len(kernels) == 4
