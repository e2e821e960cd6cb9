"""Causal attention in bfloat16 by a processor's matrix unit: a head at a time, all of it in cache.

Queries are taken 32 at a time, side by side in the lanes of vectors, their keys one below the
other: so maxima and sums over keys need no step across lanes, and weights lie as the products want
them. The backward pass computes the weights again, from the largest score and the sum of each query
(as in arXiv:2205.14135, section 3.1), so that a call keeps nothing of size T x T, for any T.

A matrix (T, D) is packed into pairs of tiles for each role that it has in a product: as first or
second operand, with sums along its rows or from row to row. It is filled up with zeros to whole
blocks of 32 rows. Of block i of rows and block k of columns the pair is number i (D / 32) + k.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numba import carray, prange
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from i3lm.ops.amx_bridge import (
    BLOCK_BYTES,
    LINE,
    PAIR_BYTES,
    ROW_BYTES,
    SIDE,
    TILE_BYTES,
    add_product,
    add_rows,
    begin,
    clear_block,
    copy_line,
    end,
    load_block,
    multiply_differences,
    narrow,
    narrow_product,
    pack_block,
    pack_columns,
    pack_rows,
    pack_second_block,
    pack_second_columns,
    pack_second_rows,
    raise_by_rows,
    shapes,
    store_block,
)
from i3lm.ops.numba_bridge import (
    as_arrays,
    compiled,
    exp,
    floats,
    match_threads,
    pointer,
    serial_as_written,
    targets,
    widen,
)

_HIDDEN, _ZERO, _ONE = np.float32(-np.inf), np.float32(0), np.float32(1)


class _Matrices(NamedTuple):
    """Where a matrix (T, D) of bfloat16 numbers lies for each head of each row of a batch.

    Attributes:
        address: Of the first number of all.
        batch: The bytes from one row of the batch to the next.
        head: The bytes from one head to the next.
        place: The bytes from one row of a matrix to the next.
    """

    address: int
    batch: int
    head: int
    place: int


class _Sizes(NamedTuple):
    """What the kernels must know of a call.

    Attributes:
        heads: Heads of a row of the batch, H.
        length: Rows of a matrix, T.
        width: Numbers of such a row, D, a multiple of 32.
        room: Scratch memory of a task: its bytes.
        scale: What scores are multiplied by.
    """

    heads: int
    length: int
    width: int
    room: int
    scale: np.float32


@serial_as_written()
def _of_head(matrices, sizes, head):
    """The address of a head's matrix."""
    source = matrices.address + head // sizes.heads * matrices.batch
    return source + head % sizes.heads * matrices.head


@serial_as_written()
def _whole(matrices, sizes, head, room):
    """The address and stride of a head's matrix in whole blocks of rows, copied if need be."""
    source, T, D = _of_head(matrices, sizes, head), sizes.length, sizes.width
    full = (T + SIDE - 1) // SIDE * SIDE
    if full == T:
        return source, matrices.place
    copied = carray(pointer(room), (full, D), np.uint16)
    for t in range(T):
        row = carray(pointer(source + t * matrices.place), (D,), np.uint16)
        for n in range(D):
            copied[t, n] = row[n]
    copied[T:] = 0
    return np.int64(room), 2 * D


