"""The Triton kernels, run by Triton's interpreter on the CPU.

It is slow, so only a part of what `-m gpu` runs on a GPU. In processes of their own, because Triton
decides when it is imported whether to interpret.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from i3lm.ops.dispatch import triton_refuses

# Of comparisons with the reference those with all that there is, one matrix and one length of the
# extreme and the narrow, and not the longest and widest.
TESTS = (
    "triton and not 700 and not 130 and not long and not read_as_it_is and "
    "not zero and not rotation and not identity and "
    "(not agrees_with_the_reference or (reset and mask and reverse and state)) and "
    "(not (stay_exact or whatever_the_inputs) or 65-)"
)


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is published for Linux only")
@pytest.mark.parametrize(
    ("file", "tests"),
    [("test_wkv.py", TESTS), ("test_state_space.py", TESTS), ("test_gpu.py", "tiles")],
)
def test_kernels_pass_in_the_interpreter(file: str, tests: str):
    path = Path(__file__).with_name(file)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n0", "-k", tests]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [*command, path], env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_refuses_other_dtypes_and_devices_with_the_reason():
    cpu = torch.device("cpu")
    assert triton_refuses(cpu, torch.float64) == "computes in float32, not in torch.float64"
    assert "not on cpu" in (triton_refuses(cpu, torch.float32) or "")
