"""The hybrid mixer's recurrence for CPUs, compiled from Python by numba.

The running average goes channel by channel (one task per batch row and block of channels), the
hidden state row by row of the batch (a step is one small matrix times a vector). Products with the
large matrices are as thin as the hidden state. Those that go from it to the channels, or sum over
time, are part of the average's passes: what a stretch of time reads and writes stays in cache
between them. The backward pass keeps the running average before every stretch alone, computes those
of one stretch again when it comes to it, and runs the adjoints in one sweep each.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import prange
from torch import Tensor

from i3lm.ops.numba_bridge import (
    AHEAD,
    as_arrays,
    compiled,
    fetch,
    inlined,
    load,
    match_threads,
    serial,
    store,
    targets,
)
from i3lm.ops.numba_products import add_product, whole_columns

_BLOCK = 128  # channels per task, whole pieces of a product
_STRETCH = 32  # steps that a task has in its working memory at one time


# Rows of a task's working array; loops run over all of `_BLOCK`, a length that the compiler knows.
_AVERAGE, _MIX, _D, _X, _Y, _ADJOINT, _BEFORE, _SUM_MIX, _SUM_D, _GRAD_X = range(10)


class _Inputs(NamedTuple):
    """What the op takes, as arrays; reset and mask are empty where there is none."""

    x: np.ndarray
    mix: np.ndarray
    A: np.ndarray
    B: np.ndarray
    C: np.ndarray
    D: np.ndarray
    state: np.ndarray
    reset: np.ndarray
    mask: np.ndarray


class _Gradients(NamedTuple):
    """Those of the inputs, to be written."""

    x: np.ndarray
    mix: np.ndarray
    A: np.ndarray
    B: np.ndarray
    C: np.ndarray
    D: np.ndarray
    state: np.ndarray


class _Parts(NamedTuple):
    """What every row of the batch gives to the gradients of the parameters."""

    mix: np.ndarray
    A: np.ndarray
    B: np.ndarray
    C: np.ndarray
    D: np.ndarray


@inlined()
def _tasks(x):
    return x.shape[0] * ((x.shape[2] + _BLOCK - 1) // _BLOCK)


@inlined()
def _place(task, x):
    """A task's row of the batch, and the first and the end of its channels."""
    blocks = (x.shape[2] + _BLOCK - 1) // _BLOCK
    low = (task % blocks) * _BLOCK
    return task // blocks, low, min(low + _BLOCK, x.shape[2])


@inlined()
def _mix_in(work):
    for i in range(_BLOCK):
        x = work[_X, i]
        work[_AVERAGE, i] = work[_MIX, i] * (work[_AVERAGE, i] - x) + x


@serial()
def _padded(matrix, columns):
    """A matrix with columns of zero behind it."""
    padded = np.zeros((matrix.shape[0], columns), matrix.dtype)
    for i in range(matrix.shape[0]):
        for j in range(matrix.shape[1]):
            padded[i, j] = matrix[i, j]
    return padded


@compiled()
def _multiply(x, matrix, product):
    """``x @ matrix`` for many rows."""
    pieces = (x.shape[0] + _STRETCH - 1) // _STRETCH
    for piece in prange(pieces):
        low = piece * _STRETCH
        high = min(low + _STRETCH, x.shape[0])
        product[low:high] = 0
        add_product(x[low:high], matrix, product[low:high])


@serial()
def _hidden_forward_of_row(At, given, states, final, b):
    """``s_t = A s_{t-1} + u_t``; finds u_t where it leaves s_t."""
    T, width = states.shape[1:]
    N, channels, reset, mask = At.shape[0], given.x.shape[2], given.reset, given.mask
    state = np.zeros((1, width), states.dtype)
    load(state, 0, given.state[b, channels:])
    for t in range(T):
        if reset.size and reset[b, t]:
            state[:] = 0
        if not mask.size or mask[b, t]:
            add_product(state[:, :N], At, states[b, t : t + 1])
            load(state, 0, states[b, t])
        else:
            store(states[b, t], state, 0)
    store(final[b, channels:], state, 0)


@compiled()
def _hidden_forward(At, given, states, final):
    for row in prange(states.shape[0]):
        b = np.int64(row)  # numba counts without a sign, and would compile what it calls twice
        _hidden_forward_of_row(At, given, states, final, b)


@serial()
def _hidden_backward_of_row(A, given, states, grad_final, adjoints, grad_A, grad_state, b):
    """The gradient of every ``A s_{t-1} + u_t``: zero at padded steps.

    Finds what comes to that of s_t from the outputs where it leaves this.
    """
    T, width = states.shape[1:]
    N, channels, reset, mask = A.shape[0], given.x.shape[2], given.reset, given.mask
    adjoint, first = np.zeros((1, width), A.dtype), np.zeros((1, width), A.dtype)
    before = np.zeros((_STRETCH, width), A.dtype)  # what the steps of a stretch find
    load(adjoint, 0, grad_final[b, channels:])
    load(first, 0, given.state[b, channels:])
    for step in range(T):
        t = T - 1 - step
        if not mask.size or mask[b, t]:
            for i in range(width):
                adjoints[b, t, i] += adjoint[0, i]
            adjoint[:] = 0
            add_product(adjoints[b, t : t + 1, :N], A, adjoint)
        else:
            adjoints[b, t] = 0
        place = t % _STRETCH
        load(before, place, states[b, t - 1] if t else first[0])
        if reset.size and reset[b, t]:
            before[place] = 0
            adjoint[:] = 0
        if place == 0:
            end = min(t + _STRETCH, T)
            add_product(adjoints[b, t:end, :N].T, before[: end - t], grad_A[b])
    store(grad_state[b, channels:], adjoint, 0)


