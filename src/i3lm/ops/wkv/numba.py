"""The RWKV-4 recurrence for CPUs, compiled from Python by numba.

A task is one row of the batch and one block of channels; the loop over channels vectorises, the
loop over time is the recurrence. The backward pass recomputes the states block by block into a
small buffer. Both are exact in the sense of `reference`, with sums in the inputs' dtype, float32 or
float64.

Of the two weights ``e^(a - max(a, b))`` and ``e^(b - max(a, b))`` one is always 1, so each
combination costs one exponential. numba's own ``exp`` would not vectorise; `numba_bridge.exp` does.
"""

from __future__ import annotations

import numpy as np
from numba import prange
from torch import Tensor

from i3lm.ops.numba_bridge import as_arrays, compiled, exp, inlined, match_threads
from i3lm.ops.wkv.reference import EMPTY_EXPONENT

_BLOCK = 128  # channels per task: long enough runs for the prefetcher, few enough for the cache
_FASTEST = -1e30


@inlined()
def _weights(a, b, one):
    """``(e^(a - m), e^(b - m), m)`` with ``m = max(a, b)``; `one` carries the dtype."""
    smaller = exp(-abs(a - b))
    if a >= b:
        return one, smaller, a
    return smaller, one, b


@compiled()
def _forward(key, value, decay, first, state, reset, mask, output, final):
    B, T, C = key.shape
    real = key.dtype.type
    zero, one, empty = real(0), real(1), real(EMPTY_EXPONENT)
    blocks = (C + _BLOCK - 1) // _BLOCK
    for task in prange(B * blocks):
        b, low = task // blocks, (task % blocks) * _BLOCK
        width = min(_BLOCK, C - low)
        num, den = np.empty(_BLOCK, key.dtype), np.empty(_BLOCK, key.dtype)
        top = np.empty(_BLOCK, key.dtype)
        for i in range(width):
            num[i], den[i] = state[b, 0, low + i], state[b, 1, low + i]
            top[i] = state[b, 2, low + i]
        for t in range(T):
            if reset.size and reset[b, t]:
                for i in range(width):
                    num[i], den[i], top[i] = zero, zero, empty
            if mask.size and not mask[b, t]:
                for i in range(width):
                    output[b, t, low + i] = zero
                continue
            for i in range(width):
                c = low + i
                k, v, p = key[b, t, c], value[b, t, c], top[i]
                past, now, _ = _weights(first[c] + p, k, one)
                output[b, t, c] = (past * num[i] + now * v) / (past * den[i] + now)
                past, now, p = _weights(decay[c] + p, k, one)
                num[i] = past * num[i] + now * v
                den[i] = past * den[i] + now
                top[i] = p
        for i in range(width):
            final[b, 0, low + i], final[b, 1, low + i] = num[i], den[i]
            final[b, 2, low + i] = top[i]


@compiled()
def _backward(
    key, value, decay, first, state, reset, mask, grad_output, grad_final,
    grad_key, grad_value, grad_decay, grad_first, grad_state,
):  # fmt: skip
    """See README.md beside this file for the adjoint recurrence."""
    B, T, C = key.shape
    real = key.dtype.type
    zero, one, empty = real(0), real(1), real(EMPTY_EXPONENT)
    blocks = (C + _BLOCK - 1) // _BLOCK
    for task in prange(B * blocks):
        b, low = task // blocks, (task % blocks) * _BLOCK
        width = min(_BLOCK, C - low)
        # The sums before every step, as the step sees them.
        nums, dens = np.empty((T, _BLOCK), key.dtype), np.empty((T, _BLOCK), key.dtype)
        tops = np.empty((T, _BLOCK), key.dtype)
        num, den = np.empty(_BLOCK, key.dtype), np.empty(_BLOCK, key.dtype)
        top = np.empty(_BLOCK, key.dtype)
        for i in range(width):
            num[i], den[i] = state[b, 0, low + i], state[b, 1, low + i]
            top[i] = state[b, 2, low + i]
        for t in range(T):
            if reset.size and reset[b, t]:
                for i in range(width):
                    num[i], den[i], top[i] = zero, zero, empty
            for i in range(width):
                nums[t, i], dens[t, i], tops[t, i] = num[i], den[i], top[i]
            if mask.size and not mask[b, t]:
                continue
            for i in range(width):
                k = key[b, t, low + i]
                past, now, p = _weights(decay[low + i] + top[i], k, one)
                num[i] = past * num[i] + now * value[b, t, low + i]
                den[i] = past * den[i] + now
                top[i] = p

        # The adjoint of the sums after each step, scaled by e^top of its own.
        sum_decay, sum_first = np.zeros(_BLOCK, key.dtype), np.zeros(_BLOCK, key.dtype)
        for i in range(width):
            num[i], den[i] = grad_final[b, 0, low + i], grad_final[b, 1, low + i]
            top[i] = -top[i]
        for step in range(T):
            t = T - 1 - step
            if mask.size and not mask[b, t]:
                for i in range(width):
                    grad_key[b, t, low + i] = zero
                    grad_value[b, t, low + i] = zero
            else:
                for i in range(width):
                    c = low + i
                    k, v, w, u = key[b, t, c], value[b, t, c], decay[c], first[c]
                    n, d, p = nums[t, i], dens[t, i], tops[t, i]
                    past, now, scale = _weights(u + p, k, one)
                    below = one / (past * d + now)
                    y = (past * n + now * v) * below
                    g = grad_output[b, t, c] * below
                    h = -g * y
                    reach = exp(k + top[i])
                    grad_value[b, t, c] = now * g + reach * num[i]
                    grad_key[b, t, c] = now * g * (v - y) + reach * (num[i] * v + den[i])
                    sum_first[i] += past * (n * g + d * h)
                    sum_decay[i] += exp(w + p + top[i]) * (n * num[i] + d * den[i])
                    past, now, q = _weights(w + top[i], u - scale, one)
                    num[i] = past * num[i] + now * g
                    den[i] = past * den[i] + now * h
                    top[i] = q
            if reset.size and reset[b, t]:
                for i in range(width):
                    num[i], den[i], top[i] = zero, zero, empty
        for i in range(width):
            c = low + i
            reach = exp(state[b, 2, c] + top[i])
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
    output, final = key.new_empty(key.shape), state.new_empty(state.shape)
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
    grad_key, grad_value = key.new_empty(key.shape), key.new_empty(key.shape)
    grad_decay, grad_first = (key.new_empty(key.shape[0], key.shape[2]) for _ in range(2))
    grad_start = state.new_empty(state.shape)
    match_threads()
    time_decay = time_decay.clamp_min(_FASTEST)
    inputs = (key, value, time_decay, time_first, state, reset, mask, grad_output, grad_state)
    results = (grad_key, grad_value, grad_decay, grad_first, grad_start)
    _backward(*as_arrays(*inputs, *results))
    return grad_key, grad_value, grad_decay.sum(0), grad_first.sum(0), grad_start
