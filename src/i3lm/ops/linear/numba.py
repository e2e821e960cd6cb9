"""A few rows times matrices at the speed of memory, as in a step of decoding.

A matrix is read once, as float32, bfloat16 or int8; all else is float32.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numba import carray
from torch import Tensor

from i3lm.ops.linear.numba_streams import STREAMS, dots_of_lines, whole_lines
from i3lm.ops.numba_bridge import (
    address_of,
    floats,
    inlined,
    match_threads,
    pointer,
    serial,
    serial_as_written,
    widen,
)
from i3lm.ops.numba_team import share_at_once

# The numbers of a product: addresses of the matrix (N, K), of a factor and of a summand per output
# (0 where there is none), N, K, and the addresses of inputs (R, K) and outputs (R, N).
WEIGHT, SCALE, BIAS, HEIGHT, WIDTH, INPUT, OUTPUT, NUMBERS = range(8)


@serial_as_written()
def _dots(x, weight, rows):
    """The products of a vector with rows of a matrix."""
    a, b, c, d = dots_of_lines(x, weight, rows)
    for i in range(whole_lines(weight), weight.shape[1]):
        a += widen(weight[rows[0], i]) * x[i]
        b += widen(weight[rows[1], i]) * x[i]
        c += widen(weight[rows[2], i]) * x[i]
        d += widen(weight[rows[3], i]) * x[i]
    return a, b, c, d


@inlined()
def _finish(total, n, scale, bias):
    if scale.size:
        total *= scale[n]
    if bias.size:
        total += bias[n]
    return total


@serial()
def _multiply_rows(x, weight, scale, bias, output, low, high):
    # So many rows to a stream; one that is shorter stays at the last row.
    length, last = (high - low + STREAMS - 1) // STREAMS, high - 1
    for n in range(low, low + length):
        second, third, fourth = n + length, n + 2 * length, n + 3 * length
        rows = n, min(second, last), min(third, last), min(fourth, last)
        for r in range(x.shape[0]):
            totals = _dots(x[r], weight, rows)
            for i in range(STREAMS):
                output[r, rows[i]] = _finish(totals[i], rows[i], scale, bias)


@serial()
def _multiply_one(product, R, like, share, shares):
    """A share of the rows of a matrix."""
    N, K = product[HEIGHT], product[WIDTH]
    length = (N + shares - 1) // shares
    low, high = share * length, min((share + 1) * length, N)
    x, output = floats(product[INPUT], (R, K)), floats(product[OUTPUT], (R, N))
    weight = carray(pointer(product[WEIGHT]), (N, K), like.dtype)
    scale = floats(product[SCALE], (N if product[SCALE] else 0,))
    bias = floats(product[BIAS], (N if product[BIAS] else 0,))
    _multiply_rows(x, weight, scale, bias, output, low, high)


@serial()
def _multiply(products, count, R, like, share, shares):
    """A share of several products."""
    numbers = carray(pointer(products), (count, NUMBERS), np.int64)
    for m in range(count):
        _multiply_one(numbers[m], R, like, share, shares)


_FLOAT32, _BFLOAT16, _INT8 = (np.empty(0, kind) for kind in (np.float32, np.uint16, np.int8))


def _by_float32(products, count, R, share, shares):
    _multiply(products, count, R, _FLOAT32, share, shares)
    return 1


def _by_bfloat16(products, count, R, share, shares):
    _multiply(products, count, R, _BFLOAT16, share, shares)
    return 1


def _by_int8(products, count, R, share, shares):
    _multiply(products, count, R, _INT8, share, shares)
    return 1


_FUNCTIONS: dict[torch.dtype, Callable[..., int]] = {
    torch.float32: _by_float32,
    torch.bfloat16: _by_bfloat16,
    torch.int8: _by_int8,
}


def multiplication(dtype: torch.dtype) -> int:
    """Gives the address of the function that multiplies by matrices of a dtype.

    It does shares (`i3lm.ops.numba_team`) of a table of products, of `NUMBERS` int64 numbers each,
    given its address, how many they are and the rows of their inputs.
    """
    return address_of(_FUNCTIONS[dtype])


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
    if share_at_once(multiplication(weight.dtype), address, 1, len(x), match_threads()):
        raise RuntimeError("a product failed; its error stands above")
    return output
