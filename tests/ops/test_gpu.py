"""The kernels on a CUDA device."""

from __future__ import annotations

import pytest
import torch

from i3lm.ops.self_check import OPS, TOLERANCE, largest_difference

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", ["triton", "scan"])
def test_kernels_agree_with_the_reference_on_a_gpu(op: str, name: str):
    assert torch.cuda.is_available(), "this test needs a CUDA device"
    assert largest_difference(op, name, "cuda") <= TOLERANCE


@pytest.mark.parametrize("op", OPS)
def test_triton_is_what_runs_on_a_gpu(op: str):
    assert OPS[op].choose(torch.device("cuda"), torch.float32).implementation.name == "triton"
