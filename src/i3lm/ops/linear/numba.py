"""A few rows times matrices at the speed of memory, as in a step of decoding.

A matrix is read once, as float32, bfloat16 or int8; all else is float32.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numba import carray, prange
from torch import Tensor

from i3lm.ops.numba_bridge import (
    address_of,
    call,
    compiled,
    fetch,
    floats,
    inlined,
    match_threads,
    pointer,
    serial,
    widen,
)

# The numbers of a product: addresses of the matrix (N, K), of a factor and of a summand per output
# (0 where there is none), N, K, and the addresses of inputs (R, K) and outputs (R, N).
WEIGHT, SCALE, BIAS, HEIGHT, WIDTH, INPUT, OUTPUT, NUMBERS = range(8)


# So many rows of a matrix at a time: their streams keep more of the memory's lines under way.
_TOGETHER = 4


# Functions of their own: within a parallel loop a sum would stay scalar.
@serial()
def _dots(x, a, b, c, d):
    """The products of a vector with four rows."""
    p = q = r = s = np.float32(0)
    for i in range(x.size):
        p += widen(a[i]) * x[i]
        q += widen(b[i]) * x[i]
        r += widen(c[i]) * x[i]
        s += widen(d[i]) * x[i]
    return p, q, r, s


@serial()
def _dot(x, row):
    total = np.float32(0)
    for i in range(x.size):
        total += widen(row[i]) * x[i]
    return total


@inlined()
def _finish(total, n, scale, bias):
    if scale.size:
        total *= scale[n]
    if bias.size:
        total += bias[n]
    return total


@serial()
def _multiply_rows(x, weight, scale, bias, output, low, high):
    if high - low < _TOGETHER:
        for n in range(low, high):
            for r in range(x.shape[0]):
                output[r, n] = _finish(_dot(x[r], weight[n]), n, scale, bias)
        return
    for start in range(low, high, _TOGETHER):
        # The last ones once more where fewer are left: so a row's sum has one order, wherever the
        # threads' shares begin.
        n = min(start, high - _TOGETHER)
        if weight.itemsize < 4:  # narrow rows are so short that processors do not look far ahead
            for ahead in range(n + _TOGETHER, min(n + 2 * _TOGETHER, high)):
                fetch(weight[ahead])
        for r in range(x.shape[0]):
            totals = _dots(x[r], weight[n], weight[n + 1], weight[n + 2], weight[n + 3])
            for i in range(_TOGETHER):
                output[r, n + i] = _finish(totals[i], n + i, scale, bias)


@serial()
def _multiply_share(product, R, like, task, tasks):
    """One task's share of the rows of a matrix."""
    N, K = product[HEIGHT], product[WIDTH]
    share = (N + tasks - 1) // tasks
    low, high = task * share, min((task + 1) * share, N)
    x, output = floats(product[INPUT], (R, K)), floats(product[OUTPUT], (R, N))
    weight = carray(pointer(product[WEIGHT]), (N, K), like.dtype)
    scale = floats(product[SCALE], (N if product[SCALE] else 0,))
    bias = floats(product[BIAS], (N if product[BIAS] else 0,))
    _multiply_rows(x, weight, scale, bias, output, low, high)


@compiled()
def _multiply(products, count, R, like, tasks):
    """Several products, the rows of each matrix shared out over the tasks."""
    for task in prange(tasks):
        numbers = carray(pointer(products), (count, NUMBERS), np.int64)
        for m in range(count):
            _multiply_share(numbers[m], R, like, task, tasks)


_FLOAT32, _BFLOAT16, _INT8 = (np.empty(0, kind) for kind in (np.float32, np.uint16, np.int8))


def _by_float32(products, count, R, tasks):
    _multiply(products, count, R, _FLOAT32, tasks)
    return 1


def _by_bfloat16(products, count, R, tasks):
    _multiply(products, count, R, _BFLOAT16, tasks)
    return 1


def _by_int8(products, count, R, tasks):
    _multiply(products, count, R, _INT8, tasks)
    return 1


_FUNCTIONS: dict[torch.dtype, Callable[..., int]] = {
    torch.float32: _by_float32,
    torch.bfloat16: _by_bfloat16,
    torch.int8: _by_int8,
}


def multiplication(dtype: torch.dtype) -> int:
    """Gives the address of the function that multiplies by matrices of a dtype.

    For `call`: it takes the address of a table of products, of `NUMBERS` int64 numbers each, how
    many they are, the rows of their inputs and the number of threads.
    """
    return address_of(_FUNCTIONS[dtype])


@serial()
def _call(function, products, count, R, tasks):
    return call(function, products, count, R, tasks)


def few_rows(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None
) -> Tensor:
    """Gives ``(x @ weight.T) * scale + bias`` in float32.

    Args:
        x: Inputs, float32, shape (R, K).
        weight: float32, bfloat16 or int8, shape (N, K), contiguous.
        bias: float32 or bfloat16, shape (N,), or None.
        scale: One factor per output, float32, shape (N,), or None.

    Returns:
        Shape (R, N), float32.
    """
    x, output = x.contiguous(), x.new_empty(x.shape[0], weight.shape[0])
    if bias is not None:
        bias = bias.float().contiguous()
    small = [0 if part is None else part.data_ptr() for part in (scale, bias)]
    inputs = [*weight.shape, x.data_ptr(), output.data_ptr()]
    products = np.array([weight.data_ptr(), *small, *inputs], np.int64)
    address = products.__array_interface__["data"][0]
    if not _call(multiplication(weight.dtype), address, 1, len(x), match_threads()):
        raise RuntimeError("a product failed; its error stands above")
    return output
