"""The hybrid mixer's recurrence for CPUs, compiled from Python by numba.

The running average goes channel by channel (one task per batch row and block of channels), the
hidden state row by row of the batch (a step is one small matrix times a vector). The large
matrices around them stay PyTorch's matrix products. The backward pass keeps the running
average before every stretch of time alone, computes those of one stretch again when it comes to it,
and runs the adjoints in one sweep each.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import prange
from torch import Tensor

from i3lm.ops.linear import linear
from i3lm.ops.numba_bridge import (
    AHEAD,
    as_arrays,
    compiled,
    fetch,
    inlined,
    load,
    match_threads,
    store,
    targets,
)

_BLOCK = 128  # channels per task
_STRETCH = 64  # steps whose averages the backward pass holds at one time


# Rows of a task's working array; loops run over all of `_BLOCK`, a length that the compiler knows.
_AVERAGE, _MIX, _D, _X, _Y, _ADJOINT, _BEFORE, _SUM_MIX, _SUM_D, _GRAD_X = range(10)


@inlined()
def _mix_in(work):
    for i in range(_BLOCK):
        x = work[_X, i]
        work[_AVERAGE, i] = work[_MIX, i] * (work[_AVERAGE, i] - x) + x


@compiled()
def _average_forward(x, mix, D, start, reset, mask, y, final):
    """Adds ``D * h_t`` to y."""
    B, T, C = x.shape
    blocks = (C + _BLOCK - 1) // _BLOCK
    for task in prange(B * blocks):
        b, low = task // blocks, (task % blocks) * _BLOCK
        high = min(low + _BLOCK, C)
        work = np.zeros((10, _BLOCK), x.dtype)
        load(work, _MIX, mix[low:high])
        load(work, _D, D[low:high])
        load(work, _AVERAGE, start[b, low:high])
        for t in range(T):
            if reset.size and reset[b, t]:
                work[_AVERAGE] = 0
            if mask.size and not mask[b, t]:
                y[b, t, low:high] = 0
                continue
            ahead = min(t + AHEAD, T - 1)
            fetch(x[b, ahead, low:high])
            fetch(y[b, ahead, low:high])
            load(work, _X, x[b, t, low:high])
            load(work, _Y, y[b, t, low:high])
            _mix_in(work)
            for i in range(_BLOCK):
                work[_Y, i] += work[_D, i] * work[_AVERAGE, i]
            store(y[b, t, low:high], work, _Y)
        store(final[b, low:high], work, _AVERAGE)


@inlined()
def _walk(work, x, reset, mask, b, channels, begin, end, averages):
    """Mixes in a stretch of time; `averages` becomes what each step finds."""
    for t in range(begin, end):
        if reset.size and reset[b, t]:
            work[_AVERAGE] = 0
        store(averages[t - begin], work, _AVERAGE)
        if not mask.size or mask[b, t]:
            fetch(x[b, min(t + AHEAD, x.shape[1] - 1), channels])
            load(work, _X, x[b, t, channels])
            _mix_in(work)


@compiled()
def _average_backward(
    x, mix, D, start, reset, mask, grad_y, grad_final, grad_x, grad_mix, grad_D, grad_start
):
    """Adds to grad_x; writes the rest."""
    B, T, C = x.shape
    blocks, stretches = (C + _BLOCK - 1) // _BLOCK, (T + _STRETCH - 1) // _STRETCH
    for task in prange(B * blocks):
        b, low = task // blocks, (task % blocks) * _BLOCK
        high = min(low + _BLOCK, C)
        work = np.zeros((10, _BLOCK), x.dtype)
        starts = np.empty((stretches, _BLOCK), x.dtype)  # the average before every stretch
        averages = np.empty((_STRETCH, _BLOCK), x.dtype)
        load(work, _MIX, mix[low:high])
        load(work, _D, D[low:high])
        load(work, _AVERAGE, start[b, low:high])
        for stretch in range(stretches):
            begin = stretch * _STRETCH
            end = min(begin + _STRETCH, T)
            store(starts[stretch], work, _AVERAGE)
            _walk(work, x, reset, mask, b, slice(low, high), begin, end, averages)
        load(work, _ADJOINT, grad_final[b, low:high])
        for step in range(T):
            t = T - 1 - step
            stretch = t // _STRETCH
            begin, end = stretch * _STRETCH, t + 1
            if step and end - begin == _STRETCH:  # the averages of the last stretch are there
                load(work, _AVERAGE, starts[stretch])
                _walk(work, x, reset, mask, b, slice(low, high), begin, end, averages)
            if not mask.size or mask[b, t]:
                ahead = max(t - AHEAD, 0)
                fetch(grad_y[b, ahead, low:high])
                fetch(grad_x[b, ahead, low:high])
                load(work, _X, x[b, t, low:high])
                load(work, _Y, grad_y[b, t, low:high])
                load(work, _GRAD_X, grad_x[b, t, low:high])
                load(work, _BEFORE, averages[t - begin])
                for i in range(_BLOCK):
                    m, d, g = work[_MIX, i], work[_D, i], work[_Y, i]
                    gap = work[_BEFORE, i] - work[_X, i]
                    adjoint = work[_ADJOINT, i] + d * g
                    work[_SUM_D, i] += g * (m * gap + work[_X, i])
                    work[_SUM_MIX, i] += adjoint * gap
                    work[_GRAD_X, i] += adjoint - m * adjoint
                    work[_ADJOINT, i] = m * adjoint
                store(grad_x[b, t, low:high], work, _GRAD_X)
            if reset.size and reset[b, t]:
                work[_ADJOINT] = 0
        store(grad_mix[b, low:high], work, _SUM_MIX)
        store(grad_D[b, low:high], work, _SUM_D)
        store(grad_start[b, low:high], work, _ADJOINT)


@inlined()
def _dot(matrix, row, work, vector):
    """A row of a matrix times a row of the working array: a sum, which vectorises."""
    total = work.dtype.type(0)
    for i in range(matrix.shape[1]):
        total += matrix[row, i] * work[vector, i]
    return total


@compiled()
def _hidden_forward(u, A, start, reset, mask, before, states, final):
    """``s_t = A s_{t-1} + u_t``; keeps s_{t-1} as the step finds it, and s_t."""
    B, T, N = u.shape
    for b in prange(B):
        work = np.zeros((2, N), u.dtype)  # the state, and the next one
        load(work, 0, start[b])
        for t in range(T):
            if reset.size and reset[b, t]:
                work[0] = 0
            store(before[b, t], work, 0)
            if not mask.size or mask[b, t]:
                for i in range(N):
                    work[1, i] = u[b, t, i] + _dot(A, i, work, 0)
                load(work, 0, work[1])
            store(states[b, t], work, 0)
        store(final[b], work, 0)


@compiled()
def _hidden_backward(grad_states, At, reset, mask, grad_final, adjoints, grad_start):
    """The gradient of every ``A s_{t-1} + u_t``: zero at padded steps."""
    B, T, N = grad_states.shape
    for b in prange(B):
        work = np.zeros((2, N), grad_states.dtype)  # the adjoint, and the one before it
        load(work, 0, grad_final[b])
        for step in range(T):
            t = T - 1 - step
            if not mask.size or mask[b, t]:
                for i in range(N):
                    work[0, i] += grad_states[b, t, i]
                store(adjoints[b, t], work, 0)
                for i in range(N):
                    work[1, i] = _dot(At, i, work, 0)
                load(work, 0, work[1])
            else:
                adjoints[b, t] = 0
            if reset.size and reset[b, t]:
                work[0] = 0
        store(grad_start[b], work, 0)


def _hidden_states(
    x: Tensor, A: Tensor, B: Tensor, hidden: Tensor, reset: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """s_{t-1} as each step finds it, s_t (both (B, T, N)), and the last s (B, N)."""
    u = linear(x, B)
    before, states = u.new_empty(u.shape), u.new_empty(u.shape)
    last = hidden.new_empty(hidden.shape)
    _hidden_forward(*as_arrays(u, A, hidden, reset, mask), *targets(before, states, last))
    return before, states, last


def state_space_numba(
    x: Tensor,
    mix: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    state: Tensor,
    reset: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Computes `i3lm.ops.state_space` on the CPU; as `state_space_reference` in the rest."""
    average, hidden = state.split([x.shape[2], A.shape[0]], dim=1)
    last_average = average.new_empty(average.shape)
    match_threads()
    _, states, last_hidden = _hidden_states(x, A, B, hidden, reset, mask)
    y = linear(states, C)
    _average_forward(*as_arrays(x, mix, D, average, reset, mask), *targets(y, last_average))
    return y, torch.cat([last_average, last_hidden], dim=1)


