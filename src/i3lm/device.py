"""Choosing the device and the precision, and seeding everything."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import random
import sys
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path

import numpy as np
import torch

from i3lm.errors import ConfigurationError

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(name: str = "auto") -> torch.device:
    """Gives the device to use: the named one, or for ``auto`` the fastest there is.

    A GPU that is named by its number, such as ``cuda:1``, also becomes the current one.

    Raises:
        ConfigurationError: The name is unknown, or the device is not there.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigurationError(f"unknown device {name!r}: use auto, cpu, cuda or mps") from error
    there = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if not there.get(device.type, False):
        raise ConfigurationError(f"device {name!r} is not available here: use auto or cpu")
    if device.type == "cuda" and device.index is not None:
        count = torch.cuda.device_count()
        if device.index >= count:
            names = ", ".join(f"cuda:{index}" for index in range(count))
            raise ConfigurationError(f"device {name!r} is not there: this machine has {names}")
        torch.cuda.set_device(device)  # kernels are launched on the current device
    return device


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        # Without these instructions bfloat16 is emulated, and slower than float32.
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return False


def resolve_precision(name: str, device: torch.device) -> str:
    """Gives ``fp32``, ``bf16`` or ``fp16``: the named one, or for ``auto`` the fast one.

    That is bf16 where the processor multiplies it in hardware, fp16 on GPUs older than that, and
    fp32 elsewhere.

    Raises:
        ConfigurationError: The name is unknown.
    """
    if name not in PRECISIONS:
        raise ConfigurationError(f"unknown precision {name!r}: use auto, fp32, bf16 or fp16")
    if name != "auto":
        return name
    if has_fast_bf16(device):
        return "bf16"
    return "fp16" if device.type == "cuda" else "fp32"


def autocast(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """The context in which matrices are multiplied in a precision, for inference or one step.

    Args:
        device: Where they are multiplied.
        precision: ``fp32``, ``bf16`` or ``fp16``.
    """
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=_AUTOCAST[precision])


def peak_memory_bytes(device: torch.device) -> int | None:
    """The most memory used so far: allocated on a CUDA device, else resident of this process.

    None where the system does not tell (Windows).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def seed_everything(seed: int) -> None:
    """Seeds Python's, NumPy's and PyTorch's generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (libraries draw from the global generator)
    torch.manual_seed(seed)


def empty_in_large_pages(size: int) -> torch.Tensor:
    """Gives memory for that many bytes, uint8, that the system backs by large pages where it can.

    What is read from one end to the other, such as weights, then waits less for the processor's
    table of pages. On Linux alone they are to be had for the asking; elsewhere it is plain memory.
    """
    large_pages = getattr(mmap, "MADV_HUGEPAGE", None)
    if large_pages is None or size == 0:
        return torch.empty(size, dtype=torch.uint8)
    # Of this process alone: large pages of shared memory are a setting of their own, mostly off.
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a system built without them
        memory.madvise(large_pages)
    return torch.frombuffer(memory, dtype=torch.uint8)


def keep_freed_memory() -> bool:
    """Makes the C library keep freed blocks for the next step, in large pages where it can.

    glibc maps large blocks afresh and returns them, and the kernel then clears them page by page at
    first touch: a third of a training step on a CPU. And what is read across the rows of matrices
    meets a page of 4 KiB at every step, so that the processor's table of pages is waited for
    (benchmarks/NOTES.md). For the whole process, and only on Linux with glibc.

    Returns:
        Whether it took effect.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    trim_threshold, most_mapped = -1, -4  # from malloc.h
    if not (mallopt(most_mapped, 0) and mallopt(trim_threshold, -1)):  # nothing mapped, no trimming
        return False
    _extend_heap_in_large_pages()
    return True


@cache  # once in a process: a second extension would be beyond the first one
def _extend_heap_in_large_pages() -> None:
    """Has the heap grow into large pages: addresses for most of the machine's memory, untouched.

    Where so many addresses are not to be had (a limit of the process, or a system that promises no
    more memory than it has), or would be touched, the heap stays as it is. Never for more than the
    machine has: Linux refuses to fork a process with one range of addresses larger than that.
    """
    import resource  # not on Windows

    large_pages, page = getattr(mmap, "MADV_HUGEPAGE", None), 2**21
    limits = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
    if large_pages is None or any(limit != resource.RLIM_INFINITY for limit in limits):
        return
    if "MALLOC_PERTURB_" in os.environ or "perturb" in os.environ.get("GLIBC_TUNABLES", ""):
        return  # a debugging aid of glibc, which fills every block
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4 * 3
    try:
        # Where it counts each address as memory, other processes could not have it.
        if Path("/proc/sys/vm/overcommit_memory").read_text(encoding="ascii").strip() == "2":
            return
        # A heap that could not grow so far would be left for another one.
        mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
    except OSError:
        return
    library = ctypes.CDLL(None)
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.free.restype, library.free.argtypes = None, [ctypes.c_void_p]
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    if block := library.malloc(size):
        first, last = -(-block // page) * page, (block + size) // page * page
        library.madvise(first, last - first, large_pages)  # a system without them refuses
        library.free(block)
