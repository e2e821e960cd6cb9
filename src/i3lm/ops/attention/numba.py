"""The softmax of a tile of attention scores in bfloat16 on the CPU, in one visit of every row.

A row is scaled, cut to what its query sees, turned into weights and written in its own place.
bfloat16 comes as its bits.
"""

from __future__ import annotations

import numpy as np
from numba import prange
from torch import Tensor

from i3lm.ops.numba_bridge import (
    as_arrays,
    compiled,
    exp,
    inlined,
    match_threads,
    targets,
    widen,
    written,
)

_BLOCK = 64  # keys at a time: loops of constant length vectorise whole
_HIDDEN = np.float32(-np.inf)
_ZERO = np.float32(0.0)
_SIGN, _SIZE = np.int32(31), np.int32(0x7FFFFFFF)


@inlined()
def _largest(row, low, high):
    """The largest number of a part of a row, or NaN: floats are ordered as their bits are."""
    # So ordered once those of negative numbers are turned round. A float maximum stays scalar.
    top = np.int32(-(2**31))
    for i in range(low, high):
        bits = np.float32(widen(row[i])).view(np.int32)
        top = max(top, np.int32(bits ^ np.int32(np.int32(bits >> _SIGN) & _SIZE)))
    return np.int32(top ^ np.int32(np.int32(top >> _SIGN) & _SIZE)).view(np.float32)


@inlined()
def _softmax_row(row, work, low, high, scale):
    top = _largest(row, low, high)
    for i in range(low, high):
        work[i - low] = widen(row[i])
    blocks = (high - low + _BLOCK - 1) // _BLOCK
    work[high - low : blocks * _BLOCK] = _HIDDEN
    total = _ZERO
    for block in range(blocks):
        part = work[block * _BLOCK : (block + 1) * _BLOCK]
        for i in range(_BLOCK):
            part[i] = exp((part[i] - top) * scale)
    for i in range(blocks * _BLOCK):
        total += work[i]
    share = np.float32(1.0) / total
    row[:low] = 0
    for i in range(low, high):
        row[i] = written(work[i - low] * share, row[i])
    row[high:] = 0


@compiled()
def _softmax(scores, first, heads, before, scale, tasks):
    N, R, S = scores.shape
    for task in prange(tasks):
        work = np.empty((S // _BLOCK + 1) * _BLOCK, np.float32)
        for place in range(task * N * R // tasks, (task + 1) * N * R // tasks):
            n, r = place // R, place % R
            low = first[n // heads, r] if first.size else 0
            _softmax_row(scores[n, r], work, low, before + r + 1, scale)


def softmax_numba(
    scores: Tensor, first: Tensor | None, heads: int, before: int, scale: float
) -> Tensor:
    """Computes `softmax_torch` of contiguous bfloat16 on the CPU, in place of the scores."""
    arrays = *targets(scores), *as_arrays(first)
    _softmax(*arrays, heads, before, np.float32(scale), match_threads())
    return scores