def state_space_numba_backward(
    grad_output: Tensor,
    grad_state: Tensor,
    x: Tensor,
    mix: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    state: Tensor,
    reset: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, ...]:
    """The gradients of x, mix, A, B, C, D and state; states are recomputed."""
    sizes = [x.shape[2], A.shape[0]]
    average, hidden = state.split(sizes, dim=1)
    grad_average, grad_hidden = grad_state.split(sizes, dim=1)
    if mask is not None:
        grad_output = grad_output.masked_fill(~mask[..., None], 0)
    grad_output = grad_output.contiguous()  # once: that of a sum is one number expanded
    match_threads()
    before, states, _ = _hidden_states(x, A, B, hidden, reset, mask)
    adjoints, start_hidden = states.new_empty(states.shape), hidden.new_empty(hidden.shape)
    grad_states = linear(grad_output, C.T.contiguous())  # 1.6 times as fast, and small
    _hidden_backward(
        *as_arrays(grad_states, A.T, reset, mask, grad_hidden), *targets(adjoints, start_hidden)
    )
    grad_x, start_average = linear(adjoints, B.T), average.new_empty(average.shape)
    grad_mix, grad_D = (x.new_empty(x.shape[0], x.shape[2]) for _ in range(2))
    inputs = (x, mix, D, average, reset, mask, grad_output, grad_average)
    results = (grad_x, grad_mix, grad_D, start_average)
    _average_backward(*as_arrays(*inputs), *targets(*results))
    flat = adjoints.flatten(0, 1)
    return (
        grad_x,
        grad_mix.sum(0),
        flat.T @ before.flatten(0, 1),  # too small to gain by `linear`
        linear(flat.T, x.flatten(0, 1).T),
        # Its transpose: oneDNN is twice as fast where the narrow matrix comes first.
        linear(states.flatten(0, 1).T, grad_output.flatten(0, 1).T).T.contiguous(),
        grad_D.sum(0),
        torch.cat([start_average, start_hidden], dim=1),
    )
