"""The RWKV-4 recurrence for CPUs, compiled from Python by numba.

A task is one row of the batch and one block of channels; the loop over channels vectorises, the
loop over time is the recurrence. The backward pass recomputes the states block by block into a
buffer that stays in the processor's cache. Both are exact in the sense of `reference`, with
float32 sums.

Of the two weights ``e^(a - max(a, b))`` and ``e^(b - max(a, b))`` one is always 1, so each
combination costs one exponential. numba's own ``exp`` would not vectorise; `_exp` does.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from i3lm.ops.numba_bridge import as_arrays, match_threads
from i3lm.ops.wkv.reference import EMPTY_EXPONENT

_BLOCK = 32  # channels per task: two 512-bit vectors, and 384 bytes of state per step
_EMPTY = np.float32(EMPTY_EXPONENT)
_FASTEST = -1e30
_LOG2_E = np.float32(1.4426950408889634)
# ln 2 in two parts, so that n * ln 2 is exact where it cancels against x (Cody and Waite).
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_compiled: Any = partial(njit, parallel=True, fastmath=True, cache=True, error_model="numpy")


@njit(inline="always", fastmath=True, error_model="numpy")
def _exp(x):
    """``e^x`` for x at most about 88, to 2 ulp; below -87 the smallest normal number."""
    x = max(x, np.float32(-87.0))
    n = np.floor(x * _LOG2_E + np.float32(0.5))
    r = x - n * _LN2_HIGH - n * _LN2_LOW  # |r| <= ln(2) / 2
    # e^r by its Taylor series to degree 7: the rest is below 1e-8.
    p = np.float32(1.0 / 5040.0)
    p = p * r + np.float32(1.0 / 720.0)
    p = p * r + np.float32(1.0 / 120.0)
    p = p * r + np.float32(1.0 / 24.0)
    p = p * r + np.float32(1.0 / 6.0)
    p = p * r + np.float32(0.5)
    p = p * r + np.float32(1.0)
    p = p * r + np.float32(1.0)
    # 2^n by writing n into the exponent bits.
    return p * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)


@njit(inline="always", fastmath=True, error_model="numpy")
def _weights(a, b):
    """``(e^(a - m), e^(b - m), m)`` with ``m = max(a, b)``."""
    smaller = _exp(-abs(a - b))
    one = np.float32(1.0)
    if a >= b:
        return one, smaller, a
    return smaller, one, b


@_compiled()
def _forward(key, value, decay, first, state, reset, mask, output, final):
    B, T, C = key.shape
    blocks = (C + _BLOCK - 1) // _BLOCK
    for task in prange(B * blocks):
        b, low = task // blocks, (task % blocks) * _BLOCK
        width = min(_BLOCK, C - low)
        num, den = np.empty(_BLOCK, np.float32), np.empty(_BLOCK, np.float32)
        top = np.empty(_BLOCK, np.float32)
        for i in range(width):
            num[i], den[i] = state[b, 0, low + i], state[b, 1, low + i]
            top[i] = state[b, 2, low + i]
        for t in range(T):
            if reset.size and reset[b, t]:
                for i in range(width):
                    num[i], den[i], top[i] = np.float32(0), np.float32(0), _EMPTY
            if mask.size and not mask[b, t]:
                for i in range(width):
                    output[b, t, low + i] = np.float32(0)
                continue
            for i in range(width):
                c = low + i
                k, v, p = key[b, t, c], value[b, t, c], top[i]
                past, now, _ = _weights(first[c] + p, k)
                output[b, t, c] = (past * num[i] + now * v) / (past * den[i] + now)
                past, now, p = _weights(decay[c] + p, k)
                num[i] = past * num[i] + now * v
                den[i] = past * den[i] + now
                top[i] = p
        for i in range(width):
            final[b, 0, low + i], final[b, 1, low + i] = num[i], den[i]
            final[b, 2, low + i] = top[i]


@_compiled()
def _backward(
    key, value, decay, first, state, reset, mask, grad_output, grad_final,
    grad_key, grad_value, grad_decay, grad_first, grad_state,
):  # fmt: skip
    """See README.md beside this file for the adjoint recurrence."""
    B, T, C = key.shape
    blocks = (C + _BLOCK - 1) // _BLOCK
    for task in prange(B * blocks):
        b, low = task // blocks, (task % blocks) * _BLOCK
        width = min(_BLOCK, C - low)
        # The sums before every step, as the step sees them.
        nums, dens = np.empty((T, _BLOCK), np.float32), np.empty((T, _BLOCK), np.float32)
        tops = np.empty((T, _BLOCK), np.float32)
        num, den = np.empty(_BLOCK, np.float32), np.empty(_BLOCK, np.float32)
        top = np.empty(_BLOCK, np.float32)
        for i in range(width):
            num[i], den[i] = state[b, 0, low + i], state[b, 1, low + i]
            top[i] = state[b, 2, low + i]
        for t in range(T):
            if reset.size and reset[b, t]:
                for i in range(width):
                    num[i], den[i], top[i] = np.float32(0), np.float32(0), _EMPTY
            for i in range(width):
                nums[t, i], dens[t, i], tops[t, i] = num[i], den[i], top[i]
            if mask.size and not mask[b, t]:
                continue
            for i in range(width):
                k = key[b, t, low + i]
                past, now, p = _weights(decay[low + i] + top[i], k)
                num[i] = past * num[i] + now * value[b, t, low + i]
                den[i] = past * den[i] + now
                top[i] = p

        # The adjoint of the sums after each step, scaled by e^top of its own.
        sum_decay, sum_first = np.zeros(_BLOCK, np.float32), np.zeros(_BLOCK, np.float32)
        for i in range(width):
            num[i], den[i] = grad_final[b, 0, low + i], grad_final[b, 1, low + i]
            top[i] = -top[i]
        for step in range(T):
            t = T - 1 - step
            if mask.size and not mask[b, t]:
                for i in range(width):
                    grad_key[b, t, low + i] = np.float32(0)
                    grad_value[b, t, low + i] = np.float32(0)
            else:
                for i in range(width):
                    c = low + i
                    k, v, w, u = key[b, t, c], value[b, t, c], decay[c], first[c]
                    n, d, p = nums[t, i], dens[t, i], tops[t, i]
                    past, now, scale = _weights(u + p, k)
                    below = np.float32(1.0) / (past * d + now)
                    y = (past * n + now * v) * below
                    g = grad_output[b, t, c] * below
                    h = -g * y
                    reach = _exp(k + top[i])
                    grad_value[b, t, c] = now * g + reach * num[i]
                    grad_key[b, t, c] = now * g * (v - y) + reach * (num[i] * v + den[i])
                    sum_first[i] += past * (n * g + d * h)
                    sum_decay[i] += _exp(w + p + top[i]) * (n * num[i] + d * den[i])
                    past, now, q = _weights(w + top[i], u - scale)
                    num[i] = past * num[i] + now * g
                    den[i] = past * den[i] + now * h
                    top[i] = q
            if reset.size and reset[b, t]:
                for i in range(width):
                    num[i], den[i], top[i] = np.float32(0), np.float32(0), _EMPTY
        for i in range(width):
            c = low + i
            reach = _exp(state[b, 2, c] + top[i])
            grad_state[b, 0, c], grad_state[b, 1, c] = reach * num[i], reach * den[i]
            grad_state[b, 2, c] = (
                state[b, 0, c] * grad_state[b, 0, c] + state[b, 1, c] * grad_state[b, 1, c]
            )
            grad_decay[b, c], grad_first[b, c] = sum_decay[i], sum_first[i]


def wkv_numba(
    key: Tensor,
    value: Tensor,
    time_decay: Tensor,
    time_first: Tensor,
    state: Tensor,
    reset: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Computes `i3lm.ops.wkv` on the CPU; same arguments and results as `wkv_reference`."""
    output, final = torch.empty(key.shape), torch.empty(state.shape)
    match_threads()
    time_decay = time_decay.clamp_min(_FASTEST)
    _forward(*as_arrays(key, value, time_decay, time_first, state, reset, mask, output, final))
    return output, final


def wkv_numba_backward(
    grad_output: Tensor,
    grad_state: Tensor,
    key: Tensor,
    value: Tensor,
    time_decay: Tensor,
    time_first: Tensor,
    state: Tensor,
    reset: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, ...]:
    """The gradients of key, value, time_decay, time_first and state; states are recomputed."""
    grad_key, grad_value = torch.empty(key.shape), torch.empty(key.shape)
    grad_decay, grad_first = (torch.empty(key.shape[0], key.shape[2]) for _ in range(2))
    grad_start = torch.empty(state.shape)
    match_threads()
    time_decay = time_decay.clamp_min(_FASTEST)
    inputs = (key, value, time_decay, time_first, state, reset, mask, grad_output, grad_state)
    results = (grad_key, grad_value, grad_decay, grad_first, grad_start)
    _backward(*as_arrays(*inputs, *results))
    return grad_key, grad_value, grad_decay.sum(0), grad_first.sum(0), grad_start
