"""Rows of a matrix times a vector, read as streams of memory, for numba.

Of a loop over a row LLVM makes good vectors, but it has none for a loop that also fetches ahead;
so the loop is written here in LLVM's own language, for vectors of any processor.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from i3lm.ops.numba_bridge import fetch_at, inlined

__all__ = ["STREAMS", "dots_of_lines", "whole_lines"]

STREAMS = 4  # rows at a time: so many keep enough lines of memory under way
_AHEAD = 2048  # bytes from where a stream is read to where it is fetched
_LINE = 64  # bytes of a line
_LANES = 16
_OF_WEIGHTS = types.float32, types.uint16, types.int8

_INTEGER, _SMALL = ir.IntType(64), ir.IntType(32)
_FLOATS, _WORDS = ir.VectorType(ir.FloatType(), _LANES), ir.VectorType(_SMALL, _LANES)
_SIXTEEN = ir.Constant(_WORDS, [16] * _LANES)


def _after(builder: Any, address: Any, distance: int) -> Any:
    return builder.add(address, _INTEGER(distance))


def _load(builder: Any, number: Any, address: Any) -> Any:
    vector = ir.VectorType(number, _LANES)
    value = builder.load(builder.inttoptr(address, vector.as_pointer()))
    value.align = 1
    return value


def _load_wide(builder: Any, address: Any, size: int) -> Any:
    """Loads float32 numbers, or as such bits of bfloat16, which has two bytes, or int8."""
    if size == 4:
        return _load(builder, ir.FloatType(), address)
    narrow = _load(builder, ir.IntType(8 * size), address)
    if size == 1:
        return builder.sitofp(narrow, _FLOATS)
    return builder.bitcast(builder.shl(builder.zext(narrow, _WORDS), _SIXTEEN), _FLOATS)


def _multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    form = ir.FunctionType(_FLOATS, [_FLOATS] * 3)
    name = f"llvm.fmuladd.v{_LANES}f32"
    return builder.call(cgutils.get_or_insert_function(builder.module, form, name), [a, b, c])


def _sum_up(builder: Any, numbers: Any) -> Any:
    """Adds up the numbers of a vector, one half onto the other until one is left."""
    count = _LANES
    while count > 1:
        count //= 2
        half = ir.Constant(_WORDS, [*range(count, 2 * count), *[0] * (_LANES - count)])
        numbers = builder.fadd(numbers, builder.shuffle_vector(numbers, numbers, half))
    return builder.extract_element(numbers, _SMALL(0))


def _type_dots(typing_context: Any, x: Any, weight: Any, rows: Any) -> tuple[Any, Any] | None:
    if x.dtype != types.float32 or weight.dtype not in _OF_WEIGHTS:
        return None
    size = weight.dtype.bitwidth // 8
    vectors = _LINE // size // _LANES

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        x, weight = (
            context.make_array(kind)(context, builder, value)
            for kind, value in zip(signature.args[:2], values[:2], strict=True)
        )
        inputs = builder.ptrtoint(x.data, _INTEGER)
        first = builder.ptrtoint(weight.data, _INTEGER)
        stride = builder.extract_value(weight.strides, 0)
        streams = [
            builder.add(first, builder.mul(row, stride))
            for row in cgutils.unpack_tuple(builder, values[2])
        ]
        zero = ir.Constant(_FLOATS, [0.0] * _LANES)
        totals = [cgutils.alloca_once(builder, _FLOATS) for _ in streams]
        for total in totals:
            builder.store(zero, total)
        lines = builder.sdiv(builder.extract_value(weight.shape, 1), _INTEGER(_LINE // size))
        with cgutils.for_range(builder, lines) as loop:
            place = builder.mul(loop.index, _INTEGER(_LINE))
            at = builder.add(inputs, builder.mul(place, _INTEGER(4 // size)))
            numbers = [
                _load(builder, ir.FloatType(), _after(builder, at, _LINE * v))
                for v in range(vectors)
            ]
            for stream, total in zip(streams, totals, strict=True):
                line = builder.add(stream, place)
                fetch_at(builder, _after(builder, line, _AHEAD))
                sums = builder.load(total)
                for v in range(vectors):
                    factors = _load_wide(builder, _after(builder, line, _LANES * size * v), size)
                    sums = _multiply_add(builder, factors, numbers[v], sums)
                builder.store(sums, total)
        sums = [_sum_up(builder, builder.load(total)) for total in totals]
        return context.make_tuple(builder, signature.return_type, sums)

    return types.UniTuple(types.float32, STREAMS)(x, weight, rows), generate


# Inside a kernel, `dots_of_lines(x, weight, rows)` gives the products of a vector (K,) of float32
# with `STREAMS` rows of a contiguous matrix (N, K) of float32, bits of bfloat16 or int8, without
# what is behind `whole_lines`.
dots_of_lines: Any = intrinsic(_type_dots)


@inlined()
def whole_lines(weight):
    """How many numbers of a row fill lines of memory."""
    numbers = _LINE // weight.itemsize
    return weight.shape[1] // numbers * numbers
