"""What kernels say to a processor's matrix unit (Intel's AMX), for numba.

The unit has eight tiles of 16 rows of 64 bytes. One instruction adds the product of a tile of
16 x 32 bfloat16 numbers and one of 32 x 16 to a tile of 16 x 16 float32 numbers; the second operand
holds two rows side by side, as pairs (Intel's Architecture Instruction Set Extensions Programming
Reference, chapter on AMX). Here a block of a result is 32 x 32, in tiles 0 to 3, from a pair of
tiles of each operand.

The functions work inside kernels, on int64 addresses. Those of packed tiles must be multiples of
64, and so must a line that is written past the caches.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from i3lm.ops.numba_bridge import processor_features

# For the one instruction below that LLVM cannot be asked for otherwise.
binding.initialize_native_asmparser()

SIDE = 32  # rows and columns of a block of the result, and what one step takes of the sum
TILE_BYTES = 1024
PAIR_BYTES = 2 * TILE_BYTES
ROW_BYTES = 4 * SIDE  # of a row of a block
BLOCK_BYTES = SIDE * ROW_BYTES
PARTS = 3  # of 8 bits each, which make the 24 bits of a float32 number
LINE = 64  # bytes of a line of the cache

_BYTE, _INTEGER = ir.IntType(8), ir.IntType(64)
_WORDS = ir.VectorType(ir.IntType(32), 16)
_HALVES = ir.VectorType(ir.IntType(16), 16)
_ALL_HALVES = ir.VectorType(ir.IntType(16), SIDE)
_FLOATS = ir.VectorType(ir.FloatType(), 16)
_DOUBLES = ir.VectorType(ir.DoubleType(), 8)
# Of two lines of 16 numbers, the numbers that stand in a column side by side.
_IN_PAIRS = [n // 2 + n % 2 * 16 for n in range(SIDE)]


class _BFloat(ir.types.Type):
    """LLVM's type, which llvmlite does not know."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


@cache
def missing() -> str | None:
    """Why this process cannot use the unit, or None. Linux grants it on request."""
    features = processor_features()
    if "+amx-bf16" not in features or "+avx512bf16" not in features:
        return "this processor has no AMX, or numba is told so"
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"AMX is asked for on Linux, and this is {sys.platform}"
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    if ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data):
        return "the system does not grant AMX to this process"
    return None


@cache
def shapes() -> torch.Tensor:
    """What `begin` takes: the unit's first palette, and 16 rows of 64 bytes for all eight tiles.

    Raises:
        RuntimeError: This process cannot use the unit, and would be ended by its instructions.
    """
    if (reason := missing()) is not None:
        raise RuntimeError(reason)
    settings = torch.zeros(64, dtype=torch.uint8, device="cpu")
    settings[0] = 1
    settings[16:32:2] = 64
    settings[48:56] = 16
    return settings


def _on_addresses(count: int) -> Callable[[Callable[..., None]], Any]:
    """Makes what emits instructions a function of so many int64 numbers, which gives nothing.

    numba asks for a typing function with as many arguments.
    """

    def decorate(emit: Callable[..., None]) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            emit(builder, *values)
            return context.get_dummy_value()

        def of_none(typing_context):
            return types.none(), generate

        def of_one(typing_context, a):
            return types.none(types.int64), generate

        def of_two(typing_context, a, b):
            return types.none(*[types.int64] * 2), generate

        def of_three(typing_context, a, b, c):
            return types.none(*[types.int64] * 3), generate

        return intrinsic((of_none, of_one, of_two, of_three)[count])

    return decorate


def _instruct(builder: Any, name: str, *arguments: Any, result: Any = None) -> Any:
    kinds = [argument.type for argument in arguments]
    form = ir.FunctionType(result or ir.VoidType(), kinds)
    return builder.call(cgutils.get_or_insert_function(builder.module, form, name), arguments)


def _pointer(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, cgutils.voidptr_t)


def _after(builder: Any, address: Any, distance: int | Any) -> Any:
    return builder.add(address, _INTEGER(distance) if isinstance(distance, int) else distance)


