"""The Triton kernels, run by Triton's interpreter on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from i3lm.ops.dispatch import triton_refuses

# float32 against float64, with exponents near 50: rounding of those alone is about 4e-6.
TOLERANCE = 1e-4


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is published for Linux only")
def test_kernels_agree_with_the_reference_in_the_interpreter():
    script = Path(__file__).with_name("triton_cases.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    differences = json.loads(done.stdout.splitlines()[-1])
    assert len(differences) == 16
    wrong = {case: value for case, value in differences.items() if not value <= TOLERANCE}
    assert not wrong


def test_refuses_other_dtypes_and_devices_with_the_reason():
    cpu = torch.device("cpu")
    assert triton_refuses(cpu, torch.float64) == "computes in float32, not in torch.float64"
    assert "not on cpu" in (triton_refuses(cpu, torch.float32) or "")