@compiled()
def _hidden_backward(A, given, states, grad_final, adjoints, grad_A, grad_state):
    for row in prange(states.shape[0]):
        b = np.int64(row)  # numba counts without a sign, and would compile what it calls twice
        _hidden_backward_of_row(A, given, states, grad_final, adjoints, grad_A, grad_state, b)


@serial()
def _outputs_of_block(given, states, y, final, b, low, high):
    """``y_t = C s_t + D * h_t``, and the last h."""
    x, reset, mask = given.x, given.reset, given.mask
    T, N = x.shape[1], given.A.shape[0]
    work = np.zeros((10, _BLOCK), x.dtype)
    matrix = _padded(given.C[low:high].T, _BLOCK)
    outputs = np.empty((_STRETCH, _BLOCK), x.dtype)
    load(work, _MIX, given.mix[low:high])
    load(work, _D, given.D[low:high])
    load(work, _AVERAGE, given.state[b, low:high])
    for begin in range(0, T, _STRETCH):
        end = min(begin + _STRETCH, T)
        outputs[:] = 0
        add_product(states[b, begin:end, :N], matrix, outputs[: end - begin])
        for t in range(begin, end):
            if reset.size and reset[b, t]:
                work[_AVERAGE] = 0
            if mask.size and not mask[b, t]:
                y[b, t, low:high] = 0
                continue
            ahead = min(t + AHEAD, T - 1)
            fetch(x[b, ahead, low:high])
            fetch(y[b, ahead, low:high])
            load(work, _X, x[b, t, low:high])
            load(work, _Y, outputs[t - begin])
            _mix_in(work)
            for i in range(_BLOCK):
                work[_Y, i] += work[_D, i] * work[_AVERAGE, i]
            store(y[b, t, low:high], work, _Y)
    store(final[b, low:high], work, _AVERAGE)


@compiled()
def _outputs(given, states, y, final):
    for task in prange(_tasks(given.x)):
        b, low, high = _place(task, given.x)
        _outputs_of_block(given, states, y, final, b, low, high)


@serial()
def _walk(work, given, b, channels, begin, end, inputs, averages):
    """Mixes in a stretch of time; `averages` becomes what each step finds, `inputs` its input."""
    x, reset, mask = given.x, given.reset, given.mask
    for t in range(begin, end):
        if reset.size and reset[b, t]:
            work[_AVERAGE] = 0
        store(averages[t - begin], work, _AVERAGE)
        fetch(x[b, min(t + AHEAD, x.shape[1] - 1), channels])
        if not mask.size or mask[b, t]:
            load(work, _X, x[b, t, channels])
            store(inputs[t - begin], work, _X)
            _mix_in(work)
        else:
            inputs[t - begin] = 0


