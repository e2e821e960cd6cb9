from __future__ import annotations

import platform
import subprocess
import sys

import pytest

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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of the GNU C library")
def test_freed_memory_is_kept():
    again, kept = (
        int(subprocess.check_output([sys.executable, "-c", PAGES.format(keep=keep)], text=True))
        for keep in (False, True)
    )
    assert 2 * kept < again  # the first few find no block that is free and large enough
