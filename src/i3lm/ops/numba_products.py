"""Products of matrices inside a kernel, with a piece of the result in registers, for numba.

For products that are thin, and part of a pass that has their operands in cache. Of loops over such
a piece LLVM keeps little in registers, so they are written here in LLVM's own language, for
vectors of any processor.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from i3lm.ops.numba_bridge import processor_features, serial_as_written

__all__ = ["add_product", "whole_columns"]

_LINE = 64  # bytes of a line of the cache, and of a vector
# A piece is so many rows of so many lines. With AVX512 it takes 16 of 32 registers, and its
# operands others; with AVX2, where a line fills two, 8 of 16.
_ROWS, _LINES = (8, 2) if "+avx512f" in processor_features() else (4, 1)

_INTEGER = ir.IntType(64)


def _adding_piece(rows: int) -> Any:
    """Makes what adds ``left @ right`` to so many rows of the target, from a place in it on."""

    def type_piece(
        typing_context: Any, left: Any, right: Any, target: Any, row: Any, column: Any
    ) -> tuple[Any, Any] | None:
        number = target.dtype
        if number not in (types.float32, types.float64) or {left.dtype, right.dtype} != {number}:
            return None
        if not target.mutable or "F" in (right.layout, target.layout):
            return None
        size = number.bitwidth // 8
        lanes = _LINE // size
        one = ir.FloatType() if size == 4 else ir.DoubleType()
        vector = ir.VectorType(one, lanes)
        zero, undefined = ir.Constant(vector, None), ir.Constant(vector, ir.Undefined)
        first = ir.Constant(ir.VectorType(ir.IntType(32), lanes), None)

        def load(builder: Any, kind: Any, address: Any) -> Any:
            value = builder.load(builder.inttoptr(address, kind.as_pointer()))
            value.align = size
            return value

        def spread(builder: Any, value: Any) -> Any:
            values = builder.insert_element(undefined, value, ir.IntType(32)(0))
            return builder.shuffle_vector(values, values, first)

        def multiply_add(builder: Any, *values: Any) -> Any:
            form = ir.FunctionType(vector, [vector] * 3)
            name = f"llvm.fmuladd.v{lanes}f{number.bitwidth}"
            function = cgutils.get_or_insert_function(builder.module, form, name)
            return builder.call(function, values)

        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            def step(address: Any, count: Any, stride: Any) -> Any:
                return builder.add(address, builder.mul(count, stride))

            arrays = [
                context.make_array(kind)(context, builder, value)
                for kind, value in zip(signature.args[:3], values[:3], strict=True)
            ]
            left, right, target = (builder.ptrtoint(array.data, _INTEGER) for array in arrays)
            (down, along), (below, _), (under, _) = (
                cgutils.unpack_tuple(builder, array.strides) for array in arrays
            )
            steps = builder.extract_value(arrays[0].shape, 1)
            row, column = values[3], builder.mul(values[4], _INTEGER(size))
            left, right = step(left, row, down), builder.add(right, column)
            target = builder.add(step(target, row, under), column)
            piece = [(r, n) for r in range(rows) for n in range(_LINES)]
            sums = {place: cgutils.alloca_once_value(builder, zero) for place in piece}
            with cgutils.for_range(builder, steps) as loop:
                line = step(right, loop.index, below)
                numbers = [
                    load(builder, vector, builder.add(line, _INTEGER(_LINE * n)))
                    for n in range(_LINES)
                ]
                factors = step(left, loop.index, along)
                for r in range(rows):
                    factor = load(builder, one, step(factors, _INTEGER(r), down))
                    factor = spread(builder, factor)
                    for n in range(_LINES):
                        total = builder.load(sums[r, n])
                        total = multiply_add(builder, factor, numbers[n], total)
                        builder.store(total, sums[r, n])
            for r, n in piece:
                place = builder.add(step(target, _INTEGER(r), under), _INTEGER(_LINE * n))
                total = builder.fadd(load(builder, vector, place), builder.load(sums[r, n]))
                builder.store(total, builder.inttoptr(place, vector.as_pointer())).align = size
            return context.get_dummy_value()

        return types.none(left, right, target, types.intp, types.intp), generate

    return intrinsic(type_piece)


_add_piece: Any = _adding_piece(_ROWS)
_add_row: Any = _adding_piece(1)


@serial_as_written()
def add_product(left, right, target):
    """Adds ``left @ right`` to the target: float32 or float64, all three.

    Each number is summed in one order, whatever the shapes, and then added. The rows of right and
    target lie in one piece each, and have `whole_columns`.
    """
    columns = whole_columns(1, target.itemsize)
    whole = target.shape[0] // _ROWS * _ROWS
    for column in range(0, target.shape[1], columns):
        for row in range(0, whole, _ROWS):
            _add_piece(left, right, target, row, column)
        for row in range(whole, target.shape[0]):
            _add_row(left, right, target, row, column)


@njit(cache=True)
def whole_columns(count, size):
    """A number of columns rounded up to whole pieces, of numbers of a size in bytes."""
    columns = _LINES * _LINE // size
    return -(-count // columns) * columns
