"""The transpose of a bfloat16 matrix on the CPU, square tile by square tile in registers.

numba takes bfloat16 as its bits, and a tile is 32 vectors of 32 of them: five rounds of shuffles
of pairs of vectors turn it (each exchanges blocks of half the side of the round before).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor, float32

from i3lm.ops.numba_bridge import as_arrays, compiled, inlined, match_threads, targets, widen

_SIDE = 32  # bfloat16 numbers of the widest vector
_STRIP = 4 * _SIDE  # columns that are read together, so that whole lines of the cache are


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

        rows = [
            builder.load(place(kinds[1], read, after(r, i), n), align=2) for i in range(_SIDE)
        ]
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


@inlined()
def _add(sums, row):
    for i in range(sums.size):
        sums[i] += widen(row[i])


@compiled()
def _transpose(x, result, sums, tasks):
    R, N = x.shape
    strips = (N + _STRIP - 1) // _STRIP
    for task in prange(tasks):
        total = np.empty(_STRIP, np.float32)
        for strip in range(task * strips // tasks, (task + 1) * strips // tasks):
            low = strip * _STRIP
            high = min(low + _STRIP, N)
            total[:] = np.float32(0)
            for r in range(0, R, _SIDE):
                if r + _SIDE <= R:
                    for n in range(low, high, _SIDE):
                        if n + _SIDE <= N:
                            _turn(result, x, n, r)
                for i in range(r, min(r + _SIDE, R)):
                    done = high - high % _SIDE if r + _SIDE <= R else low
                    for n in range(done, high):
                        result[n, i] = x[i, n]
                    if sums.size:
                        _add(total[: high - low], x[i, low:high])
            if sums.size:
                for n in range(low, high):
                    sums[n] = total[n - low]


def transpose_numba(x: Tensor, wants_sums: bool) -> tuple[Tensor, Tensor]:
    """Gives the transpose of a bfloat16 matrix (R, N), contiguous, and the float32 sums of columns.

    Where they are not wanted, the sums are empty.
    """
    result = x.new_empty(x.shape[1], x.shape[0])
    sums = x.new_empty(x.shape[1] if wants_sums else 0, dtype=float32)
    _transpose(*as_arrays(x), *targets(result, sums), match_threads())
    return result, sums
