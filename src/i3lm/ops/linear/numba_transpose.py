"""The transpose of a matrix in bfloat16 on the CPU, square tile by square tile in registers.

numba takes bfloat16 as its bits, and a tile is 32 vectors of 32 of them: five rounds of shuffles
of pairs of vectors turn it (each exchanges blocks of half the side of the round before).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from i3lm.ops.numba_bridge import (
    as_arrays,
    compiled,
    copy,
    fetch,
    fetch_line,
    match_threads,
    serial_as_written,
    targets,
    widen,
)

_SIDE = 32  # bfloat16 numbers of the widest vector
_STRIP = 4 * _SIDE  # columns that are turned together, so that whole lines of the cache are read


def _type_turn(typing_context: Any, target: Any, source: Any, n: Any, r: Any) -> tuple[Any, Any]:
    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        vector = ir.VectorType(ir.IntType(16), _SIDE)
        kinds, (written, read, n, r) = signature.args, values

        def place(kind: Any, array: Any, row: Any, column: Any) -> Any:
            view = context.make_array(kind)(context, builder, array)
            width = cgutils.unpack_tuple(builder, view.shape)[1]
            index = builder.add(builder.mul(row, width), column)
            return builder.bitcast(builder.gep(view.data, [index]), vector.as_pointer())

        def after(start: Any, steps: int) -> Any:
            return builder.add(start, ir.Constant(start.type, steps))

        rows = [builder.load(place(kinds[1], read, after(r, i), n), align=2) for i in range(_SIDE)]
        size = _SIDE // 2
        while size:
            for i in (i for i in range(_SIDE) if not i & size):
                # The lower blocks of both, side by side, and the upper ones.
                low = [j if not j & size else j - size + _SIDE for j in range(_SIDE)]
                high = [j + size if not j & size else j + _SIDE for j in range(_SIDE)]
                pair = rows[i], rows[i + size]
                for target_row, lanes in ((i, low), (i + size, high)):
                    mask = ir.Constant(ir.VectorType(ir.IntType(32), _SIDE), lanes)
                    rows[target_row] = builder.shuffle_vector(*pair, mask)
            size //= 2
        for i, row in enumerate(rows):
            builder.store(row, place(kinds[0], written, after(n, i), r), align=2)
        return context.get_dummy_value()

    return types.none(target, source, n, r), generate


# Inside a kernel, `_turn(target, source, n, r)`: target[n : n + 32, r : r + 32] becomes the
# transpose of source[r : r + 32, n : n + 32].
_turn: Any = intrinsic(_type_turn)


@serial_as_written()
def _add(sums, row):
    for i in range(sums.size):
        sums[i] += widen(row[i])


@compiled()
def _transpose(x, result, sums):
    R, N = x.shape
    for strip in prange((N + _STRIP - 1) // _STRIP):
        low = strip * _STRIP
        high = min(low + _STRIP, N)
        whole = high - high % _SIDE  # up to here there are whole tiles
        total = np.zeros(_STRIP, np.float32)
        for r in range(0, R, _SIDE):
            end = min(r + _SIDE, R)
            rest = low
            if end < R:  # what is written next: a line of each row, and rows are pages apart
                for n in range(low, whole):
                    fetch_line(result[n], end)
            if end - r == _SIDE:
                for n in range(low, whole, _SIDE):
                    _turn(result, x, n, r)
                rest = whole
            for i in range(r, end):
                for n in range(rest, high):
                    result[n, i] = x[i, n]
                if sums.size:
                    _add(total[: high - low], x[i, low:high])
        if sums.size:
            sums[low:high] = total[: high - low]


@compiled()
def _narrow_and_transpose(x, narrow, result):
    R, N = x.shape
    for strip in prange((R + _SIDE - 1) // _SIDE):
        low = strip * _SIDE
        high = min(low + _SIDE, R)
        for r in range(low, high):
            if r + _SIDE < R:
                fetch(x[r + _SIDE])
            copy(narrow[r], x[r])
        whole = N - N % _SIDE if high - low == _SIDE else 0
        for n in range(0, whole, _SIDE):
            _turn(result, narrow, n, low)
        for n in range(whole, N):
            for r in range(low, high):
                result[n, r] = narrow[r, n]


def transpose(x: Tensor, wants_sums: bool) -> tuple[Tensor, Tensor | None]:
    """Gives the transpose of a bfloat16 matrix (R, N), and the sums of its columns or None.

    Returns:
        Shape (N, R), bfloat16, contiguous; and shape (N,), float32, where they are wanted.
    """
    result = x.new_empty(x.shape[1], x.shape[0])
    sums = x.new_empty(x.shape[1] if wants_sums else 0, dtype=torch.float32)
    match_threads()
    _transpose(*as_arrays(x), *targets(result, sums))
    return result, sums if wants_sums else None


def narrow_and_transpose(x: Tensor) -> tuple[Tensor, Tensor]:
    """Gives a float32 matrix (R, N) in bfloat16, and the transpose of that.

    Returns:
        Shape (R, N), contiguous; and shape (N, R), whose rows begin at lines of the cache.
    """
    R, N = x.shape
    narrow = x.new_empty(R, N, dtype=torch.bfloat16)
    result = narrow.new_empty(N, -(-R // _SIDE) * _SIDE)
    match_threads()
    _narrow_and_transpose(*as_arrays(x), *targets(narrow, result))
    return narrow, result[:, :R]