def _load(builder: Any, kind: Any, address: Any, alignment: int) -> Any:
    value = builder.load(builder.inttoptr(address, kind.as_pointer()))
    value.align = alignment
    return value


def _store(builder: Any, value: Any, address: Any, alignment: int) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer())).align = alignment


def _quarters(builder: Any, address: Any, stride: Any) -> list[Any]:
    """Where the four tiles of a block of float32 numbers begin, of rows so many bytes apart."""
    below = builder.add(address, builder.mul(stride, _INTEGER(16)))
    return [x for half in (address, below) for x in (half, _after(builder, half, 64))]


@_on_addresses(1)
def begin(builder, shapes):
    """Gives all tiles their shape; the unit is in use until `end`."""
    _instruct(builder, "llvm.x86.ldtilecfg", _pointer(builder, shapes))


@_on_addresses(0)
def end(builder):
    """Leaves the unit."""
    _instruct(builder, "llvm.x86.tilerelease")


@_on_addresses(0)
def clear_block(builder):
    """Makes the block zero."""
    for tile in range(4):
        _instruct(builder, "llvm.x86.tilezero", _BYTE(tile))


@_on_addresses(2)
def load_block(builder, address, stride):
    """Reads the block, 32 rows of 32 float32 numbers, so many bytes from one row to the next."""
    for tile, place in enumerate(_quarters(builder, address, stride)):
        _instruct(builder, "llvm.x86.tileloadd64", _BYTE(tile), _pointer(builder, place), stride)


@_on_addresses(2)
def store_block(builder, address, stride):
    """Writes the block, 32 rows of 32 float32 numbers, so many bytes from one row to the next."""
    for tile, place in enumerate(_quarters(builder, address, stride)):
        _instruct(builder, "llvm.x86.tilestored64", _BYTE(tile), _pointer(builder, place), stride)


def _add_product(builder: Any, left: Any, stride: Any, right: Any) -> None:
    """Adds a product to the block: of 32 rows so many bytes apart, and a pair of tiles."""
    rows, columns, line = (4, 5), (6, 7), _INTEGER(64)
    below = builder.add(left, builder.mul(stride, _INTEGER(16)))

    def load(tile: int, place: Any, stride: Any) -> None:
        place = _pointer(builder, place)
        _instruct(builder, "llvm.x86.tileloadd64", _BYTE(tile), place, stride)

    def multiply(down: int, across: int) -> None:
        operands = _BYTE(rows[down]), _BYTE(columns[across])
        _instruct(builder, "llvm.x86.tdpbf16ps", _BYTE(2 * down + across), *operands)

    # Products begin as soon as their operands are there.
    load(rows[0], left, stride)
    load(columns[0], right, line)
    multiply(0, 0)
    load(columns[1], _after(builder, right, TILE_BYTES), line)
    multiply(0, 1)
    load(rows[1], below, stride)
    multiply(1, 0)
    multiply(1, 1)


@_on_addresses(2)
def add_product(builder, left, right):
    """Adds the product of a pair of tiles of rows and a pair of tiles of columns to the block."""
    _add_product(builder, left, _INTEGER(64), right)


@_on_addresses(3)
def add_product_of_rows(builder, left, stride, right):
    """As `add_product`, of 32 rows of 32 numbers where they lie, so many bytes apart."""
    _add_product(builder, left, stride, right)


