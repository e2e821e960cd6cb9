"""Compiled kernels are kept until a source of any kernel changes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numba
import pytest

import i3lm
from i3lm.ops import numba_bridge
from i3lm.ops.numba_cache import BesideSource, InGivenFolder, OfUser, digest_of_sources
from i3lm.ops.self_check import CHECKS


def test_a_digest_is_of_all_sources(tmp_path: Path):
    (tmp_path / "deep").mkdir()
    first, second = tmp_path / "a.py", tmp_path / "deep" / "b.py"
    seen = set()
    for contents in (("x", "y"), ("xy", ""), ("x", "z"), ("y", "x")):
        first.write_text(contents[0])
        second.write_text(contents[1])
        digest_of_sources.cache_clear()
        seen.add(digest_of_sources(tmp_path))
    second.rename(tmp_path / "c.py")
    digest_of_sources.cache_clear()
    seen.add(digest_of_sources(tmp_path))
    assert len(seen) == 5


def test_kernels_are_kept_by_all_sources_and_other_code_is_left_alone():
    kernel = numba_bridge.floats
    assert isinstance(kernel._cache._impl.locator, InGivenFolder | BesideSource | OfUser)
    other = numba.njit(cache=True)(_other)
    assert type(other._cache._impl.locator).__module__ == "numba.core.caching"


def _other(x):
    return x


_RUN = """
import torch
from i3lm.ops.linear.numba import few_rows
print(few_rows(torch.ones(1, 4), torch.ones(1, 4)).item())
"""


@pytest.mark.slow
def test_a_change_of_what_a_kernel_calls_counts(tmp_path: Path):
    source = Path(i3lm.__file__).parent
    copied = tmp_path / "i3lm"
    shutil.copytree(source, copied, ignore=shutil.ignore_patterns("__pycache__"))
    called = copied / "ops" / "numba_bridge.py"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "NUMBA_CACHE_DIR": ""}

    def run() -> float:
        command = [sys.executable, "-c", _RUN]
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, check=True, capture_output=True
        )
        return float(done.stdout)

    assert [run(), run()] == [4, 4]
    assert list(copied.glob("ops/linear/__pycache__/*.nbi"))
    plain = "        return lambda x: np.float32(x)\n    return lambda x: x\n"
    text = called.read_text()
    assert text.count(plain) == 1
    called.write_text(text.replace(plain, plain.replace("x: x\n", "x: x + x\n")))
    assert run() == 8


_PRINT_BITS = """
import hashlib, sys, torch
from i3lm.ops.dispatch import use_implementation
from i3lm.ops.self_check import CHECKS
for name in sys.argv[1:]:
    check = CHECKS[name]
    for dtype in sorted({check.dtype, torch.float32}, key=str):
        if check.op.named("numba").refuses(torch.device("cpu"), dtype) is None:
            with use_implementation(**{name: "numba"}):
                results = check.results(torch.device("cpu"), dtype)
            numbers = b"".join(x.detach().float().contiguous().numpy().tobytes() for x in results)
            print(name, dtype, hashlib.sha256(numbers).hexdigest())
"""


@pytest.mark.parametrize(
    "names",
    [
        ["softmax_loss", "gradient_norm"],
        pytest.param(
            [name for name, check in CHECKS.items() if "numba" in check.op.names],
            marks=pytest.mark.slow,
            id="all",
        ),
    ],
)
def test_the_process_that_compiles_computes_as_the_next_one(names: list[str], tmp_path: Path):
    outputs = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", _PRINT_BITS, *names],
            env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        )
        outputs.append(done.stdout)
    assert len(outputs[0].splitlines()) >= len(names)
    assert outputs[0] == outputs[1]
