"""GELU and its derivative in bfloat16 on the CPU, by a table.

There are 65,536 bfloat16 numbers. Their values and derivatives, computed once in float64, take
256 KiB, of which numbers of usual size touch little more than the first cache: to look them up is
faster than an exponential and exactly rounded. numba takes bfloat16 as its bits.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from numba import prange
from torch import Tensor

from i3lm.ops.numba_bridge import (
    as_arrays,
    as_written,
    compiled,
    fetch_ahead,
    inlined,
    match_threads,
    targets,
    widen,
    written,
)

_BLOCK = 512  # entries at a time: one loop looks them up, the others vectorise
_SIXTEEN = np.uint32(16)


@cache
def _table() -> np.ndarray:
    """For every bfloat16 by its bits: GELU's bits in the lower half, its derivative's above."""
    bits = torch.arange(2**16, dtype=torch.int32)
    x = (bits << 16).view(torch.float32).double()
    share = torch.special.erfc(-x / math.sqrt(2)) / 2  # unlike 1 + erf, exact in the far tail
    density = torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    value, derivative = (
        y.bfloat16().view(torch.uint16).to(torch.int32) for y in (x * share, share + x * density)
    )
    return (value | derivative << 16).view(torch.uint32).numpy()


@inlined()
def _find(found, table, x):
    for i in range(x.shape[0]):
        found[i] = table[x[i]]


@inlined()
def _write(target, found, shift):
    for i in range(target.shape[0]):
        target[i] = np.uint16(found[i] >> shift)


@compiled()
def _look_up(x, table, value, derivative, tasks):
    for task in prange(tasks):
        found = np.empty(_BLOCK, np.uint32)
        end = (task + 1) * x.shape[0] // tasks
        for low in range(task * x.shape[0] // tasks, end, _BLOCK):
            high = min(low + _BLOCK, end)
            fetch_ahead(x, low, high)
            fetch_ahead(value, low, high)
            fetch_ahead(derivative, low, high)
            _find(found, table, x[low:high])
            _write(value[low:high], found, np.uint32(0))
            if derivative.size:
                _write(derivative[low:high], found, _SIXTEEN)


@as_written()
def _multiply(grad, derivative, output, tasks):
    for task in prange(tasks):
        end = (task + 1) * grad.size // tasks
        for low in range(task * grad.size // tasks, end, _BLOCK):
            high = min(low + _BLOCK, end)
            fetch_ahead(grad, low, high)
            fetch_ahead(derivative, low, high)
            fetch_ahead(output, low, high)
            factors, others, products = grad[low:high], derivative[low:high], output[low:high]
            for i in range(products.size):
                products[i] = written(widen(factors[i]) * widen(others[i]), products[i])


def gelu_numba_backward(grad: Tensor, derivative: Tensor) -> Tensor:
    """The gradient of the input, in bfloat16, from that of the value and the derivative."""
    output = derivative.new_empty(derivative.shape)
    arrays = (*as_arrays(grad, derivative), *targets(output))
    _multiply(*(array.reshape(-1) for array in arrays), match_threads())
    return output


def gelu_numba(x: Tensor, wants_derivative: bool) -> tuple[Tensor, Tensor]:
    """Gives GELU and, where it is wanted, its derivative (else nothing), in bfloat16."""
    value = x.new_empty(x.shape)
    derivative = x.new_empty(x.shape if wants_derivative else 0)
    (numbers,) = as_arrays(x)
    results = (array.reshape(-1) for array in targets(value, derivative))
    _look_up(numbers.reshape(-1), _table(), *results, match_threads())
    return value, derivative