@_on_addresses(2)
def add_product_of_parts(builder, left, right):
    """Adds the product of numbers in three parts each, `PARTS` pairs of tiles, to the block.

    Of nine products of parts the three smallest are left out: as a rule 2**-27 of the whole.
    """
    line = _INTEGER(64)

    def load(operand: Any, tile: int, part: int, half: int) -> None:
        place = _after(builder, operand, PAIR_BYTES * part + TILE_BYTES * half)
        place = _pointer(builder, place)
        _instruct(builder, "llvm.x86.tileloadd64", _BYTE(tile + half), place, line)

    def multiply(down: int, across: int) -> None:
        operands = _BYTE(4 + down), _BYTE(6 + across)
        _instruct(builder, "llvm.x86.tdpbf16ps", _BYTE(2 * down + across), *operands)

    def with_rows(part: int) -> None:
        for down in (0, 1):
            load(left, 4, part, down)
            multiply(down, 0)
            multiply(down, 1)

    def with_columns(part: int) -> None:
        for across in (0, 1):
            load(right, 6, part, across)
            multiply(0, across)
            multiply(1, across)

    # From one product to the next a single operand changes.
    for half in (0, 1):
        load(right, 6, 2, half)
    with_rows(0)
    with_columns(1)
    with_rows(1)
    with_columns(0)
    with_rows(2)
    with_rows(0)


def _narrow(builder: Any, low: Any, high: Any) -> Any:
    """32 float32 numbers as bfloat16, rounded to the nearest, or even."""
    name = "llvm.x86.avx512bf16.cvtne2ps2bf16.512"
    halves = _instruct(builder, name, high, low, result=ir.VectorType(_BFloat(), SIDE))
    return builder.bitcast(halves, _ALL_HALVES)


def _load_row(builder: Any, address: Any) -> list[Any]:
    return [_load(builder, _FLOATS, _after(builder, address, n), 4) for n in (0, 64)]


def _store_row(builder: Any, row: list[Any], address: Any) -> None:
    for place, part in enumerate(row):
        _store(builder, part, _after(builder, address, 64 * place), 4)


@_on_addresses(2)
def narrow(builder, source, target):
    """Writes 32 float32 numbers as bfloat16, rounded to the nearest, or even."""
    _store(builder, _narrow(builder, *_load_row(builder, source)), target, 2)


@_on_addresses(3)
def narrow_product(builder, source, factors, target):
    """Writes the products of 32 float32 numbers and 32 factors as bfloat16."""
    pairs = zip(_load_row(builder, source), _load_row(builder, factors), strict=True)
    _store(builder, _narrow(builder, *(builder.fmul(*pair) for pair in pairs)), target, 2)


@_on_addresses(3)
def narrow_sum_past_cache(builder, source, summands, target):
    """Writes the sums of 32 float32 numbers and 32 others as bfloat16, past the caches.

    The target is a whole line, which is not read before; others see it after
    `end_writing_past_cache`. LLVM drops the mark of such a store from vectors of bfloat16 numbers,
    hence the instruction itself.
    """
    pairs = zip(_load_row(builder, source), _load_row(builder, summands), strict=True)
    sums = _narrow(builder, *(builder.fadd(*pair) for pair in pairs))
    halves = builder.bitcast(sums, _FLOATS)
    form = ir.FunctionType(ir.VoidType(), [_FLOATS, _INTEGER])
    constraints = "v,r,~{memory}"
    builder.asm(form, "vmovntps $0, ($1)", constraints, [halves, target], side_effect=True)


@_on_addresses(0)
def end_writing_past_cache(builder):
    """Has all that was written past the cache seen before what is written after it."""
    _instruct(builder, "llvm.x86.sse.sfence")


def _add_lines(builder: Any, source: Any, stride: Any, sums: Any, wide: bool) -> None:
    lines = []
    for line in range(SIDE):
        place = _after(builder, source, builder.mul(stride, _INTEGER(line)))
        if wide:
            lines.append(_load(builder, _FLOATS, place, 4))
        else:
            words = builder.zext(_load(builder, _HALVES, place, 2), _WORDS)
            shifted = builder.shl(words, ir.Constant(_WORDS, [16] * 16))
            lines.append(builder.bitcast(shifted, _FLOATS))
    while len(lines) > 1:  # each number goes through five roundings
        lines = [builder.fadd(*lines[n : n + 2]) for n in range(0, len(lines), 2)]
    for half in (0, 1):
        part = _shuffle(builder, lines[0], lines[0], list(range(8 * half, 8 * half + 8)))
        place = _after(builder, sums, 64 * half)
        total = builder.fadd(_load(builder, _DOUBLES, place, 8), builder.fpext(part, _DOUBLES))
        _store(builder, total, place, 8)


