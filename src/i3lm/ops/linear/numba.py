"""A few rows times a matrix at the speed of memory, as in a step of decoding.

The matrix is read once, as float32, bfloat16 or int8; all else is float32.
"""

from __future__ import annotations

import numpy as np
from numba import prange
from torch import Tensor

from i3lm.ops.numba_bridge import as_array, bits_of, compiled, match_threads, serial, widen


# A function of its own: within a parallel loop over a tuple of matrices the sum would stay scalar.
@serial()
def multiply_rows(x, weight, scale, bias, output, low, high):
    """Writes ``x @ weight.T * scale + bias`` for the rows of the matrix from `low` to `high`."""
    for n in range(low, high):
        for r in range(x.shape[0]):
            total = np.float32(0)
            for i in range(x.shape[1]):
                total += widen(weight[n, i]) * x[r, i]
            if scale.size:
                total *= scale[n]
            if bias.size:
                total += widen(bias[n])
            output[r, n] = total


@compiled()
def _products(x, weight, scale, bias, output, tasks):
    N = weight.shape[0]
    share = (N + tasks - 1) // tasks
    for task in prange(tasks):
        low, high = task * share, min((task + 1) * share, N)
        multiply_rows(x, weight, scale, bias, output, low, high)


_NOTHING = np.zeros(0, np.float32)


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
    output = x.new_empty(x.shape[0], weight.shape[0])
    tasks = match_threads()
    _products(
        as_array(x),
        as_array(bits_of(weight)),
        _NOTHING if scale is None else as_array(scale),
        _NOTHING if bias is None else as_array(bits_of(bias)),
        as_array(output),
        tasks,
    )
    return output
