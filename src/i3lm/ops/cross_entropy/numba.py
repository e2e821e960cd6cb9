"""Softmax, loss and gradient of a piece of logits on the CPU, in two visits of every number.

Rows lie side by side, a token of the vocabulary after the other: so lie the logits that the
faster matrix product gives. All loops run over some rows, whose sums stay in the first cache.
bfloat16 comes as its bits.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import prange
from torch import Tensor

from i3lm.ops.dispatch import accumulation_dtype
from i3lm.ops.numba_bridge import (
    as_arrays,
    compiled,
    exp,
    fetch,
    match_threads,
    multiply_add,
    serial_as_written,
    targets,
    widen,
    written,
)

_LANES = 64  # sums kept side by side, so that their loop vectorises
# A task has so many rows and a part of the vocabulary. There are as many parts for any number of
# threads, so that sums have one order.
_ROWS, _TASKS, _SMALLEST_PART = 1024, 64, 32
_AHEAD = 2  # tokens of the vocabulary whose rows are fetched ahead: they are pages apart


@serial_as_written()
def _add_exponentials(logits, offset, tops, totals):
    """One token of the vocabulary into every row's maximum and its sum of e^(x - maximum)."""
    one = tops.dtype.type(1)
    for r in range(tops.size):
        x = widen(logits[r]) + offset
        distance = x - tops[r]
        # Of e^(x - new) and e^(old - new), with the new maximum, one is 1.
        other = exp(-abs(distance))
        totals[r] = multiply_add(totals[r], other, one) if distance > 0 else totals[r] + other
        tops[r] = max(tops[r], x)


@serial_as_written()
def _write_gradients(logits, offset, tops, factors, gradients):
    """One token's gradients in every row, into the logits' place; they are kept in float32 too."""
    for r in range(tops.size):
        gradients[r] = exp(widen(logits[r]) + offset - tops[r]) * factors[r]
    for r in range(tops.size):
        logits[r] = written(gradients[r], logits[r])


@serial_as_written()
def _sum(numbers, lanes):
    whole = numbers.size - numbers.size % _LANES
    for i in range(_LANES):
        lanes[i] = 0
    for start in range(0, whole, _LANES):
        for i in range(_LANES):
            lanes[i] += numbers[start + i]
    total = lanes[0]
    for i in range(1, _LANES):
        total += lanes[i]
    for i in range(whole, numbers.size):
        total += numbers[i]
    return total


@compiled()
def _sum_up(logits, bias, tops, totals):
    V, R = logits.shape
    parts, blocks = tops.shape[0], (R + _ROWS - 1) // _ROWS
    for task in prange(parts * blocks):
        part, low = task // blocks, (task % blocks) * _ROWS
        high = min(low + _ROWS, R)
        end = (part + 1) * V // parts
        for v in range(part * V // parts, end):
            if v + _AHEAD < end:
                fetch(logits[v + _AHEAD, low:high])
            offset = bias[v] if bias.size else tops.dtype.type(0)
            _add_exponentials(
                logits[v, low:high], offset, tops[part, low:high], totals[part, low:high]
            )


@serial_as_written()
def _join(tops, totals):
    """Adds the parts of every row to its first one."""
    for part in range(1, tops.shape[0]):
        for r in range(tops.shape[1]):
            top = max(tops[0, r], tops[part, r])
            totals[0, r] *= exp(tops[0, r] - top)
            totals[0, r] += totals[part, r] * exp(tops[part, r] - top)
            tops[0, r] = top


@compiled()
def _differentiate(logits, bias, tops, factors, sums, parts):
    V, R = logits.shape
    blocks = (R + _ROWS - 1) // _ROWS
    for task in prange(parts * blocks):
        part, block = task // blocks, task % blocks
        low = block * _ROWS
        high = min(low + _ROWS, R)
        gradients, lanes = np.empty(high - low, tops.dtype), np.empty(_LANES, tops.dtype)
        end = (part + 1) * V // parts
        for v in range(part * V // parts, end):
            if v + _AHEAD < end:
                fetch(logits[v + _AHEAD, low:high])
            offset = bias[v] if bias.size else tops.dtype.type(0)
            row = logits[v, low:high]
            _write_gradients(row, offset, tops[low:high], factors[low:high], gradients)
            if sums.size:
                sums[block, v] = _sum(gradients, lanes)


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
    if logits.numel() == 0:
        return (logits.new_empty(R, dtype=precise),)
    by_token = logits.T.contiguous()
    match_threads()
    blocks = -(-R // _ROWS)
    parts = max(1, min(_TASKS // blocks, V // _SMALLEST_PART))
    offset = logits.new_empty(0, dtype=precise) if bias is None else bias
    if normalizer is None:
        tops = logits.new_full((parts, R), torch.finfo(precise).min, dtype=precise)
        totals = torch.zeros_like(tops)
        _sum_up(*as_arrays(by_token, offset), *targets(tops, totals))
        _join(*targets(tops, totals))
        top, total = tops[0], totals[0]
    else:
        top, total = normalizer, torch.ones_like(normalizer)
    rows = torch.arange(R, device=logits.device)
    is_here, column = labels >= 0, labels.clamp_min(0)
    right = by_token[column, rows].to(precise)
    right = right if bias is None else right + bias[column]
    losses = total.log() + torch.where(is_here, top - right, top)
    if not wants_grad:
        return (losses,)
    factors = scale.to(precise) / total
    sums = logits.new_empty(0 if grad_bias is None else blocks, V, dtype=precise)
    inputs = as_arrays(offset, top, factors)
    _differentiate(*targets(by_token), *inputs, *targets(sums), parts)
    rows, column, share = rows[is_here], column[is_here], scale[is_here].to(precise)
    of_label = (right - top)[is_here].exp_() * factors[is_here] - share
    by_token[column, rows] = of_label.to(logits.dtype)
    if grad_bias is not None:
        for of_block in sums:
            grad_bias += of_block
        grad_bias.index_add_(0, column, -share)
    if by_token.data_ptr() != logits.data_ptr():
        logits.copy_(by_token.T)
    return (losses,)