@_on_addresses(3)
def add_lines(builder, source, stride, sums):
    """Adds 32 lines of 16 bfloat16 numbers to 16 sums, float64."""
    _add_lines(builder, source, stride, sums, wide=False)


@_on_addresses(3)
def add_wide_lines(builder, source, stride, sums):
    """As `add_lines`, of float32 numbers."""
    _add_lines(builder, source, stride, sums, wide=True)


@_on_addresses(1)
def fetch_far(builder, address):
    """Has the 64 bytes around an address brought into the second cache, to be read later."""
    integer = ir.IntType(32)
    of_reading, second, data = integer(0), integer(2), integer(1)
    place = _pointer(builder, address)
    _instruct(builder, "llvm.prefetch.p0i8", place, of_reading, second, data)


@_on_addresses(2)
def raise_by_rows(builder, block, lanes):
    """Raises 32 numbers to the largest of their columns in a block."""
    tops = _load_row(builder, lanes)
    for row in range(SIDE):
        numbers = _load_row(builder, _after(builder, block, 128 * row))
        tops = [
            builder.select(builder.fcmp_ordered(">", x, top), x, top)
            for x, top in zip(numbers, tops, strict=True)
        ]
    _store_row(builder, tops, lanes)


@_on_addresses(2)
def add_rows(builder, block, lanes):
    """Adds the rows of a block to 32 numbers, one after the other."""
    sums = _load_row(builder, lanes)
    for row in range(SIDE):
        numbers = _load_row(builder, _after(builder, block, 128 * row))
        sums = [builder.fadd(*pair) for pair in zip(sums, numbers, strict=True)]
    _store_row(builder, sums, lanes)


@_on_addresses(3)
def multiply_differences(builder, grads, weights, means):
    """Makes a block ``weights (grads - means)``, of a mean for each column."""
    less = _load_row(builder, means)
    for row in range(SIDE):
        place, other = (_after(builder, x, 128 * row) for x in (grads, weights))
        parts = zip(_load_row(builder, place), _load_row(builder, other), less, strict=True)
        products = [builder.fmul(w, builder.fsub(g, mean)) for g, w, mean in parts]
        _store_row(builder, products, place)


@_on_addresses(2)
def copy_line(builder, source, target):
    """Copies 64 bytes."""
    _store(builder, _load(builder, _ALL_HALVES, source, 2), target, 2)


@_on_addresses(2)
def pack_block(builder, source, target):
    """Writes a block, 32 rows of 32 float32 numbers, as a pair of tiles of a first operand."""
    for row in range(SIDE):
        halves = _narrow(builder, *_load_row(builder, _after(builder, source, 128 * row)))
        _store(builder, halves, _after(builder, target, 64 * row), 64)


