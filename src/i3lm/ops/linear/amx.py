"""Products of matrices in bfloat16 by a processor's matrix unit, as a step of training has them.

The second matrix, which may be of float32, is rounded and packed into tiles as it is read, as many
columns at a time as stay in the second cache. Rows of the first are taken where they lie; columns
are packed too. The result is written past the caches: to write a line the usual way, it would be
read from memory first.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

import numpy as np
import torch
from numba import carray, prange
from torch import Tensor

from i3lm.ops.amx_bridge import (
    BLOCK_BYTES,
    LINE,
    PAIR_BYTES,
    ROW_BYTES,
    SIDE,
    TILE_BYTES,
    add_lines,
    add_product_of_rows,
    begin,
    clear_block,
    end,
    end_writing_past_cache,
    fetch_far,
    narrow_sum_past_cache,
    pack_columns,
    pack_second_columns,
    pack_second_rows,
    pack_wide_second_columns,
    pack_wide_second_rows,
    shapes,
    store_block,
)
from i3lm.ops.numba_bridge import compiled, match_threads, pointer, serial_as_written

_GROUP = 4  # blocks that are written together, so that a row has whole lines side by side
_WIDTH = _GROUP * SIDE
# What is packed of a matrix at a time, in bfloat16 numbers: half of a second cache of 2 MiB.
_MANY = 2**19
# The most rows, and the longest sums. Beyond them oneDNN is as fast (benchmarks/NOTES.md): rows do
# not stay in cache from one piece of the columns to the next, or too few columns are packed.
LARGEST = 4096


class _Matrix(NamedTuple):
    """Where a matrix lies.

    Attributes:
        address: Of its first number.
        stride: The bytes from one line of numbers that lie side by side to the next.
        by_rows: Whether those lines are its rows, or its columns.
        wide: Whether its numbers are float32, or bfloat16.
    """

    address: int
    stride: int
    by_rows: bool
    wide: bool


class _Sizes(NamedTuple):
    """What the kernel must know of a call.

    Attributes:
        rows: Of the result, M.
        columns: Of the result, N, a multiple of 32.
        inner: What is summed over, K.
        down: In how many parts the rows are shared out.
        across: In how many parts the columns are.
        columns_at_once: So many columns are packed at a time.
        rows_at_once: So many rows are, where they must be.
        room: Scratch memory of a task: its bytes.
    """

    rows: int
    columns: int
    inner: int
    down: int
    across: int
    columns_at_once: int
    rows_at_once: int
    room: int


@serial_as_written()
def copy_lines(source, stride, count, width, target):
    """Copies lines of so many 16-bit numbers, and zeros after them up to 32 lines."""
    copied = carray(pointer(target), (SIDE, width), np.uint16)
    for line in range(count):
        numbers = carray(pointer(source + line * stride), (width,), np.uint16)
        for n in range(width):
            copied[line, n] = numbers[n]
    copied[count:] = 0


@serial_as_written()
def fetch_lines(source, stride, size):
    """Has so many bytes of 32 lines brought into the second cache."""
    for line in range(SIDE):
        for n in range(0, size, LINE):
            fetch_far(source + line * stride + n)


@serial_as_written()
def _pack_lines_across(matrix, second, low, high, inner, sums, spare, target):
    """Packs columns low to high, which lie across the lines that are summed over."""
    steps, size = (inner + SIDE - 1) // SIDE, 4 if matrix.wide else 2
    for k in range(steps):
        source, stride = matrix.address + SIDE * k * matrix.stride + low * size, matrix.stride
        count = inner - SIDE * k
        if count < SIDE:
            width = (high - low) * size // 2
            copy_lines(source, stride, count, width, spare)
            source, stride = spare, 2 * width
        elif count >= 2 * SIDE:
            fetch_lines(source + SIDE * stride, stride, (high - low) * size)
        for s in range((high - low) // 16):
            place = source + 16 * s * size
            tile = target + (s // 2 * steps + k) * PAIR_BYTES + s % 2 * TILE_BYTES
            if not second:
                pack_columns(place, stride, tile)
            elif matrix.wide:
                pack_wide_second_columns(place, stride, tile)
            else:
                pack_second_columns(place, stride, tile)
            if sums:
                add_lines(place, stride, sums + 8 * (low + 16 * s))


@serial_as_written()
def _pack_second(matrix, low, high, inner, spare, target):
    """Packs columns low to high of the second matrix."""
    if matrix.by_rows:
        _pack_lines_across(matrix, True, low, high, inner, 0, spare, target)
        return
    steps, size = inner // SIDE, 4 if matrix.wide else 2
    for s in range((high - low) // 16):
        for k in range(steps):
            place = matrix.address + (low + 16 * s) * matrix.stride + SIDE * k * size
            tile = target + (s // 2 * steps + k) * PAIR_BYTES + s % 2 * TILE_BYTES
            if matrix.wide:
                pack_wide_second_rows(place, matrix.stride, tile)
            else:
                pack_second_rows(place, matrix.stride, tile)


@serial_as_written()
def _multiply_block(left, stride, step, right, steps, block):
    """The products of 32 rows, whose next 32 numbers lie `step` bytes on, and 32 columns."""
    clear_block()
    for k in range(steps):
        add_product_of_rows(left + k * step, stride, right + k * PAIR_BYTES)
    store_block(block, ROW_BYTES)


@serial_as_written()
def _write(blocks, count, rows, summands, target, stride):
    """Writes rows of blocks that stand side by side, with a summand for each column."""
    for r in range(rows):
        for q in range(count):
            source, place = (
                blocks + q * BLOCK_BYTES + r * ROW_BYTES,
                target + r * stride + 2 * SIDE * q,
            )
            narrow_sum_past_cache(source, summands + 4 * SIDE * q, place)


@serial_as_written()
def share_of(count, part, parts):
    """The numbers of a part, in whole blocks but for the end."""
    blocks = (count + SIDE - 1) // SIDE
    low, high = blocks * part // parts, blocks * (part + 1) // parts
    return SIDE * low, min(SIDE * high, count)


@serial_as_written()
def _multiply_share(x, y, summands, sums, output, sizes, task, room):
    K = sizes.inner
    top, bottom = share_of(sizes.rows, task // sizes.across, sizes.down)
    first, last = share_of(sizes.columns, task % sizes.across, sizes.across)
    steps = (K + SIDE - 1) // SIDE
    line, stride = steps * PAIR_BYTES // SIDE, 2 * sizes.columns  # bytes of a packed row, a result
    packed = room + sizes.columns_at_once * line
    blocks = packed + (0 if x.by_rows else sizes.rows_at_once * line)
    spare = blocks + _GROUP * BLOCK_BYTES
    keeps = bottom - top <= sizes.rows_at_once
    for low in range(first, last, sizes.columns_at_once):
        high = min(low + sizes.columns_at_once, last)
        _pack_second(y, low, high, K, spare, room)
        for start in range(top, bottom, sizes.rows_at_once):
            stop = min(start + sizes.rows_at_once, bottom)
            if not x.by_rows and (low == first or not keeps):
                wanted = sums if low == 0 else 0
                _pack_lines_across(x, False, start, stop, K, wanted, spare, packed)
            for i in range(start, stop, SIDE):
                count = min(SIDE, stop - i)
                if not x.by_rows:
                    left, apart, step = packed + (i - start) * line, LINE, PAIR_BYTES
                elif count == SIDE:
                    left, apart, step = x.address + i * x.stride, x.stride, 2 * SIDE
                else:
                    copy_lines(x.address + i * x.stride, x.stride, count, K, spare)
                    left, apart, step = spare, 2 * K, 2 * SIDE
                for j in range(low, high, _WIDTH):
                    group = min(_GROUP, (high - j) // SIDE)
                    for q in range(group):
                        right = room + (j - low + SIDE * q) * line
                        _multiply_block(left, apart, step, right, steps, blocks + q * BLOCK_BYTES)
                    target = output + i * stride + 2 * j
                    _write(blocks, group, count, summands + 4 * j, target, stride)


@compiled()
def _multiply(x, y, summands, sums, output, sizes, shapes, rooms, tasks):
    for task in prange(tasks):
        begin(shapes)
        room = rooms + task * sizes.room
        _multiply_share(x, y, summands, sums, output, sizes, task, room)
        end()
        end_writing_past_cache()


class _Scratch(threading.local):
    """Memory for kernels that a thread of Python starts, kept: so it stays in their caches."""

    memory = torch.empty(0, dtype=torch.uint8, device="cpu")

    def address(self, size: int) -> int:
        """Where so many bytes begin, at a line of the cache."""
        if self.memory.numel() < size + LINE:
            self.memory = torch.empty(size + LINE, dtype=torch.uint8, device="cpu")
        return -(-self.memory.data_ptr() // LINE) * LINE


scratch = _Scratch()


def layout(x: Tensor) -> _Matrix:
    """Where a matrix lies whose rows or whose columns are in one piece each."""
    by_rows = x.stride(1) == 1
    stride = x.stride(0) if by_rows else x.stride(1)
    return _Matrix(x.data_ptr(), stride * x.element_size(), by_rows, x.dtype == torch.float32)


def whole(count: int, multiple: int) -> int:
    """The count, raised to a multiple."""
    return -(-count // multiple) * multiple


def _sizes(x: Tensor, y: Tensor, tasks: int) -> _Sizes:
    """Shares the result out so that little is read, and little packed, more than once."""
    (M, K), N = x.shape, y.shape[1]
    packs = x.stride(1) != 1
    of_rows, of_columns = M * (2 if packs else 1) * 2, N * 2 * y.element_size()
    parts = [n for n in range(1, tasks + 1) if tasks % n == 0]
    across = min(parts, key=lambda n: n * of_rows + tasks // n * of_columns)
    down = tasks // across
    inner = whole(K, SIDE)
    rows = whole(-(-M // down), SIDE)
    keeps = packs and rows * inner <= _MANY
    at_once = _MANY // (2 if keeps else 1) // inner // _WIDTH * _WIDTH
    columns = min(whole(-(-N // across), SIDE), max(at_once, _WIDTH))
    if packs:
        rows = rows if keeps else min(rows, _WIDTH)
    # For lines that are copied: of 32 rows, or of what is packed.
    spare = SIDE * max(2 * inner, 4 * columns, 2 * rows if packs else 0)
    packed = 2 * inner * (columns + (rows if packs else 0))
    room = whole(packed + _GROUP * BLOCK_BYTES + spare, 4096)
    return _Sizes(M, N, K, down, across, columns, rows, room)


def multiply(
    x: Tensor, y: Tensor, bias: Tensor | None, wants_sums: bool
) -> tuple[Tensor, Tensor | None]:
    """Gives ``x @ y + bias`` in bfloat16, rounded once, and the sums of x's rows or None.

    Args:
        x: Shape (M, K), bfloat16, its rows or its columns in one piece each.
        y: Shape (K, N), bfloat16 or float32, its rows or its columns in one piece each; taken as
            bfloat16.
        bias: Shape (N,), or None.
        wants_sums: Whether the sums are wanted, float32, shape (M,). Then x lies by columns.
    """
    M, N = x.shape[0], y.shape[1]
    tasks = match_threads()
    # Small blocks first: one that is freed behind a large one is a hole that stays.
    summands = x.new_zeros(N, dtype=torch.float32) if bias is None else bias.float().contiguous()
    sums = x.new_zeros(M, dtype=torch.float64) if wants_sums else None
    output = x.new_empty(M, N)
    sizes = _sizes(x, y, tasks)
    start = scratch.address(tasks * sizes.room)
    places = summands.data_ptr(), 0 if sums is None else sums.data_ptr(), output.data_ptr()
    _multiply(layout(x), layout(y), *places, sizes, shapes().data_ptr(), start, tasks)
    return output, None if sums is None else sums.float()


def refuses(x: Tensor, y: Tensor, bias: Tensor | None, wants_sums: bool) -> str | None:
    """Why `multiply` does not serve these, or None."""
    if (reason := refuses_layout(x, y, bias, wants_sums)) is not None:
        return reason
    if x.dtype != torch.bfloat16 or y.dtype not in (torch.bfloat16, torch.float32):
        return f"multiplies bfloat16 by bfloat16 or float32, not {x.dtype} by {y.dtype}"
    return f"serves sizes up to {LARGEST}" if max(x.shape) > LARGEST else None


def refuses_layout(x: Tensor, y: Tensor, bias: Tensor | None, wants_sums: bool) -> str | None:
    """Why tiles do not serve tensors of such shapes that lie so, or None."""
    if any(part is not None and part.device.type != "cpu" for part in (x, y, bias)):
        return "runs on the CPU"
    if x.dim() != 2 or y.dim() != 2 or x.shape[1] != y.shape[0]:
        return f"takes matrices (M, K) and (K, N), not {tuple(x.shape)} and {tuple(y.shape)}"
    (M, K), N = x.shape, y.shape[1]
    if bias is not None and bias.shape != (N,):
        return f"takes a bias for each of {N} columns, not of shape {tuple(bias.shape)}"
    if any(1 not in matrix.stride() or 0 in matrix.stride() for matrix in (x, y)):
        return "takes rows or columns in one piece each"
    x_by_rows, y_by_rows = x.stride(1) == 1, y.stride(1) == 1
    if M * N * K == 0 or N % SIDE or (K % SIDE and (x_by_rows or not y_by_rows)):
        return f"takes widths that are multiples of {SIDE}"
    if M % SIDE and not x_by_rows:
        return f"takes columns in multiples of {SIDE}"
    return "sums what lies by columns" if wants_sums and x_by_rows else None
