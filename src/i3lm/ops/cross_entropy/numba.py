"""Softmax, loss and gradient of a piece of logits on the CPU, in one visit of every row.

A row is read once, turned into exponentials in a buffer that stays in the cache, and written once
as its gradient. bfloat16 comes as its bits.
"""

from __future__ import annotations

import math

import numpy as np
from numba import prange
from torch import Tensor

from i3lm.ops.dispatch import accumulation_dtype
from i3lm.ops.numba_bridge import (
    as_arrays,
    compiled,
    exp,
    match_threads,
    serial_as_written,
    targets,
    widen,
    written,
)

_LANES = 64  # running maxima kept side by side, so that their loop vectorises


@serial_as_written()
def _exponentials(row, top):
    for i in range(row.size):
        row[i] = exp(row[i] - top)


@serial_as_written()
def _write_gradient(row, total, scale, label, gradient, bias_sums):
    """From the exponentials of a row, its gradient, and what that adds to the bias's."""
    factor = scale / total
    for i in range(row.size):
        row[i] *= factor
    if label >= 0:
        row[label] -= scale
    for i in range(row.size):
        gradient[i] = written(row[i], gradient[i])
    for i in range(bias_sums.size):
        bias_sums[i] += row[i]


@compiled()
def _rows(logits, bias, labels, scale, normalizers, losses, bias_sums, wants_grad):
    R, V = logits.shape
    tasks = bias_sums.shape[0]
    whole = V - V % _LANES
    zero, one = scale.dtype.type(0), scale.dtype.type(1)
    for task in prange(tasks):
        row, tops = np.empty(V, scale.dtype), np.empty(_LANES, scale.dtype)
        for r in range(task * R // tasks, (task + 1) * R // tasks):
            for i in range(V):
                row[i] = widen(logits[r, i])
            if bias.size:
                for i in range(V):
                    row[i] += bias[i]
            if normalizers.size:
                top = normalizers[r]
            else:
                tops[:] = row[0]
                for start in range(0, whole, _LANES):
                    for j in range(_LANES):
                        tops[j] = max(tops[j], row[start + j])
                top = row[0]
                for j in range(_LANES):
                    top = max(top, tops[j])
                for i in range(whole, V):
                    top = max(top, row[i])
            label = labels[r]
            right = row[label] - top if label >= 0 else -top
            total = zero
            _exponentials(row, top)
            for i in range(V):
                total += row[i]
            if normalizers.size:
                total = one
            losses[r] = math.log(total) - right
            if wants_grad:
                sums = bias_sums[task]
                _write_gradient(row, total, scale[r], label, logits[r], sums)


def softmax_loss_numba(
    logits: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scale: Tensor,
    grad_bias: Tensor | None,
    wants_grad: bool,
    normalizer: Tensor | None = None,
) -> tuple[Tensor]:
    """Computes `softmax_loss_reference` on the CPU."""
    R, V = logits.shape
    precise = accumulation_dtype(logits.dtype)
    losses = logits.new_empty(R, dtype=precise)
    if logits.numel() == 0:
        return (losses,)
    tasks = min(R, match_threads())
    nothing = logits.new_empty(0, dtype=precise)
    offset, known = (nothing if x is None else x for x in (bias, normalizer))
    columns = 0 if grad_bias is None else V
    bias_sums = logits.new_zeros(tasks, columns, dtype=precise)
    inputs = as_arrays(offset, labels, scale, known)
    _rows(*targets(logits), *inputs, *targets(losses, bias_sums), wants_grad)
    if grad_bias is not None:
        grad_bias += bias_sums.sum(dim=0)
    return (losses,)
