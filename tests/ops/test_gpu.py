"""The kernels on a CUDA device."""

from __future__ import annotations

import pytest
import torch

from i3lm.ops.self_check import RECURRENCES, TOLERANCE, largest_difference

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("op", RECURRENCES)
@pytest.mark.parametrize("name", ["triton", "scan"])
def test_kernels_agree_with_the_reference_on_a_gpu(op: str, name: str):
    assert torch.cuda.is_available(), "this test needs a CUDA device"
    assert largest_difference(op, name, "cuda") <= TOLERANCE


@pytest.mark.parametrize("op", RECURRENCES)
def test_triton_is_what_runs_on_a_gpu(op: str):
    choice = RECURRENCES[op].choose(torch.device("cuda"), torch.float32)
    assert choice.implementation.name == "triton"
