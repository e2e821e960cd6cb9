"""Gradient norm and AdamW on the CPU: all tensors of a model in one launch each.

Both only pass over memory. PyTorch's own clipping and fused AdamW read and write the gradients
twice more, and start their threads once per tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from numba import carray, prange
from torch import Tensor

from i3lm.ops.adamw import AdamWSettings
from i3lm.ops.adamw.float8 import BLOCK, RECORD
from i3lm.ops.adamw.numba_float8 import (
    load_signed,
    load_unsigned,
    store_signed,
    store_unsigned,
)
from i3lm.ops.adamw.reference import HASH_FACTORS, rounding_key
from i3lm.ops.numba_bridge import (
    compiled,
    fetch,
    inlined,
    match_threads,
    multiply_add,
    pointer,
    serial_as_written,
    widen,
)

# Elements of a task; and of the piece of it whose working array stays in the first cache, in a step
# and in a sum. So many pieces ahead memory is fetched: while one is computed, the next ones come.
_TASK, _PIECE, _SUMMED, _AHEAD = 65536, BLOCK, 512, 4
_LANES = 64  # sums kept side by side, so that their loop vectorises
_IN_FLOAT32, _IN_BFLOAT16, _IN_8_BITS = range(3)  # what averages are kept in
_KINDS = {torch.float32: _IN_FLOAT32, torch.bfloat16: _IN_BFLOAT16, torch.uint8: _IN_8_BITS}
_SIXTEEN, _THIRTEEN, _LOW_HALF = np.uint32(16), np.uint32(13), np.uint32(0xFFFF)
_FACTORS = tuple(np.uint32(factor) for factor in HASH_FACTORS)


@inlined()
def _load(row, address, is_narrow, start, stop):
    """Copies numbers from an address, float32 or the bits of bfloat16, into a row."""
    if is_narrow:
        bits = carray(pointer(address), stop, np.uint16)[start:stop]
        for i in range(bits.shape[0]):
            row[i] = widen(bits[i])
    else:
        numbers = carray(pointer(address), stop, np.float32)[start:stop]
        for i in range(numbers.shape[0]):
            row[i] = numbers[i]


@inlined()
def _load_sparse(row, address, is_narrow, places, width, start, stop):
    """Copies a piece of a matrix of which some rows are kept, and the others are zero."""
    for i in range(row.shape[0]):
        row[i] = 0
    for r in range(start // width, (stop - 1) // width + 1):
        place = carray(pointer(places), r + 1, np.int64)[r]
        if place >= 0:
            low, high = max(start, r * width), min(stop, (r + 1) * width)
            moved = (place - r) * width
            _load(row[low - start : high - start], address, is_narrow, low + moved, high + moved)


@inlined()
def _fetch(address, is_narrow, start, stop):
    """Has numbers at an address brought into the cache for a later piece, if there is one."""
    if start >= stop:
        return
    if is_narrow:
        fetch(carray(pointer(address), stop, np.uint16)[start:stop])
    else:
        fetch(carray(pointer(address), stop, np.float32)[start:stop])


@inlined()
def _fetch_average(address, kind, start, stop):
    if kind == _IN_8_BITS:
        if start < stop:
            place = start // BLOCK * RECORD
            fetch(carray(pointer(address), place + RECORD, np.uint8)[place:])
    else:
        _fetch(address, kind == _IN_BFLOAT16, start, stop)


@inlined()
def _store(address, work, row, start, stop):
    numbers = carray(pointer(address), stop, np.float32)[start:stop]
    for i in range(numbers.shape[0]):
        numbers[i] = work[row, i]


@inlined()
def _round_up_or_down(row, random, address, start, stop):
    """Writes a row as the bits of bfloat16, rounded by the low half of random numbers."""
    bits = carray(pointer(address), stop, np.uint16)[start:stop]
    for i in range(bits.shape[0]):
        whole = np.float32(row[i]).view(np.uint32)
        bits[i] = np.uint16((whole + (random[i] & _LOW_HALF)) >> _SIXTEEN)


@inlined()
def _fill_random(random, start, key):
    """32 random bits for every place of a piece: `random_bits` of the reference."""
    for i in range(_PIECE):
        # numba makes products of two uint32 uint64.
        x = np.uint32(np.uint32(start + i) * _FACTORS[0] + key)
        x = np.uint32((x ^ (x >> _SIXTEEN)) * _FACTORS[1])
        x = np.uint32((x ^ (x >> _THIRTEEN)) * _FACTORS[2])
        random[i] = x ^ (x >> _SIXTEEN)


@serial_as_written()
def _sum_of_squares(numbers, lanes):
    """Of as many numbers as a piece has, in an order that the compiler leaves as it is."""
    for i in range(_LANES):
        lanes[i] = 0
    for start in range(0, _SUMMED, _LANES):
        for i in range(_LANES):
            lanes[i] = multiply_add(numbers[start + i], numbers[start + i], lanes[i])
    total = lanes[0]
    for i in range(1, _LANES):
        total += lanes[i]
    return total


@compiled()
def _sums_of_squares(tasks, addresses, narrow, sums):
    for task in prange(len(tasks)):
        tensor, begin, end = tasks[task, 0], tasks[task, 1], tasks[task, 2]
        work, lanes = np.empty((1, _SUMMED), np.float32), np.empty(_LANES, np.float32)
        total = np.float64(0)
        for start in range(begin, end, _SUMMED):
            stop = min(start + _SUMMED, end)
            ahead = start + _AHEAD * _SUMMED
            _fetch(addresses[tensor, 0], narrow[tensor], ahead, min(ahead + _SUMMED, end))
            _load(work[0], addresses[tensor, 0], narrow[tensor], start, stop)
            work[0, stop - start :] = 0
            total += _sum_of_squares(work[0], lanes)
        sums[task] = total


@compiled()
def _steps(tasks, addresses, narrow, sparse, settings, scale, keys, kind):
    for task in prange(len(tasks)):
        tensor, begin, end = tasks[task, 0], tasks[task, 1], tasks[task, 2]
        parameter, gradient = addresses[tensor, 0], addresses[tensor, 1]
        average, square = addresses[tensor, 2], addresses[tensor, 3]
        places, width = sparse[tensor, 0], sparse[tensor, 1]
        kept, step_size = settings[tensor, 0], settings[tensor, 1]
        beta1, beta2 = settings[tensor, 2], settings[tensor, 3]
        correction, eps = settings[tensor, 4], settings[tensor, 5]
        fresh1, fresh2 = np.float32(1) - beta1, np.float32(1) - beta2
        work, random = np.empty((4, _PIECE), np.float32), np.empty(_PIECE, np.uint32)
        for start in range(begin, end, _PIECE):
            stop = min(start + _PIECE, end)
            ahead = start + _AHEAD * _PIECE
            then = min(ahead + _PIECE, end)
            _fetch(parameter, False, ahead, then)
            if not places:
                _fetch(gradient, narrow[tensor], ahead, then)
            _fetch_average(average, kind, ahead, then)
            _fetch_average(square, kind, ahead, then)
            _load(work[0], parameter, False, start, stop)
            if places:
                _load_sparse(work[1], gradient, narrow[tensor], places, width, start, stop)
            else:
                _load(work[1], gradient, narrow[tensor], start, stop)
            if kind == _IN_8_BITS:
                load_signed(work[2], average, start)
                load_unsigned(work[3], square, start)
                work[1, stop - start :] = 0
            else:
                _load(work[2], average, kind == _IN_BFLOAT16, start, stop)
                _load(work[3], square, kind == _IN_BFLOAT16, start, stop)
            for i in range(_PIECE):
                g = work[1, i] * scale
                m = work[2, i] + (g - work[2, i]) * fresh1
                v = work[3, i] * beta2 + g * g * fresh2
                update = step_size * m / (math.sqrt(v) * correction + eps)
                work[0, i] = work[0, i] * kept - update
                work[2, i], work[3, i] = m, v
            _store(parameter, work, 0, start, stop)
            if kind != _IN_FLOAT32:
                _fill_random(random, start, keys[tensor])
            if kind == _IN_8_BITS:
                store_signed(work[2], random, average, start)
                store_unsigned(work[3], random, square, start)
            elif kind == _IN_BFLOAT16:
                _round_up_or_down(work[2], random, average, start, stop)
                for i in range(_PIECE):
                    random[i] = random[i] >> _SIXTEEN
                _round_up_or_down(work[3], random, square, start, stop)
            else:
                _store(average, work, 2, start, stop)
                _store(square, work, 3, start, stop)


@lru_cache(maxsize=8)
def _tasks(sizes: tuple[int, ...]) -> np.ndarray:
    """Pieces of the tensors, (tensor, start, stop) each, about as large as each other."""
    return np.array(
        [
            (tensor, start, min(start + _TASK, size))
            for tensor, size in enumerate(sizes)
            for start in range(0, size, _TASK)
        ],
        np.int64,
    ).reshape(-1, 3)


def _where(*groups: Sequence[Tensor]) -> np.ndarray:
    """The addresses of the tensors that belong together, a row each."""
    return np.array([[x.data_ptr() for x in row] for row in zip(*groups, strict=True)], np.int64)


def _places(gradient: Tensor) -> Tensor:
    """Of each row of a sparse matrix, where among those it keeps it is, shape (rows,); else -1."""
    rows = gradient.indices()[0]
    return torch.full((len(gradient),), -1).index_copy_(0, rows, torch.arange(len(rows)))


def _readable(gradients: Sequence[Tensor]) -> tuple[list[Tensor], np.ndarray]:
    """The gradients as they can be read in order, and which of them are in bfloat16."""
    for gradient in gradients:
        narrow_or_not = gradient.dtype in (torch.float32, torch.bfloat16)
        if gradient.device.type != "cpu" or not narrow_or_not:  # the kernel follows addresses
            raise ValueError(
                "a gradient must be float32 or bfloat16 on the CPU, "
                f"not {gradient.dtype} on {gradient.device}"
            )
    narrow = np.array([gradient.dtype == torch.bfloat16 for gradient in gradients])
    return [gradient.contiguous() for gradient in gradients], narrow


def gradient_norm_numba(gradients: Sequence[Tensor]) -> float:
    """Computes `gradient_norm_reference` on the CPU."""
    match_threads()
    read, narrow = _readable(gradients)
    tasks = _tasks(tuple(gradient.numel() for gradient in read))
    sums = np.empty(len(tasks))
    _sums_of_squares(tasks, _where(read), narrow, sums)
    return math.sqrt(sums.sum())


def adamw_step_numba(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    averages: Sequence[Tensor],
    squares: Sequence[Tensor],
    settings: Sequence[AdamWSettings],
    scale: float,
) -> None:
    """Computes `adamw_step_reference` on the CPU."""
    kept = averages[0].dtype
    for tensor, dtype in (
        *((p, torch.float32) for p in parameters),
        *((x, kept) for x in (*averages, *squares)),
    ):
        if tensor.device.type != "cpu" or tensor.dtype != dtype or not tensor.is_contiguous():
            raise ValueError(
                f"a tensor of shape {tuple(tensor.shape)} must be contiguous {dtype} on the CPU, "
                f"not {tensor.dtype} on {tensor.device} with strides {tensor.stride()}"
            )
    match_threads()
    # Kept by name while the kernel follows their addresses.
    places = [_places(gradient) if gradient.is_sparse else None for gradient in gradients]
    sparse = [
        (0, 0) if place is None else (place.data_ptr(), p.shape[1])
        for place, p in zip(places, parameters, strict=True)
    ]
    read, narrow = _readable([x.values() if x.is_sparse else x for x in gradients])
    factors = [
        (
            1 - s.learning_rate * s.weight_decay,
            s.learning_rate / (1 - s.betas[0] ** s.step),
            *s.betas,
            (1 - s.betas[1] ** s.step) ** -0.5,
            s.eps,
        )
        for s in settings
    ]
    rounds = kept != torch.float32
    keys = [rounding_key(i, s.step) for i, s in enumerate(settings)] if rounds else []
    _steps(
        _tasks(tuple(p.numel() for p in parameters)),
        _where(parameters, read, averages, squares),
        narrow,
        np.array(sparse, np.int64),
        np.array(factors, np.float32),
        np.float32(scale),
        np.array(keys, np.uint32),
        _KINDS[kept],
    )
