"""What this machine can do at most, measured."""

from __future__ import annotations

import time

import torch

from i3lm.ops.linear import linear

REPEATS = 7


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
    seconds = []
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        # Reading one number waits for the device.
        linear(a, b)[0, 0].item()
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds[1:])