@serial_as_written()
def _pack_rows(source, stride, T, D, second, target):
    """An operand's rows: sums run along them."""
    for sixteen in range((T + SIDE - 1) // SIDE * 2):
        for k in range(D // SIDE):
            pair = sixteen // 2 * (D // SIDE) + k
            tile = target + pair * PAIR_BYTES + sixteen % 2 * TILE_BYTES
            place = source + 16 * sixteen * stride + 2 * SIDE * k
            if second:
                pack_second_rows(place, stride, tile)
            else:
                pack_rows(place, stride, tile)


@serial_as_written()
def _pack_columns(source, stride, T, D, second, target):
    """An operand's columns: sums run from row to row."""
    for i in range((T + SIDE - 1) // SIDE):
        for sixteen in range(D // 16):
            pair = i * (D // SIDE) + sixteen // 2
            tile = target + pair * PAIR_BYTES + sixteen % 2 * TILE_BYTES
            place = source + SIDE * i * stride + 32 * sixteen
            if second:
                pack_second_columns(place, stride, tile)
            else:
                pack_columns(place, stride, tile)


@serial_as_written()
def _multiply_rows(left, right, steps, block):
    """The products of 32 rows with 32 others: (32, 32), float32."""
    clear_block()
    for k in range(steps):
        add_product(left + k * PAIR_BYTES, right + k * PAIR_BYTES)
    store_block(block, ROW_BYTES)


@serial_as_written()
def _mix(left, weights, low, high, steps, target):
    """Blocks low to high of columns, weighed for 32 queries: blocks (32 columns, 32 queries)."""
    for k in range(steps):
        clear_block()
        for j in range(low, high):
            add_product(left + (j * steps + k) * PAIR_BYTES, weights + j * PAIR_BYTES)
        store_block(target + k * BLOCK_BYTES, ROW_BYTES)


@serial_as_written()
def _add_mixed(weights, right, D, target):
    """Adds the sums of 32 rows of D numbers, weighed by a pair of tiles, to 32 others."""
    for k in range(D // SIDE):
        block = target + 4 * SIDE * k
        load_block(block, 4 * D)
        add_product(weights, right + k * PAIR_BYTES)
        store_block(block, 4 * D)


@serial_as_written()
def _write(blocks, steps, factors, row, stride, count, halves):
    """Writes blocks (32 columns, 32 queries), multiplied for each query, as rows of bfloat16."""
    for k in range(steps):
        block = blocks + k * BLOCK_BYTES
        for n in range(SIDE):
            narrow_product(block + ROW_BYTES * n, factors, halves + 2 * SIDE * n)
        for half in range(2):
            tile = halves + PAIR_BYTES
            pack_columns(halves + 32 * half, 2 * SIDE, tile)
            for r in range(16 * half, min(16 * half + 16, count)):
                copy_line(tile + 64 * (r % 16), row + r * stride + 2 * SIDE * k)


@serial_as_written()
def _hide(block, before, lows, value):
    """Writes a value where queries do not see keys, `before` of which stand before query 0."""
    for s in range(SIDE):
        place = np.int32(s - before)
        for r in range(SIDE):
            hidden = (place > np.int32(r)) | (place < lows[r])
            block[s, r] = value if hidden else block[s, r]


@serial_as_written()
def _soften(block, scale, offsets, factors):
    """Turns scores x of each query into factor e^(scale x - offset)."""
    for s in range(SIDE):
        for r in range(SIDE):
            block[s, r] = factors[r] * exp(block[s, r] * scale - offsets[r])


@serial_as_written()
def _sum_of(lanes):
    """The sum of 32 numbers, in an order that no compiler changes."""
    for half in (16, 8, 4):
        for i in range(half):
            lanes[i] += lanes[i + half]
    return (lanes[0] + lanes[2]) + (lanes[1] + lanes[3])


@serial_as_written()
def _dot(address, other, D, lanes):
    """The scalar product of two vectors of bfloat16 numbers."""
    x = carray(pointer(address), (D,), np.uint16)
    y = carray(pointer(other), (D,), np.uint16)
    lanes[:] = _ZERO
    for start in range(0, D, SIDE):
        a, b = x[start : start + SIDE], y[start : start + SIDE]
        for i in range(SIDE):
            lanes[i] += widen(a[i]) * widen(b[i])
    return _sum_of(lanes)


@serial_as_written()
def _find_first(first, sizes, head, t, lows):
    """The first keys that queries from t on see, less t; gives the least and the largest."""
    least, largest = t, 0
    lows[:] = -t
    if first.size:
        for r in range(min(SIDE, sizes.length - t)):
            low = first[head // sizes.heads, t + r]
            lows[r] = low - t
            least, largest = min(least, low), max(largest, low)
    else:
        least = 0
    return least, largest


@serial_as_written()
def _attend_head(query, key, value, output, sums, first, sizes, head, room):
    T, D, steps = sizes.length, sizes.width, sizes.width // SIDE
    blocks = (T + SIDE - 1) // SIDE
    packed = blocks * steps * PAIR_BYTES
    queries, keys, values, weights = room, room + packed, room + 2 * packed, room + 3 * packed
    scores = weights + blocks * PAIR_BYTES
    mixed = scores + blocks * BLOCK_BYTES
    halves = mixed + steps * BLOCK_BYTES
    lanes, copied = halves + 2 * PAIR_BYTES, halves + 2 * PAIR_BYTES + 4 * ROW_BYTES
    tops, totals = floats(lanes, (SIDE,)), floats(lanes + ROW_BYTES, (SIDE,))
    lows = carray(pointer(lanes + 2 * ROW_BYTES), (SIDE,), np.int32)
    ones = floats(lanes + 3 * ROW_BYTES, (SIDE,))
    ones[:] = _ONE
    source, place = _whole(query, sizes, head, copied)
    _pack_rows(source, place, T, D, True, queries)
    source, place = _whole(key, sizes, head, copied)
    _pack_rows(source, place, T, D, False, keys)
    source, place = _whole(value, sizes, head, copied)
    _pack_columns(source, place, T, D, False, values)
    written = _of_head(output, sizes, head)
    for i in range(blocks):
        t = SIDE * i
        least, largest = _find_first(first, sizes, head, t, lows)
        near, count = least // SIDE, min(SIDE, T - t)
        own = queries + i * steps * PAIR_BYTES
        tops[:] = _HIDDEN
        totals[:] = _ZERO
        for j in range(near, i + 1):
            place = scores + j * BLOCK_BYTES
            _multiply_rows(keys + j * steps * PAIR_BYTES, own, steps, place)
            block = floats(place, (SIDE, SIDE))
            if j == i or largest > SIDE * j:
                _hide(block, t - SIDE * j, lows, _HIDDEN)
            raise_by_rows(place, lanes)
        for r in range(SIDE):
            tops[r] *= sizes.scale
        for j in range(near, i + 1):
            place = scores + j * BLOCK_BYTES
            block = floats(place, (SIDE, SIDE))
            _soften(block, sizes.scale, tops, ones)
            if j == i or largest > SIDE * j:
                _hide(block, t - SIDE * j, lows, _ZERO)
            add_rows(place, lanes + ROW_BYTES)
            pack_second_block(place, weights + j * PAIR_BYTES)
        _mix(values, weights, near, i + 1, steps, mixed)
        for r in range(SIDE):
            totals[r] = _ONE / totals[r]
        for r in range(count):
            sums[head, 0, t + r] = tops[r]
            sums[head, 1, t + r] = totals[r]
        row = written + t * output.place
        _write(mixed, steps, lanes + ROW_BYTES, row, output.place, count, halves)


@serial_as_written()
def _differentiate_head(
    query, key, value, output, grad, grad_query, grad_key, grad_value, sums, first, sizes,
    head, room,
):  # fmt: skip
    T, D, steps = sizes.length, sizes.width, sizes.width // SIDE
    blocks = (T + SIDE - 1) // SIDE
    packed, summed = blocks * steps * PAIR_BYTES, 4 * SIDE * blocks * D
    queries, grads, keys, values = room, room + packed, room + 2 * packed, room + 3 * packed
    # The same by columns.
    queries_down, grads_down, keys_down = room + 4 * packed, room + 5 * packed, room + 6 * packed
    of_keys = room + 7 * packed
    of_values = of_keys + summed
    of_scores = of_values + summed
    mixed = of_scores + blocks * PAIR_BYTES
    scores = mixed + steps * BLOCK_BYTES
    of_weights = scores + BLOCK_BYTES
    halves = of_weights + BLOCK_BYTES
    lanes, copied = halves + 2 * PAIR_BYTES, halves + 2 * PAIR_BYTES + 6 * ROW_BYTES
    # Of queries: their largest score and the inverse of their sum; what gradients are less by.
    tops, shares = floats(lanes, (SIDE,)), floats(lanes + ROW_BYTES, (SIDE,))
    means, scales = floats(lanes + 2 * ROW_BYTES, (SIDE,)), floats(lanes + 3 * ROW_BYTES, (SIDE,))
    lows = carray(pointer(lanes + 4 * ROW_BYTES), (SIDE,), np.int32)
    adding = floats(lanes + 5 * ROW_BYTES, (SIDE,))
    scales[:] = sizes.scale
    source, place = _whole(query, sizes, head, copied)
    _pack_rows(source, place, T, D, True, queries)
    _pack_columns(source, place, T, D, True, queries_down)
    source, place = _whole(grad, sizes, head, copied)
    _pack_rows(source, place, T, D, True, grads)
    _pack_columns(source, place, T, D, True, grads_down)
    source, place = _whole(key, sizes, head, copied)
    _pack_rows(source, place, T, D, False, keys)
    _pack_columns(source, place, T, D, False, keys_down)
    source, place = _whole(value, sizes, head, copied)
    _pack_rows(source, place, T, D, False, values)
    floats(of_keys, (SIDE * blocks * D,))[:] = 0
    floats(of_values, (SIDE * blocks * D,))[:] = 0
    block = floats(scores, (SIDE, SIDE))
    outputs, of_outputs = _of_head(output, sizes, head), _of_head(grad, sizes, head)
    of_query = _of_head(grad_query, sizes, head)
    for i in range(blocks):
        t, at = SIDE * i, i * steps * PAIR_BYTES
        least, largest = _find_first(first, sizes, head, t, lows)
        near, count = least // SIDE, min(SIDE, T - t)
        means[:] = _ZERO
        tops[:] = _ZERO
        shares[:] = _ZERO
        for r in range(count):
            tops[r] = sums[head, 0, t + r]
            shares[r] = sums[head, 1, t + r]
            row = of_outputs + (t + r) * grad.place
            means[r] = _dot(row, outputs + (t + r) * output.place, D, adding)
        for j in range(near, i + 1):
            other, sum_of = j * steps * PAIR_BYTES, 4 * SIDE * D * j
            _multiply_rows(keys + other, queries + at, steps, scores)
            _multiply_rows(values + other, grads + at, steps, of_weights)
            _soften(block, sizes.scale, tops, shares)
            if j == i or largest > SIDE * j:
                _hide(block, t - SIDE * j, lows, _ZERO)
            multiply_differences(of_weights, scores, lanes + 2 * ROW_BYTES)
            pack_block(scores, halves)
            _add_mixed(halves, grads_down + at, D, of_values + sum_of)
            pack_block(of_weights, halves)
            _add_mixed(halves, queries_down + at, D, of_keys + sum_of)
            pack_second_block(of_weights, of_scores + j * PAIR_BYTES)
        _mix(keys_down, of_scores, near, i + 1, steps, mixed)
        target = of_query + t * grad_query.place
        _write(mixed, steps, lanes + 3 * ROW_BYTES, target, grad_query.place, count, halves)
    of_key, of_value = _of_head(grad_key, sizes, head), _of_head(grad_value, sizes, head)
    for t in range(T):
        for k in range(steps):
            numbers, place = 4 * (D * t + SIDE * k), 2 * SIDE * k
            narrow_product(
                of_keys + numbers, lanes + 3 * ROW_BYTES, of_key + t * grad_key.place + place
            )
            narrow(of_values + numbers, of_value + t * grad_value.place + place)


@compiled()
def _attend(query, key, value, output, sums, first, sizes, shapes, rooms, tasks):
    heads = sums.shape[0]
    for task in prange(tasks):
        begin(shapes)
        for head in range(heads * task // tasks, heads * (task + 1) // tasks):
            room = rooms + task * sizes.room
            _attend_head(query, key, value, output, sums, first, sizes, head, room)
        end()


@compiled()
def _differentiate_all(
    query, key, value, output, grad, grad_query, grad_key, grad_value, sums, first, sizes,
    shapes, rooms, tasks,
):  # fmt: skip
    heads = sums.shape[0]
    for task in prange(tasks):
        begin(shapes)
        for head in range(heads * task // tasks, heads * (task + 1) // tasks):
            room = rooms + task * sizes.room
            _differentiate_head(
                query, key, value, output, grad, grad_query, grad_key, grad_value, sums,
                first, sizes, head, room,
            )  # fmt: skip
        end()


def _room(T: int, D: int, backward: bool) -> int:
    """Bytes of scratch memory of a task; the kernels cut it up."""
    blocks, steps = -(-T // SIDE), D // SIDE
    packed, copied = blocks * steps * PAIR_BYTES, 2 * SIDE * blocks * D
    common = blocks * PAIR_BYTES + steps * BLOCK_BYTES + 2 * PAIR_BYTES + 6 * ROW_BYTES + copied
    if not backward:
        return common + 3 * packed + blocks * BLOCK_BYTES
    return common + 7 * packed + 2 * 4 * SIDE * blocks * D + 2 * BLOCK_BYTES


def _matrices(x: Tensor) -> _Matrices:
    """Where the heads of (B, H, T, D) lie, D's numbers side by side."""
    size = x.element_size()
    return _Matrices(x.data_ptr(), *(size * stride for stride in x.stride()[:3]))


def _set_up(x: Tensor, scale: float, backward: bool) -> tuple[_Sizes, Tensor, tuple[int, ...]]:
    """The sizes, the scratch memory, and what the kernels take last."""
    B, H, T, D = x.shape
    tasks, room = max(1, min(match_threads(), B * H)), -(-_room(T, D, backward) // LINE) * LINE
    rooms = torch.empty(tasks * room + LINE, dtype=torch.uint8)
    sizes = _Sizes(H, T, D, room, np.float32(scale))
    start = -(-rooms.data_ptr() // LINE) * LINE
    return sizes, rooms, (shapes().data_ptr(), start, tasks)


def _first(first: Tensor | None) -> list[np.ndarray]:
    # Of one type with that of a tensor, so that there is one kernel.
    return as_arrays(torch.empty(0, 0, dtype=torch.int64) if first is None else first)


def _by_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


class _CausalAMX(torch.autograd.Function):
    """Attention of heads whose width is a multiple of 32."""

    @staticmethod
    def forward(ctx, query, key, value, first, scale):
        query, key, value = (_by_rows(x) for x in (query, key, value))
        B, H, T, D = query.shape
        # As the next matrix wants it: the heads of a token side by side.
        output = value.new_empty(B, T, H, D).transpose(1, 2)
        sums = value.new_empty(B * H, 2, T, dtype=torch.float32)
        sizes, room, rest = _set_up(query, scale, backward=False)
        matrices = [_matrices(x) for x in (query, key, value, output)]
        _attend(*matrices, *targets(sums), *_first(first), sizes, *rest)
        del room  # until here the kernel worked in it
        ctx.save_for_backward(query, key, value, first, output, sums)
        ctx.scale = scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        query, key, value, first, output, sums = ctx.saved_tensors
        B, H, T, D = query.shape
        grad = _by_rows(grad)
        grads = query.new_empty(B, T, 3, H, D).permute(2, 0, 3, 1, 4).unbind()
        sizes, room, rest = _set_up(query, ctx.scale, backward=True)
        matrices = [_matrices(x) for x in (query, key, value, output, grad, *grads)]
        _differentiate_all(*matrices, *as_arrays(sums), *_first(first), sizes, *rest)
        del room
        return (*grads, None, None)


def causal_amx(query: Tensor, key: Tensor, value: Tensor, first: Tensor | None) -> Tensor:
    """Computes `i3lm.ops.causal_attention` of bfloat16; see there."""
    D = query.shape[3]
    if rest := -D % SIDE:  # zeros change no product
        query, key, value = (F.pad(x, (0, rest)) for x in (query, key, value))
    return _CausalAMX.apply(query, key, value, first, D**-0.5)[..., :D]
