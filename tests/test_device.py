from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from i3lm.device import autocast, peak_memory_bytes, resolve_precision
from i3lm.errors import ConfigurationError

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("capability", "expected"), [((6, 0), "fp16"), ((7, 5), "fp16"), ((8, 0), "bf16")]
)
def test_auto_on_a_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: str):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    assert resolve_precision("auto", torch.device("cuda")) == expected


def test_auto_on_a_cpu_is_never_fp16(monkeypatch: pytest.MonkeyPatch):
    assert resolve_precision("auto", CPU) in ("fp32", "bf16")
    for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(f"torch.cpu.{probe}", lambda: False)
    assert resolve_precision("auto", CPU) == "fp32"
    assert resolve_precision("fp16", CPU) == "fp16"
    with pytest.raises(ConfigurationError, match="'fp8': use auto, fp32, bf16 or fp16"):
        resolve_precision("fp8", CPU)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)],
)
def test_autocast(precision: str, dtype: torch.dtype):
    x = torch.ones(2, 2)
    with autocast(CPU, precision):
        assert (x @ x).dtype == dtype


def test_peak_memory_grows_with_what_is_used():
    before = peak_memory_bytes(CPU)
    assert before is not None
    size = 2 * before
    block = torch.ones(size, dtype=torch.uint8)
    after = peak_memory_bytes(CPU)
    assert after is not None
    assert len(block) <= after < 2**40


def _printed(code: str) -> str:
    """What Python code prints in a process of its own."""
    return subprocess.check_output([sys.executable, "-c", code], text=True)


PAGES = """
import resource, torch
from i3lm.device import keep_freed_memory
if {keep}:
    assert keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(2**24).fill_(1)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(sum(faults() for _ in range(30)))
"""


FEW_ADDRESSES = "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33))"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of the GNU C library")
@pytest.mark.parametrize("limit", ["", FEW_ADDRESSES])  # fewer than a heap in large pages takes
def test_freed_memory_is_kept(limit: str):
    again, kept = (int(_printed(limit + PAGES.format(keep=keep))) for keep in (False, True))
    assert 2 * kept < again  # the first few find no block that is free and large enough


FORKS = """
import os, subprocess, torch
from i3lm.device import keep_freed_memory
share = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 20 * 3
held = []
for training in range(3):
    keep_freed_memory()
    held += [torch.empty(share, dtype=torch.uint8)]  # never touched
subprocess.run(["echo", "forked"], preexec_fn=lambda: None, check=True)  # that forks, by the book
"""


# On other systems `keep_freed_memory` changes nothing, and not all can fork.
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a rule of Linux")
def test_a_process_that_trained_several_times_can_be_forked():
    assert _printed(FORKS) == "forked\n"


LARGE_PAGES = """
import re, torch
from pathlib import Path
from i3lm.device import keep_freed_memory
assert keep_freed_memory()
block = torch.ones(2**24)  # 64 MiB
sizes = re.findall(r"AnonHugePages: +([0-9]+) kB", Path("/proc/self/smaps").read_text())
print(sum(map(int, sizes)))
"""


def _large_pages_are_given() -> bool:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    promise = Path("/proc/sys/vm/overcommit_memory")
    return (
        platform.libc_ver()[0] == "glibc"
        and setting.exists()
        and "[never]" not in setting.read_text(encoding="ascii")
        and promise.read_text(encoding="ascii").strip() != "2"
    )


# Whether there are any is for the system's administrator to say; that freed memory is kept without
# them too is tested above.
@pytest.mark.skipif(not _large_pages_are_given(), reason="this system gives no large pages")
def test_large_blocks_lie_in_large_pages():
    assert int(_printed(LARGE_PAGES)) >= 2**24 * 4 // 1024 // 2
