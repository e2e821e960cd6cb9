"""What the benchmarks share: alternating runs, medians, the machine, one JSON line at the end."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def machine() -> dict[str, Any]:
    """What the numbers were measured on, and with which versions."""
    import numba
    import transformers

    processor = platform.processor() or platform.machine()
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.exists():
        names = [x for x in cpu_info.read_text().splitlines() if x.startswith("model name")]
        processor = names[0].split(":", 1)[1].strip() if names else processor
    return {
        "processor": processor,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numba": numba.__version__,
        # Which change what a heap takes.
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES"),
    }


def time_alternating(
    runs: dict[str, Callable[[], Any]], repeats: int, *, warmup: int = 1, lead: int = 0
) -> dict[str, list[float]]:
    """Times several things in turn, A B C A B C ..., so that drift of the machine hits all.

    Args:
        runs: Name -> what to run.
        repeats: Counted runs of each.
        warmup: Runs of each before counting.
        lead: Runs of each that are not counted at the beginning of every turn, for what comes one
            after the other in use: the others leave nothing of its own in the caches.

    Returns:
        Name -> seconds of each counted run.
    """
    for run in runs.values():
        for _ in range(warmup):
            run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            for _ in range(lead):
                run()
            _synchronize()
            began = time.perf_counter()
            run()
            _synchronize()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def summary(seconds: list[float]) -> dict[str, float]:
    """Median, least and most milliseconds."""
    return {
        "median_ms": round(1e3 * statistics.median(seconds), 3),
        "min_ms": round(1e3 * min(seconds), 3),
        "max_ms": round(1e3 * max(seconds), 3),
    }


def median_ratio(slow: list[float], fast: list[float]) -> float:
    """How many times longer `slow` takes, as the median over the turns."""
    return round(statistics.median(a / b for a, b in zip(slow, fast, strict=True)), 3)


def peak_resident_mib() -> float:
    """Peak resident memory of this process in MiB.

    Not from getrusage: its figure is inherited from the process that started this one.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("peak memory is read from /proc, which this system does not have")


def report(name: str, content: dict[str, Any], output: str | None) -> None:
    """Prints the last line, one JSON object, and keeps it in a file where one is named."""
    line = json.dumps({"benchmark": name, "machine": machine(), **content})
    if output:
        with Path(output).open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    print(line)
