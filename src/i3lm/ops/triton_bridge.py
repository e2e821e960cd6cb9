"""What the Triton implementations share: tiles chosen by measuring, and the marks of a step."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from i3lm.ops.dispatch import TRITON_INTERPRETS

# Products and sums are fused, as they were before Triton 3.9, which warns where this is not said.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

# Steps and channels of a tile, and warps of a program. The first serves small problems. Triton's
# interpreter takes a scan number by number, so there a tile is small.
_TILES = [
    (32, 16, 4), (32, 8, 1), (32, 16, 1), (32, 16, 2), (32, 32, 4), (64, 8, 2), (64, 16, 4),
    (64, 32, 8),
]  # fmt: skip
if TRITON_INTERPRETS:
    _TILES = [(16, 4, 4)]
CONFIGURATIONS = [
    triton.Config({"L": steps, "BLOCK": channels}, num_warps=warps)
    for steps, channels, warps in _TILES
]
SHORTEST_TILE = min(steps for steps, _, _ in _TILES)
# Up to so many numbers a call takes as long as its launch, and is not worth measuring.
_SMALL = 2**16


def tuned(*, restore: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Makes a Triton kernel whose tile is measured once for each size of problem, and kept on disk.

    The kernel takes `near_B` and `near_T` (see `problem_size`) beside `T` and `C`, and the
    constants `L` and `BLOCK`, steps and channels of its tile.

    Args:
        restore: Names of arguments that the kernel both reads and writes, which measuring must
            leave as they were.
    """

    def make(function: Callable[..., Any]) -> Any:
        # Not a new compilation for every length of a sequence.
        kernel = triton.jit(function, do_not_specialize=["T", "near_B", "near_T"])
        return triton.autotune(
            CONFIGURATIONS,
            key=["C", "near_B", "near_T"],
            restore_value=list(restore),
            prune_configs_by={"early_config_prune": _worth_measuring},
            cache_results=True,
        )(kernel)

    return make


def _worth_measuring(
    configurations: list[triton.Config], arguments: dict[str, Any], **rest: Any
) -> list[triton.Config]:
    known = {**arguments, **rest}
    small = known["near_B"] * known["near_T"] * known["C"] <= _SMALL
    return configurations[:1] if small else configurations


def problem_size(x: Tensor) -> dict[str, int]:
    """The sizes (B, T, C) of a sequence as a tuned kernel takes them.

    Problems whose batches and lengths have the same next power of four share a measurement.
    """
    B, T, C = x.shape
    return {"T": T, "C": C, "near_B": _power_of_four(B), "near_T": _power_of_four(T)}


def _power_of_four(size: int) -> int:
    return 4 ** (((size - 1).bit_length() + 1) // 2)


@triton.jit
def marks(reset, mask, b, t, T, HAS_RESET: tl.constexpr, HAS_MASK: tl.constexpr):
    """Whether steps are real, and whether they begin a document; both False outside [0, T)."""
    inside = (t >= 0) & (t < T)
    real = inside
    begins = inside & (t < 0)
    if HAS_MASK:
        real = inside & (tl.load(mask + b * T + t, mask=inside, other=0) != 0)
    if HAS_RESET:
        begins = inside & (tl.load(reset + b * T + t, mask=inside, other=0) != 0)
    return real, begins


def flags(reset: Tensor | None, mask: Tensor | None) -> dict[str, bool]:
    """Which marks there are, as constants of a kernel."""
    return {"HAS_RESET": reset is not None, "HAS_MASK": mask is not None}


def as_read(stand_in: Tensor, *tensors: Tensor | None) -> list[Tensor]:
    """Tensors as kernels read them; for an absent mark any pointer will do, it is never read."""
    return [_as_read(stand_in if x is None else x) for x in tensors]


def _as_read(x: Tensor) -> Tensor:
    return (x.view(torch.uint8) if x.dtype == torch.bool else x).contiguous()