@_on_addresses(2)
def pack_second_block(builder, source, target):
    """Writes a block as a pair of tiles of a second operand, whose sums run from row to row."""
    for pair in range(SIDE // 2):
        places = (_after(builder, source, 256 * pair + n) for n in (0, 128))
        for half, numbers in enumerate(zip(*(_load_row(builder, x) for x in places), strict=True)):
            halves = _narrow(builder, *numbers)
            halves = _shuffle(builder, halves, halves, _IN_PAIRS)
            place = _after(builder, target, 64 * pair + half * TILE_BYTES)
            _store(builder, halves, place, 64)


def _shuffle(builder: Any, first: Any, second: Any, places: list[int]) -> Any:
    mask = ir.Constant(ir.VectorType(ir.IntType(32), len(places)), places)
    return builder.shuffle_vector(first, second, mask)


def _transpose(builder: Any, rows: list[Any]) -> list[Any]:
    """16 vectors of 16 words: those of the transpose, by exchanging ever larger blocks."""
    for size in (1, 2, 4, 8):
        rows = list(rows)
        for i in (i for i in range(16) if not i & size):
            low = [lane - size + 16 if lane & size else lane for lane in range(16)]
            high = [lane + 16 if lane & size else lane + size for lane in range(16)]
            pair = rows[i], rows[i + size]
            rows[i], rows[i + size] = _shuffle(builder, *pair, low), _shuffle(builder, *pair, high)
    return rows


def _packer(upright: bool, second: bool, wide: bool = False, parts: int = 1) -> Any:
    """Makes a function that writes a tile of bfloat16 numbers.

    It takes the address of the first number, the bytes from one line of them to the next, and the
    address of the tile.

    Args:
        upright: Whether the lines are 16 rows of the operand, of 32 numbers to be summed over; else
            each of 32 lines has a number of every row.
        second: Whether it is the second operand.
        wide: Whether the numbers are float32, to be rounded to the nearest, or even.
        parts: Wide ones in so many tiles, `PAIR_BYTES` apart, of which each but the first has what
            rounding left of the numbers so far. Three hold all 24 bits of a float32 number, where
            the last of them is 2**-126 or more.
    """
    turns = upright == second

    def parts_of(builder: Any, place: Any, stride: Any) -> list[Any]:
        if wide:
            # Those of a row; or a number and that of the next line, which are a pair.
            places = place, _after(builder, place, 64 if upright else stride)
            split = _split(builder, [_load(builder, _FLOATS, x, 4) for x in places], parts)
            return split if upright else [_shuffle(builder, x, x, _IN_PAIRS) for x in split]
        if upright:
            return [_load(builder, _ALL_HALVES, place, 2)]
        one, next_one = (_load(builder, _HALVES, x, 2) for x in (place, builder.add(place, stride)))
        return [_shuffle(builder, one, next_one, _IN_PAIRS)]

    def emit(builder: Any, source: Any, stride: Any, tile: Any) -> None:
        rows = []
        for row in range(16):
            line = row if upright else 2 * row
            place = _after(builder, source, builder.mul(stride, _INTEGER(line)))
            rows.append([builder.bitcast(x, _WORDS) for x in parts_of(builder, place, stride)])
        for part, column in enumerate(zip(*rows, strict=True)):
            words = _transpose(builder, list(column)) if turns else column
            for row, word in enumerate(words):
                _store(builder, word, _after(builder, tile, part * PAIR_BYTES + 64 * row), 64)

    return _on_addresses(3)(emit)


def _split(builder: Any, numbers: list[Any], parts: int) -> list[Any]:
    """32 float32 numbers, in two vectors, as sums of so many bfloat16 numbers each."""
    split = [_narrow(builder, *numbers)]
    for _ in range(parts - 1):
        numbers = [
            builder.fsub(x, taken)
            for x, taken in zip(numbers, _widen(builder, split[-1]), strict=True)
        ]
        split.append(_narrow(builder, *numbers))
    return split


def _widen(builder: Any, halves: Any) -> list[Any]:
    """32 bfloat16 numbers as two vectors of float32 numbers."""
    sixteen = ir.Constant(_WORDS, [16] * 16)
    words = [
        builder.zext(_shuffle(builder, halves, halves, list(range(n, n + 16))), _WORDS)
        for n in (0, 16)
    ]
    return [builder.bitcast(builder.shl(x, sixteen), _FLOATS) for x in words]


# Of the operand's rows, and of its columns.
pack_rows = _packer(upright=True, second=False)
pack_columns = _packer(upright=False, second=False)
pack_second_rows = _packer(upright=True, second=True)
pack_second_columns = _packer(upright=False, second=True)
pack_wide_second_rows = _packer(upright=True, second=True, wide=True)
pack_wide_second_columns = _packer(upright=False, second=True, wide=True)
split_rows = _packer(upright=True, second=False, wide=True, parts=PARTS)
split_columns = _packer(upright=False, second=False, wide=True, parts=PARTS)
split_second_rows = _packer(upright=True, second=True, wide=True, parts=PARTS)
split_second_columns = _packer(upright=False, second=True, wide=True, parts=PARTS)
