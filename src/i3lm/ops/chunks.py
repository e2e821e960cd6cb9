"""Cutting time into chunks, for scans that take about 2 * sqrt(T) sequential steps."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def chunk_length(steps: int) -> int:
    """The chunk length near sqrt(steps): a divisor of `steps` if one is close, else the root."""
    root = max(1, math.isqrt(max(steps - 1, 0)) + 1)
    close = [n for n in range(max(1, root // 2), 2 * root + 1) if steps and steps % n == 0]
    return min(close, key=lambda n: abs(n - root), default=root)


def split_chunks(x: Tensor, length: int, fill: float = 0) -> Tensor:
    """Lays (B, T, ...) out as (B, n, L, ...), the last chunk filled up with `fill`."""
    B, T = x.shape[:2]
    missing = -T % length
    if missing:
        x = torch.cat([x, x.new_full((B, missing, *x.shape[2:]), fill)], dim=1)
    return x.reshape(B, x.shape[1] // length, length, *x.shape[2:])


def join_chunks(x: Tensor, steps: int) -> Tensor:
    """Undoes `split_chunks`: (B, n, L, ...) to (B, T, ...)."""
    return x.flatten(1, 2)[:, :steps]


def next_step_mark(mark: Tensor | None) -> Tensor | None:
    """A mark (B, T) as the adjoint needs it: in reverse time, each step's successor's mark.

    What step t + 1 did to the state it received decides what step t hears back. The first entry,
    which has no successor, is False.
    """
    if mark is None:
        return None
    ahead = torch.roll(mark.flip(1), 1, dims=1)
    ahead[:, :1] = False
    return ahead
