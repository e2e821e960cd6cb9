"""The RWKV-4 recurrence for CPUs, compiled from Python by numba.

A task is one row of the batch and one block of channels; the loop over channels vectorises, the
loop over time is the recurrence. The backward pass keeps the states before every stretch of time
alone, and computes those of one stretch again when it comes to it. Both are exact in the sense of
`reference`, with sums in the state's dtype, float32 or float64; keys and values of bfloat16 come as
their bits, and so does what goes with them.

Of the two weights ``e^(a - max(a, b))`` and ``e^(b - max(a, b))`` one is always 1, so each
combination costs one exponential. numba's own ``exp`` would not vectorise; `numba_bridge.exp` does.
"""

from __future__ import annotations

import numpy as np
from numba import prange
from torch import Tensor

from i3lm.ops.numba_bridge import (
    AHEAD,
    as_arrays,
    compiled,
    exp,
    fetch,
    inlined,
    load,
    match_threads,
    serial,
    store,
    targets,
)
from i3lm.ops.wkv.reference import EMPTY_EXPONENT, FASTEST_DECAY

_BLOCK = 128  # channels per task: long enough runs for the prefetcher, few enough for the cache
_STRETCH = 64  # steps whose sums the backward pass holds at one time


@inlined()
def _weights(a, b, one):
    """``(e^(a - m), e^(b - m), m)`` with ``m = max(a, b)``; `one` carries the dtype."""
    smaller = exp(-abs(a - b))
    if a >= b:
        return one, smaller, a
    return smaller, one, b


# Rows of a task's working array. Loops run over all of `_BLOCK`, a length that the compiler knows;
# channels past the last one compute on zeros.
_NUM, _DEN, _TOP, _DECAY, _FIRST, _KEY, _VALUE, _OUTPUT = range(8)
_GRAD, _GRAD_KEY, _GRAD_VALUE, _SUM_DECAY, _SUM_FIRST = range(8, 13)
_PAST_NUM, _PAST_DEN, _PAST_TOP = range(13, 16)


@inlined()
def _empty(work):
    for i in range(_BLOCK):
        work[_NUM, i], work[_DEN, i], work[_TOP, i] = 0, 0, EMPTY_EXPONENT


@inlined()
def _add_token(work, one):
    for i in range(_BLOCK):
        key = work[_KEY, i]
        past, now, top = _weights(work[_DECAY, i] + work[_TOP, i], key, one)
        work[_NUM, i] = past * work[_NUM, i] + now * work[_VALUE, i]
        work[_DEN, i] = past * work[_DEN, i] + now
        work[_TOP, i] = top


@inlined()
def _read_and_add_token(work, one):
    """The output of a token, from the sums before it, and the sums after it."""
    for i in range(_BLOCK):
        past, now, _ = _weights(work[_FIRST, i] + work[_TOP, i], work[_KEY, i], one)
        num = past * work[_NUM, i] + now * work[_VALUE, i]
        work[_OUTPUT, i] = num / (past * work[_DEN, i] + now)
    _add_token(work, one)


@inlined()
def _walk(work, key, value, reset, mask, b, channels, begin, end, sums, one):
    """Adds the tokens of a stretch of time; `sums` becomes what each step sees."""
    for t in range(begin, end):
        if reset.size and reset[b, t]:
            _empty(work)
        for row in range(3):
            store(sums[t - begin, row], work, _NUM + row)
        if not mask.size or mask[b, t]:
            ahead = min(t + AHEAD, key.shape[1] - 1)
            fetch(key[b, ahead, channels])
            fetch(value[b, ahead, channels])
            load(work, _KEY, key[b, t, channels])
            load(work, _VALUE, value[b, t, channels])
            _add_token(work, one)


@serial()
def next_token(key, value, decay, first, state, output):
    """One token of one row: all of shape (C,), but for the sums (3, C), which are replaced."""
    work = np.zeros((16, _BLOCK), np.float32)
    for low in range(0, key.size, _BLOCK):
        high = min(low + _BLOCK, key.size)
        load(work, _DECAY, decay[low:high])
        load(work, _FIRST, first[low:high])
        load(work, _KEY, key[low:high])
        load(work, _VALUE, value[low:high])
        for row in range(3):
            load(work, _NUM + row, state[row, low:high])
        _read_and_add_token(work, np.float32(1))
        store(output[low:high], work, _OUTPUT)
        for row in range(3):
            store(state[row, low:high], work, _NUM + row)


@compiled()
def _forward(key, value, decay, first, state, reset, mask, output, final):
    B, T, C = key.shape
    one = state.dtype.type(1)
    blocks = (C + _BLOCK - 1) // _BLOCK
    for task in prange(B * blocks):
        b, low = task // blocks, (task % blocks) * _BLOCK
        high = min(low + _BLOCK, C)
        work = np.zeros((16, _BLOCK), state.dtype)
        load(work, _DECAY, decay[low:high])
        load(work, _FIRST, first[low:high])
        for row in range(3):
            load(work, _NUM + row, state[b, row, low:high])
        for t in range(T):
            if reset.size and reset[b, t]:
                _empty(work)
            if mask.size and not mask[b, t]:
                output[b, t, low:high] = 0
                continue
            ahead = min(t + AHEAD, T - 1)
            fetch(key[b, ahead, low:high])
            fetch(value[b, ahead, low:high])
            load(work, _KEY, key[b, t, low:high])
            load(work, _VALUE, value[b, t, low:high])
            _read_and_add_token(work, one)
            store(output[b, t, low:high], work, _OUTPUT)
        for row in range(3):
            store(final[b, row, low:high], work, _NUM + row)


