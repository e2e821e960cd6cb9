"""Token shift and mixing for CPUs, compiled from Python by numba, in one visit of every token.

A task is one row of the batch and one block of channels, and goes through time as the equation
does: so padding costs nothing, and the gradients of the shares are summed in one order whatever the
number of threads. A loop over channels reads a few arrays and writes one; such loops vectorise.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numba import prange
from torch import Tensor

from i3lm.ops.dispatch import accumulation_dtype
from i3lm.ops.numba_bridge import (
    AHEAD,
    as_arrays,
    as_written,
    copy,
    fetch,
    match_threads,
    targets,
    widen,
    written,
)

_BLOCK = 256  # channels per task: rows long enough for the prefetcher, and enough tasks


@as_written()
def _forward(x, shares, state, reset, mask, outputs, final):
    B, T, C = x.shape
    one = shares.dtype.type(1)
    blocks = (C + _BLOCK - 1) // _BLOCK
    for task in prange(B * blocks):
        b, low = task // blocks, (task % blocks) * _BLOCK
        high = min(low + _BLOCK, C)
        before = state[b, low:high]
        for t in range(T):
            now = x[b, t, low:high]
            starts = reset.size and reset[b, t]
            if t + AHEAD < T:
                fetch(x[b, t + AHEAD, low:high])
                for m in range(len(outputs)):
                    fetch(outputs[m][b, t + AHEAD, low:high])
            for m in range(len(outputs)):
                share, output = shares[m, low:high], outputs[m][b, t, low:high]
                if starts:
                    for i in range(output.size):
                        output[i] = written(share[i] * widen(now[i]), output[i])
                else:
                    for i in range(output.size):
                        mixed = share[i] * widen(now[i]) + (one - share[i]) * widen(before[i])
                        output[i] = written(mixed, output[i])
            if not mask.size or mask[b, t]:
                before = now
        copy(final[b, low:high], before)


@as_written()
def _backward(
    x, shares, state, reset, mask, grads, grad_final, grad_x, grad_shares, grad_state
):  # fmt: skip
    B, T, C = x.shape
    one = shares.dtype.type(1)
    blocks = (C + _BLOCK - 1) // _BLOCK
    for task in prange(B * blocks):
        b, low = task // blocks, (task % blocks) * _BLOCK
        high = min(low + _BLOCK, C)
        # The gradient of the real token before t through the tokens from t on.
        heard = np.empty(high - low, shares.dtype)
        output, nothing = np.empty_like(heard), np.zeros(high - low, x.dtype)
        copy(heard, grad_final[b, low:high])
        last = T  # the real token before t
        for step in range(T):
            t = T - 1 - step
            if t >= AHEAD:
                fetch(x[b, t - AHEAD, low:high])
                fetch(grad_x[b, t - AHEAD, low:high])
                for m in range(len(grads)):
                    fetch(grads[m][b, t - AHEAD, low:high])
            if last >= t:
                last = t - 1
                while mask.size and last >= 0 and not mask[b, last]:
                    last -= 1
            starts = reset.size and reset[b, t]
            now = x[b, t, low:high]
            before = x[b, last, low:high] if last >= 0 else state[b, low:high]
            if starts:
                before = nothing
            if not mask.size or mask[b, t]:
                for i in range(output.size):
                    output[i] = heard[i]
                for i in range(output.size):
                    heard[i] = 0
            else:
                for i in range(output.size):
                    output[i] = 0
            for m in range(len(grads)):
                share, total = shares[m, low:high], grad_shares[b, m, low:high]
                grad = grads[m][b, t, low:high]
                for i in range(output.size):
                    output[i] += share[i] * widen(grad[i])
                for i in range(output.size):
                    total[i] += widen(grad[i]) * (widen(now[i]) - widen(before[i]))
                if not starts:
                    for i in range(output.size):
                        heard[i] += (one - share[i]) * widen(grad[i])
            copy(grad_x[b, t, low:high], output)
        copy(grad_state[b, low:high], heard)


def token_shift_mix_numba(
    x: Tensor,
    shares: Sequence[Tensor],
    state: Tensor | None,
    reset: Tensor | None,
    mask: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """Computes the mixes of `i3lm.ops.token_shift_mix` in a dtype, and the last state."""
    outputs = [x.new_empty(x.shape, dtype=dtype) for _ in shares]
    final = x.new_empty(x.shape[0], x.shape[2])
    match_threads()
    inputs = _inputs(x, shares, state, reset, mask)
    _forward(*inputs, tuple(targets(*outputs)), *targets(final))
    return *outputs, final


def token_shift_mix_numba_backward(
    grads: Sequence[Tensor],
    grad_final: Tensor,
    x: Tensor,
    shares: Sequence[Tensor],
    state: Tensor | None,
    reset: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, list[Tensor], Tensor | None]:
    """The gradients of x, of every share and of the state, from those of the mixes and the last."""
    grad_x, grad_state = x.new_empty(x.shape), x.new_empty(x.shape[0], x.shape[2])
    sums = x.new_zeros(x.shape[0], len(shares), x.shape[2], dtype=accumulation_dtype(x.dtype))
    match_threads()
    inputs = _inputs(x, shares, state, reset, mask)
    results = targets(grad_x, sums, grad_state)
    _backward(*inputs, tuple(as_arrays(*grads)), *as_arrays(grad_final), *results)
    totals = sums.sum(dim=0).unbind()
    grad_shares = [total.to(share.dtype) for total, share in zip(totals, shares, strict=True)]
    return grad_x, grad_shares, None if state is None else grad_state.to(state.dtype)


def _inputs(
    x: Tensor,
    shares: Sequence[Tensor],
    state: Tensor | None,
    reset: Tensor | None,
    mask: Tensor | None,
) -> list[np.ndarray]:
    precise = torch.stack([share.to(accumulation_dtype(x.dtype)) for share in shares])
    state = x.new_zeros(x.shape[0], x.shape[2]) if state is None else state.to(x.dtype)
    return as_arrays(x, precise, state, reset, mask)
