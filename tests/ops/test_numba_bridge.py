from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

KEPT = """
import torch
torch.set_num_threads(1)
from i3lm.ops import wkv
k = torch.randn(2, 8, 16)
wkv(k, k, torch.zeros(16), torch.zeros(16))
from i3lm.ops.numba_bridge import _LAUNCHED, match_threads
print(torch.get_num_threads(), match_threads(), _LAUNCHED)
"""


def test_starting_numba_leaves_pytorch_its_number_of_threads():
    """numba's threads and PyTorch's are OpenMP's, which has one number for both."""
    environment = {**os.environ, "NUMBA_NUM_THREADS": "2"}
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        environment.pop(name, None)
    run = subprocess.run(
        [sys.executable, "-c", KEPT], env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == ["1", "1", "2"]


COMPILING = """
import logging
logging.basicConfig(level=logging.INFO, format="%(message)s")
from i3lm.ops.linear.numba import multiplication
from torch import float32
multiplication(float32)
"""


def test_compiling_is_told_of_once_and_not_where_kernels_are_kept(tmp_path: Path):
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILING]
    runs = [
        subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    assert [run.stderr.count("compiling kernels") for run in runs] == [1, 0]