@compiled()
def _backward(
    key, value, decay, first, state, reset, mask, grad_output, grad_final,
    grad_key, grad_value, grad_decay, grad_first, grad_state,
):  # fmt: skip
    """See README.md beside this file for the adjoint recurrence."""
    B, T, C = key.shape
    one = state.dtype.type(1)
    blocks, stretches = (C + _BLOCK - 1) // _BLOCK, (T + _STRETCH - 1) // _STRETCH
    for task in prange(B * blocks):
        b, low = task // blocks, (task % blocks) * _BLOCK
        high = min(low + _BLOCK, C)
        work = np.zeros((16, _BLOCK), state.dtype)
        starts = np.empty((stretches, 3, _BLOCK), state.dtype)  # the sums before every stretch
        sums = np.empty((_STRETCH, 3, _BLOCK), state.dtype)
        load(work, _DECAY, decay[low:high])
        for row in range(3):
            load(work, _NUM + row, state[b, row, low:high])
        for stretch in range(stretches):
            begin = stretch * _STRETCH
            end = min(begin + _STRETCH, T)
            for row in range(3):
                store(starts[stretch, row], work, _NUM + row)
            _walk(work, key, value, reset, mask, b, slice(low, high), begin, end, sums, one)

        # In this array num and den are the adjoint of the sums after each step, scaled by e^top.
        back = np.zeros((16, _BLOCK), state.dtype)
        load(back, _DECAY, decay[low:high])
        load(back, _FIRST, first[low:high])
        load(back, _NUM, grad_final[b, 0, low:high])
        load(back, _DEN, grad_final[b, 1, low:high])
        for i in range(_BLOCK):
            back[_TOP, i] = -work[_TOP, i]
        for step in range(T):
            t = T - 1 - step
            stretch = t // _STRETCH
            begin, end = stretch * _STRETCH, t + 1
            if step and end - begin == _STRETCH:  # the sums of the last stretch are still there
                for row in range(3):
                    load(work, _NUM + row, starts[stretch, row])
                _walk(work, key, value, reset, mask, b, slice(low, high), begin, end, sums, one)
            if mask.size and not mask[b, t]:
                grad_key[b, t, low:high] = 0
                grad_value[b, t, low:high] = 0
            else:
                ahead = max(t - AHEAD, 0)
                fetch(grad_output[b, ahead, low:high])
                fetch(grad_key[b, ahead, low:high])
                fetch(grad_value[b, ahead, low:high])
                load(back, _KEY, key[b, t, low:high])
                load(back, _VALUE, value[b, t, low:high])
                load(back, _GRAD, grad_output[b, t, low:high])
                for row in range(3):
                    load(back, _PAST_NUM + row, sums[t - begin, row])
                for i in range(_BLOCK):
                    k, v, w, u = back[_KEY, i], back[_VALUE, i], back[_DECAY, i], back[_FIRST, i]
                    n, d, p = back[_PAST_NUM, i], back[_PAST_DEN, i], back[_PAST_TOP, i]
                    num, den, top = back[_NUM, i], back[_DEN, i], back[_TOP, i]
                    past, now, scale = _weights(u + p, k, one)
                    below = one / (past * d + now)
                    y = (past * n + now * v) * below
                    g = back[_GRAD, i] * below
                    h = -g * y
                    reach = exp(k + top)
                    back[_GRAD_VALUE, i] = now * g + reach * num
                    back[_GRAD_KEY, i] = now * g * (v - y) + reach * (num * v + den)
                    back[_SUM_FIRST, i] += past * (n * g + d * h)
                    back[_SUM_DECAY, i] += exp(w + p + top) * (n * num + d * den)
                    past, now, top = _weights(w + top, u - scale, one)
                    back[_NUM, i] = past * num + now * g
                    back[_DEN, i] = past * den + now * h
                    back[_TOP, i] = top
                store(grad_key[b, t, low:high], back, _GRAD_KEY)
                store(grad_value[b, t, low:high], back, _GRAD_VALUE)
            if reset.size and reset[b, t]:
                _empty(back)
        for row in range(3):
            load(back, _PAST_NUM + row, state[b, row, low:high])
        for i in range(_BLOCK):
            reach = exp(back[_PAST_TOP, i] + back[_TOP, i])
            back[_NUM, i] *= reach
            back[_DEN, i] *= reach
            weighted = back[_PAST_NUM, i] * back[_NUM, i]
            back[_TOP, i] = weighted + back[_PAST_DEN, i] * back[_DEN, i]
        for row in range(3):
            store(grad_state[b, row, low:high], back, _NUM + row)
        store(grad_decay[b, low:high], back, _SUM_DECAY)
        store(grad_first[b, low:high], back, _SUM_FIRST)


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
    time_decay = time_decay.clamp_min(FASTEST_DECAY)
    inputs = (key, value, time_decay, time_first, state, reset, mask)
    _forward(*as_arrays(*inputs), *targets(output, final))
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
    grad_decay, grad_first = (state.new_empty(key.shape[0], key.shape[2]) for _ in range(2))
    grad_start = state.new_empty(state.shape)
    match_threads()
    time_decay = time_decay.clamp_min(FASTEST_DECAY)
    inputs = (key, value, time_decay, time_first, state, reset, mask, grad_output, grad_state)
    results = (grad_key, grad_value, grad_decay, grad_first, grad_start)
    _backward(*as_arrays(*inputs), *targets(*results))
    return grad_key, grad_value, grad_decay.sum(0), grad_first.sum(0), grad_start
