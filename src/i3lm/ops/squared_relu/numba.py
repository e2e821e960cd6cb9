"""Squared ReLU for CPUs, compiled from Python by numba: one pass each way."""

from __future__ import annotations

import numpy as np
from numba import prange
from torch import Tensor

from i3lm.ops.numba_bridge import (
    as_arrays,
    as_written,
    fetch_ahead,
    match_threads,
    targets,
    widen,
    written,
)

_PIECE, _BLOCK = 8192, 512  # numbers of a task, and of a part of it


@as_written()
def _forward(x, output):
    zero = widen(x.dtype.type(0))
    for task in prange((x.size + _PIECE - 1) // _PIECE):
        end = min((task + 1) * _PIECE, x.size)
        for low in range(task * _PIECE, end, _BLOCK):
            high = min(low + _BLOCK, end)
            fetch_ahead(x, low, high)
            fetch_ahead(output, low, high)
            inputs, squares = x[low:high], output[low:high]
            for i in range(inputs.size):
                number = widen(inputs[i])
                positive = zero if number < zero else number  # NaN stays NaN
                squares[i] = written(positive * positive, squares[i])


@as_written()
def _backward(grad, output, grad_x):
    for task in prange((grad.size + _PIECE - 1) // _PIECE):
        end = min((task + 1) * _PIECE, grad.size)
        for low in range(task * _PIECE, end, _BLOCK):
            high = min(low + _BLOCK, end)
            fetch_ahead(grad, low, high)
            fetch_ahead(output, low, high)
            fetch_ahead(grad_x, low, high)
            grads, squares, results = grad[low:high], output[low:high], grad_x[low:high]
            for i in range(grads.size):
                # Rounded alike, the root of a rounded square is the number itself (of all but
                # numbers so small that their squares vanish).
                root = widen(written(np.sqrt(widen(squares[i])), squares[i]))
                results[i] = written(widen(grads[i]) * (root + root), results[i])


def squared_relu_numba(x: Tensor) -> Tensor:
    """Computes ``max(x, 0)^2`` on the CPU."""
    output = x.new_empty(x.shape)
    match_threads()
    _forward(*(array.reshape(-1) for array in (*as_arrays(x), *targets(output))))
    return output


def squared_relu_numba_backward(grad: Tensor, output: Tensor) -> tuple[Tensor]:
    """The gradient of the input, from that of the output and the output."""
    grad_x = output.new_empty(output.shape)
    match_threads()
    arrays = (*as_arrays(grad, output), *targets(grad_x))
    _backward(*(array.reshape(-1) for array in arrays))
    return (grad_x,)