@serial()
def _gradients_of_block(
    given, states, adjoints, grad_y, grad_final, grad_x, grad_state, parts, b, low, high
):
    """The gradients of x and the first h, and parts of those of mix, B, C and D."""
    x, reset, mask = given.x, given.reset, given.mask
    T, width = states.shape[1:]
    N = given.A.shape[0]
    stretches = (T + _STRETCH - 1) // _STRETCH
    work = np.zeros((10, _BLOCK), x.dtype)
    matrix = _padded(given.B[:, low:high], _BLOCK)
    starts = np.empty((stretches, _BLOCK), x.dtype)  # the average before every stretch
    # Of the steps of a stretch: the average that each finds, its input and the gradients.
    averages = np.empty((_STRETCH, _BLOCK), x.dtype)
    inputs = np.empty((_STRETCH, _BLOCK), x.dtype)
    of_outputs = np.empty((_STRETCH, _BLOCK), x.dtype)
    of_inputs = np.empty((_STRETCH, _BLOCK), x.dtype)
    of_B, of_C = np.zeros((N, _BLOCK), x.dtype), np.zeros((_BLOCK, width), x.dtype)
    load(work, _MIX, given.mix[low:high])
    load(work, _D, given.D[low:high])
    load(work, _AVERAGE, given.state[b, low:high])
    for stretch in range(stretches):
        begin = stretch * _STRETCH
        end = min(begin + _STRETCH, T)
        store(starts[stretch], work, _AVERAGE)
        _walk(work, given, b, slice(low, high), begin, end, inputs, averages)
    load(work, _ADJOINT, grad_final[b, low:high])
    for back in range(stretches):
        stretch = stretches - 1 - back
        begin = stretch * _STRETCH
        end = min(begin + _STRETCH, T)
        count = end - begin
        if back:  # those of the last stretch are there
            load(work, _AVERAGE, starts[stretch])
            _walk(work, given, b, slice(low, high), begin, end, inputs, averages)
        of_inputs[:] = 0
        add_product(adjoints[b, begin:end, :N], matrix, of_inputs[:count])
        for step in range(count):
            t = end - 1 - step
            if not mask.size or mask[b, t]:
                ahead = max(t - AHEAD, 0)
                fetch(grad_y[b, ahead, low:high])
                fetch(grad_x[b, ahead, low:high])
                load(work, _X, inputs[t - begin])
                load(work, _Y, grad_y[b, t, low:high])
                load(work, _GRAD_X, of_inputs[t - begin])
                load(work, _BEFORE, averages[t - begin])
                for i in range(_BLOCK):
                    m, d, g = work[_MIX, i], work[_D, i], work[_Y, i]
                    gap = work[_BEFORE, i] - work[_X, i]
                    adjoint = work[_ADJOINT, i] + d * g
                    work[_SUM_D, i] += g * (m * gap + work[_X, i])
                    work[_SUM_MIX, i] += adjoint * gap
                    work[_GRAD_X, i] += adjoint - m * adjoint
                    work[_ADJOINT, i] = m * adjoint
                store(of_outputs[t - begin], work, _Y)
                store(grad_x[b, t, low:high], work, _GRAD_X)
            else:
                of_outputs[t - begin] = 0
                grad_x[b, t, low:high] = 0
            if reset.size and reset[b, t]:
                work[_ADJOINT] = 0
        add_product(adjoints[b, begin:end, :N].T, inputs[:count], of_B)
        add_product(of_outputs[:count].T, states[b, begin:end], of_C)
    store(parts.mix[b, 0, low:high], work, _SUM_MIX)
    store(parts.D[b, 0, low:high], work, _SUM_D)
    store(grad_state[b, low:high], work, _ADJOINT)
    for n in range(N):
        store(parts.B[b, n, low:high], of_B, n)
    for c in range(low, high):
        store(parts.C[b, c], of_C, c - low)


@compiled()
def _gradients(given, states, adjoints, grad_y, grad_final, grad_x, grad_state, parts):
    for task in prange(_tasks(given.x)):
        b, low, high = _place(task, given.x)
        gradients = grad_y, grad_final, grad_x, grad_state, parts
        _gradients_of_block(given, states, adjoints, *gradients, b, low, high)


@compiled()
def _add_up(parts, total):
    """Adds up what the rows of the batch gave."""
    for i in prange(total.shape[0]):
        total[i] = 0
        for b in range(parts.shape[0]):
            for j in range(total.shape[1]):
                total[i, j] += parts[b, i, j]


@serial()
def _hidden_states(given, final):
    """Every s_t, as wide as products ask for; and the last."""
    batch, T, channels = given.x.shape
    width = whole_columns(given.A.shape[0], given.x.itemsize)
    states = np.empty((batch, T, width), given.x.dtype)
    rows = states.reshape((batch * T, width))
    _multiply(given.x.reshape((batch * T, channels)), _padded(given.B.T, width), rows)
    _hidden_forward(_padded(given.A.T, width), given, states, final)
    return states


@serial()
def _forward(given, y, final):
    states = _hidden_states(given, final)
    _outputs(given, states, y, final)


@serial()
def _backward(grad_y, grad_final, given, gradients):
    batch, T, channels = given.x.shape
    N, dtype = given.A.shape[0], given.x.dtype
    states = _hidden_states(given, np.empty_like(given.state))
    width = states.shape[2]
    adjoints = np.empty_like(states)
    rows = adjoints.reshape((batch * T, width))
    _multiply(grad_y.reshape((batch * T, channels)), _padded(given.C, width), rows)
    parts = _Parts(
        np.empty((batch, 1, channels), dtype),
        np.zeros((batch, N, width), dtype),
        np.empty((batch, N, channels), dtype),
        np.empty((batch, channels, N), dtype),
        np.empty((batch, 1, channels), dtype),
    )
    A, grad_state = _padded(given.A, width), gradients.state
    _hidden_backward(A, given, states, grad_final, adjoints, parts.A, grad_state)
    _gradients(given, states, adjoints, grad_y, grad_final, gradients.x, grad_state, parts)
    _add_up(parts.mix, gradients.mix.reshape((1, channels)))
    _add_up(parts.A, gradients.A)
    _add_up(parts.B, gradients.B)
    _add_up(parts.C, gradients.C)
    _add_up(parts.D, gradients.D.reshape((1, channels)))


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
    y, final = x.new_empty(x.shape), state.new_empty(state.shape)
    match_threads()
    given = _Inputs(*as_arrays(x, mix, A, B, C, D, state, reset, mask))
    _forward(given, *targets(y, final))
    return y, final


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
    gradients = tuple(tensor.new_empty(tensor.shape) for tensor in (x, mix, A, B, C, D, state))
    match_threads()
    given = _Inputs(*as_arrays(x, mix, A, B, C, D, state, reset, mask))
    _backward(*as_arrays(grad_output, grad_state), given, _Gradients(*targets(*gradients)))
    return gradients
