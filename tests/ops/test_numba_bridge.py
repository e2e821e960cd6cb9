from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numba
import pytest
import torch

from i3lm.ops.numba_bridge import as_arrays, serial, targets

KEPT = """
import torch
torch.set_num_threads(1)
from i3lm.ops import wkv
k = torch.randn(2, 8, 16)
wkv(k, k, torch.zeros(16), torch.zeros(16))
from i3lm.ops.numba_bridge import _LAUNCHED, match_threads
print(torch.get_num_threads(), match_threads(), _LAUNCHED)
"""

# A kernel called from Python, and one that launches others.
AT_ONCE = """
import threading
import numba, torch
from i3lm.ops import linear, wkv
k, x, weight = torch.randn(4, 256, 512), torch.randn(1, 512), torch.randn(4096, 512)

@torch.no_grad()
def work():
    for _ in range(20):
        results.append(wkv(k, k, torch.zeros(512), torch.zeros(512))[0].sum().item())
        results.append(linear(x, weight).sum().item())

results = []
threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(numba.threading_layer(), len(results), len(set(results)))
"""


def run(program: str, **environment: str) -> list[str]:
    """What a program prints in a process of its own with two threads of numba, as words."""
    variables = {**os.environ, "NUMBA_NUM_THREADS": "2", **environment}
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        variables.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", program], env=variables, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_starting_numba_leaves_pytorch_its_number_of_threads():
    """numba's threads and PyTorch's are OpenMP's, which has one number for both."""
    assert run(KEPT) == ["1", "1", "2"]


def test_python_threads_may_launch_at_once_without_openmp_too():
    """numba's own pool of threads ends the process that does, unless each waits for its turn."""
    assert run(AT_ONCE, NUMBA_THREADING_LAYER="workqueue") == ["workqueue", "160", "2"]


@serial()
def _fill(array):
    for i in range(array.size):
        array[i] = 1


def test_a_kernel_writes_into_the_tensor_itself():
    for dtype in (torch.float32, torch.bfloat16):
        tensor = torch.zeros(3, dtype=dtype)
        _fill(*targets(tensor))
        assert tensor.count_nonzero() == 3


def test_what_a_kernel_writes_cannot_be_lost():
    transposed = torch.zeros(3, 4).T
    message = r"cannot write a tensor of shape \(4, 3\) with strides \(1, 4\): it must be cont"
    with pytest.raises(ValueError, match=message):
        targets(torch.zeros(2), transposed)
    with pytest.raises(numba.TypingError, match="readonly"):
        _fill(*as_arrays(torch.zeros(3)))


COMPILING = """
import logging, sys
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
from i3lm.ops.linear.numba import multiplication
from torch import float32
multiplication(float32)
"""


def test_compiling_is_told_of_once_and_not_where_kernels_are_kept(tmp_path: Path):
    told = [run(COMPILING, NUMBA_CACHE_DIR=str(tmp_path)).count("compiling") for _ in range(2)]
    assert told == [1, 0]
