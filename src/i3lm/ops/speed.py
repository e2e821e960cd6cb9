"""What this machine can do at most, measured, and what the vendor of its GPU promises."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from i3lm.ops.linear import linear

REPEATS = 7
_LAUNCHES = 16  # of a repeat on a GPU, so that it never waits for the next one

# bfloat16 without sparsity, by the names that the driver gives: NVIDIA's data sheets of the A100,
# H100, H200, L4 and L40S (half of what they print "with sparsity"), and its Ada GPU architecture
# white paper for the GeForce (sums in float32).
_VENDOR_BF16_TFLOPS = {
    "NVIDIA A100-SXM4-40GB": 312,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA A100-PCIE-40GB": 312,
    "NVIDIA A100 80GB PCIe": 312,
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H100 NVL": 835,
    "NVIDIA H200": 989,
    "NVIDIA H200 NVL": 835,
    "NVIDIA L4": 121,
    "NVIDIA L40S": 362,
    "NVIDIA GeForce RTX 4090": 165,
}


def measure_matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large product of square matrices.

    The ceiling that a model's own speed is held against: the best of seven, since whatever else
    the machine does only takes away from it. It takes a fraction of a second.

    Args:
        device: Where to multiply.
        dtype: The dtype of both matrices.
    """
    size = 1024 if device.type == "cpu" else 4096
    # Not from the global generator, which a run may have seeded.
    draw = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, generator=draw, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _fastest(lambda: linear(a, b), device)


def measure_copy_bytes(device: torch.device) -> float:
    """Bytes per second, read and written together, of copying 256 MiB: the best of seven."""
    source = torch.ones(2**26, device=device)  # beyond any cache
    target = torch.empty_like(source)
    return 2 * source.nbytes / _fastest(lambda: target.copy_(source), device)


def vendor_bf16_flops(device: torch.device) -> float | None:
    """Operations per second in bfloat16 that the vendor states, without sparsity.

    None for a processor and for a GPU that is not in the table.
    """
    if device.type != "cuda":
        return None
    tflops = _VENDOR_BF16_TFLOPS.get(torch.cuda.get_device_name(device))
    return None if tflops is None else 1e12 * tflops


def _fastest(run: Callable[[], Tensor], device: torch.device) -> float:
    """Seconds of the fastest run but the first."""
    once = _seconds_on_cuda if device.type == "cuda" else _seconds
    return min([once(run) for _ in range(REPEATS + 1)][1:])


def _seconds(run: Callable[[], Tensor]) -> float:
    began = time.perf_counter()
    run().flatten()[0].item()  # reading one number waits for the device
    return time.perf_counter() - began


def _seconds_on_cuda(run: Callable[[], Tensor]) -> float:
    """Seconds by the GPU's own clock, of runs one right after the other."""
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    for _ in range(_LAUNCHES):
        run()
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended) / 1e3 / _LAUNCHES
