"""Products of float32 matrices by a processor's matrix unit, which multiplies bfloat16 alone.

A float32 number is the sum of three bfloat16 numbers: itself rounded to 8 bits, what that left
rounded, and the rest. Of the nine products of two such sums, six are computed, each exact, and
added in float32. The other three are 2**-27 of the whole as a rule, 2**-24 at most: a fifth of
what a float32 product loses when it is rounded. Six products in tiles still take two thirds of the
time of one in vectors of float32 (benchmarks/NOTES.md).

The scheme is that of Ozaki, Ogita, Oishi and Rump, "Error-free transformations of matrix
multiplication by using fast routines of matrix multiplication and its applications" (2012); with
bfloat16 that of Henry, Tang and Heinecke, "Leveraging the bfloat16 artificial intelligence datatype
for higher-precision computations" (2019).

Numbers are summed over in slices. Of each, all rows of the first matrix are split and packed
together; of the second as many columns as stay in the second cache, by the task that needs them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numba import carray, prange
from torch import Tensor

from i3lm.ops.amx_bridge import (
    BLOCK_BYTES,
    LINE,
    PAIR_BYTES,
    PARTS,
    ROW_BYTES,
    SIDE,
    TILE_BYTES,
    add_product_of_parts,
    add_wide_lines,
    begin,
    end,
    fetch_far,
    load_block,
    shapes,
    split_columns,
    split_rows,
    split_second_columns,
    split_second_rows,
    store_block,
)
from i3lm.ops.linear.amx import (
    copy_lines,
    fetch_lines,
    layout,
    refuses_layout,
    scratch,
    share_of,
    whole,
)
from i3lm.ops.numba_bridge import compiled, match_threads, pointer, serial_as_written

_STEP_BYTES = PARTS * PAIR_BYTES  # of 32 rows or columns, and 32 numbers of each
# The most numbers summed over at a time, and how many of the second matrix are packed at a time:
# their parts take 3/8 of a second cache of 2 MiB.
_DEEP = 1024
_MANY = 2**17
# The most numbers of the first matrix that are packed at a time: 24 MiB of parts.
_MANY_OF_FIRST = 2**22
# Below so many products of numbers, or in fewer rows, columns or steps, other libraries are as
# fast (benchmarks/NOTES.md).
_WORTH, _WORTH_ROWS, _WORTH_STEPS = 2**27, 128, 64


class _Sizes(NamedTuple):
    """What the kernel must know of a call.

    Attributes:
        rows: Of the result, M.
        columns: Of the result, N, a multiple of 32.
        inner: What is summed over, K.
        at_once: So many numbers are summed over at a time, a multiple of 32.
        across: In how many parts the columns are shared out.
        down: In how many parts the rows are.
        columns_at_once: So many columns are packed at a time.
        room: Scratch memory of a task: its bytes.
    """

    rows: int
    columns: int
    inner: int
    at_once: int
    across: int
    down: int
    columns_at_once: int
    room: int


@serial_as_written()
def _split_block(matrix, second, upright, low, high, first, last, spare, target):
    """Splits up to 32 rows of the first matrix, or columns of the second.

    Of the numbers summed over up to 32 as well. What is missing of 32 is zero.
    """
    stride = matrix.stride
    if upright:
        source, lines = matrix.address + low * stride + 4 * first, high - low
    else:
        source, lines = matrix.address + first * stride + 4 * low, last - first
    if lines < SIDE:
        copy_lines(source, stride, lines, 2 * SIDE, spare)
        source, stride = spare, ROW_BYTES
    for half in range(2):
        tile, place = target + half * TILE_BYTES, source + half * 16 * (stride if upright else 4)
        if second:
            if upright:
                split_second_rows(place, stride, tile)
            else:
                split_second_columns(place, stride, tile)
        elif upright:
            split_rows(place, stride, tile)
        else:
            split_columns(place, stride, tile)


@serial_as_written()
def _split(matrix, second, low, high, start, stop, sums, spare, target):
    """Splits rows of the first matrix, or columns of the second, in blocks of 32.

    Of the numbers summed over, those from start to stop. Lines are read from end to end; those
    across which the sums run may be added up.
    """
    upright = matrix.by_rows != second  # whether a line has the numbers that are summed over
    steps = (stop - start + SIDE - 1) // SIDE
    if upright:
        for i in range(low, high, SIDE):
            block = target + (i - low) // SIDE * steps * _STEP_BYTES
            for k in range(start, stop, SIDE):
                place = block + (k - start) // SIDE * _STEP_BYTES
                bottom, last = min(i + SIDE, high), min(k + SIDE, stop)
                _split_block(matrix, second, True, i, bottom, k, last, spare, place)
        return
    for k in range(start, stop, SIDE):
        if k + 2 * SIDE <= stop:
            ahead = matrix.address + (k + SIDE) * matrix.stride + 4 * low
            fetch_lines(ahead, matrix.stride, 4 * (high - low))
        for i in range(low, high, SIDE):
            place = target + ((i - low) // SIDE * steps + (k - start) // SIDE) * _STEP_BYTES
            bottom, last = min(i + SIDE, high), min(k + SIDE, stop)
            _split_block(matrix, second, False, i, bottom, k, last, spare, place)
            if sums:
                # Where lines are missing, the block was read from a copy that zeros fill up.
                lines, stride = matrix.address + k * matrix.stride + 4 * i, matrix.stride
                if last - k < SIDE:
                    lines, stride = spare, ROW_BYTES
                for half in range(2):
                    add_wide_lines(lines + half * LINE, stride, sums + 8 * (i + 16 * half))


@serial_as_written()
def _add_block(begins, between, left, right, steps, target, stride, ahead):
    """Writes a block with the products of 32 rows and 32 columns added, and fetches another."""
    load_block(begins, between)
    for k in range(steps):
        add_product_of_parts(left + k * _STEP_BYTES, right + k * _STEP_BYTES)
        if ahead and k < SIDE:
            fetch_far(ahead + k * stride)
            fetch_far(ahead + k * stride + LINE)
    store_block(target, stride)


@serial_as_written()
def _move_rows(source, source_stride, rows, target, target_stride):
    for r in range(rows):
        read = carray(pointer(source + r * source_stride), (SIDE,), np.float32)
        written = carray(pointer(target + r * target_stride), (SIDE,), np.float32)
        for n in range(SIDE):
            written[n] = read[n]


@serial_as_written()
def _multiply_share(y, summands, output, sizes, start, stop, packed, task, room):
    """Adds what a slice gives to a share of the result, which begins as the summands."""
    top, bottom = share_of(sizes.rows, task // sizes.across, sizes.down)
    first, last = share_of(sizes.columns, task % sizes.across, sizes.across)
    steps, stride = (stop - start + SIDE - 1) // SIDE, 4 * sizes.columns
    block_bytes = steps * _STEP_BYTES
    spare = room + sizes.columns_at_once // SIDE * block_bytes
    if top == bottom:  # more tasks than rows
        return
    for low in range(first, last, sizes.columns_at_once):
        high = min(low + sizes.columns_at_once, last)
        _split(y, True, low, high, start, stop, 0, spare, room)
        for i in range(top, bottom, SIDE):
            rows, left = min(SIDE, bottom - i), packed + i // SIDE * block_bytes
            for j in range(low, high, SIDE):
                right, place = room + (j - low) // SIDE * block_bytes, output + i * stride + 4 * j
                target, apart = (place, stride) if rows == SIDE else (spare, ROW_BYTES)
                begins, between = (target, apart) if start else (summands + 4 * j, 0)
                if rows < SIDE and start:
                    _move_rows(place, stride, rows, spare, ROW_BYTES)
                ahead = place + 4 * SIDE if rows == SIDE and j + SIDE < high else 0
                _add_block(begins, between, left, right, steps, target, apart, ahead)
                if rows < SIDE:
                    _move_rows(spare, ROW_BYTES, rows, place, stride)


# Two kernels: of two loops in one, numba might make one loop, in which a task multiplies what
# another one has not split yet.
@compiled()
def _split_first(x, sums, sizes, start, stop, packed, rooms, tasks):
    steps = (stop - start + SIDE - 1) // SIDE
    for task in prange(tasks):
        low, high = share_of(sizes.rows, task, tasks)
        spare, target = rooms + task * sizes.room, packed + low // SIDE * steps * _STEP_BYTES
        _split(x, False, low, high, start, stop, sums, spare, target)


@compiled()
def _multiply(y, summands, output, sizes, start, stop, shapes, packed, rooms, tasks):
    for task in prange(tasks):
        begin(shapes)
        room = rooms + task * sizes.room
        _multiply_share(y, summands, output, sizes, start, stop, packed, task, room)
        end()


def _sizes(M: int, K: int, N: int, tasks: int) -> _Sizes:
    at_once = whole(-(-K // -(-K // _DEEP)), SIDE)
    columns = max(_MANY // at_once // SIDE, 1) * SIDE
    # By columns, as far as there are some for each: then none are packed twice.
    across = max(n for n in range(1, tasks + 1) if tasks % n == 0 and (n - 1) * SIDE < N)
    share = whole(-(-N // across), SIDE)
    columns = whole(-(-share // -(-share // columns)), SIDE)  # equal pieces
    room = columns // SIDE * (at_once // SIDE) * _STEP_BYTES + BLOCK_BYTES
    return _Sizes(M, N, K, at_once, across, tasks // across, columns, whole(room, 4096))


def multiply_float32(
    x: Tensor, y: Tensor, bias: Tensor | None = None, wants_sums: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Gives ``x @ y + bias``, as exact as a sum in float32, and the sums of x's rows or None.

    But for the ends of the range: numbers below 2**-103 and products below 2**-102 lose their last
    bits, and what is below 2**-126 counts as zero; numbers and results above 2**127 may become
    infinite, or NaN, which an infinite number gives always.

    Args:
        x: Shape (M, K), float32, its rows or its columns in one piece each.
        y: Shape (K, N), float32, likewise.
        bias: Shape (N,), float32, or None.
        wants_sums: Whether the sums are wanted, shape (M,). Then x lies by columns.
    """
    (M, K), N = x.shape, y.shape[1]
    tasks = match_threads()
    # Small blocks first: one that is freed behind a large one is a hole that stays.
    summands = x.new_zeros(N) if bias is None else bias.contiguous()
    sums = x.new_zeros(M, dtype=torch.float64) if wants_sums else None
    output = x.new_empty(M, N)
    at_once = _sizes(M, K, N, tasks).at_once
    most = max(_MANY_OF_FIRST // at_once // SIDE, 1) * SIDE
    for low in range(0, M, most):
        rows, target = x[low : low + most], output[low:].data_ptr()
        sizes = _sizes(rows.shape[0], K, N, tasks)
        size = whole(sizes.rows, SIDE) // SIDE * (at_once // SIDE) * _STEP_BYTES
        packed = scratch.address(size + tasks * sizes.room)
        memory = packed, packed + size, tasks
        total = 0 if sums is None else sums[low:].data_ptr()
        for start in range(0, K, at_once):
            piece = sizes, start, min(start + at_once, K)
            _split_first(layout(rows), total, *piece, *memory)
            places = summands.data_ptr(), target
            _multiply(layout(y), *places, *piece, shapes().data_ptr(), *memory)
    return output, None if sums is None else sums.float()


def refuses(
    x: Tensor, y: Tensor, bias: Tensor | None = None, wants_sums: bool = False
) -> str | None:
    """Why `multiply_float32` does not serve these, or another way is as good; or None."""
    if (reason := refuses_layout(x, y, bias, wants_sums)) is not None:
        return reason
    if any(part is not None and part.dtype != torch.float32 for part in (x, y, bias)):
        return "multiplies float32"
    (M, K), N = x.shape, y.shape[1]
    if M * K * N < _WORTH or min(M, N) < _WORTH_ROWS or K < _WORTH_STEPS:
        return "serves large products"
    return None
