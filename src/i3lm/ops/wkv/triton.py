"""The RWKV-4 recurrence for GPUs, in Triton.

A program takes one row of the batch and `BLOCK` channels, and walks over time in tiles of `L`
steps; both are chosen by measuring. Within a tile the decayed sums of all steps come from one
associative scan, so a tile costs about log2(L) dependent operations instead of L. The backward pass
recomputes: it walks forwards once to find the sums at the start of every tile, then backwards tile
by tile, with the same scan in reverse time for the adjoints. Nothing but the inputs is kept between
the passes. Keys and values are read in the dtype that they have, and outputs and their gradients
are written in it; sums are float32.

A scan needs the sums *before* each step. Rather than shift results, the elements are shifted: row
j of a tile holds what token ``t0 + j - 1`` added, and row 0 holds the sums carried into the tile.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from i3lm.ops.triton_bridge import SHORTEST_TILE, as_read, flags, marks, problem_size, tuned
from i3lm.ops.wkv.reference import EMPTY_EXPONENT, FASTEST_DECAY

_EMPTY = tl.constexpr(EMPTY_EXPONENT)
# The log decay over a document's start: of whatever went before, nothing is left, at any scale.
# Sums of decays stay infinite, and all other exponents are finite, so no NaN can come of it.
_FORGET = tl.constexpr(float("-inf"))


@triton.jit
def _combine(decay1, num1, den1, top1, decay2, num2, den2, top2):
    """The sums of two neighbouring stretches of time, the first one decayed over the second."""
    left = top1 + decay2
    top = tl.maximum(left, top2)
    past, now = tl.exp(left - top), tl.exp(top2 - top)
    return decay1 + decay2, num1 * past + num2 * now, den1 * past + den2 * now, top


@triton.jit
def _absorb(num, den, top, decay, num2, den2, top2):
    """``sums * e^decay + (num2, den2) * e^top2``."""
    left = top + decay
    largest = tl.maximum(left, top2)
    past, now = tl.exp(left - largest), tl.exp(top2 - largest)
    return num * past + num2 * now, den * past + den2 * now, largest


@triton.jit
def _row(x, rows, which):
    """Row `which` of a tile (L, BLOCK), as (BLOCK,)."""
    return tl.sum(tl.where(rows[:, None] == which, x, 0.0), axis=0)


@triton.jit
def _sums_before(
    key, value, reset, mask, b, t0, T, C, channels, live, w, num, den, top, rows,
    HAS_RESET: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """The sums that every step of a tile sees, (L, BLOCK) each, from those carried in."""
    t = t0 + rows - 1
    real, begins = marks(reset, mask, b, t, T, HAS_RESET, HAS_MASK)
    first = rows == 0
    k, v, used, _ = _tile_inputs(key, value, b, t, T, C, channels, live, real & (rows > 0))
    decay = tl.where(used, w[None, :], 0.0)
    decay = tl.where((begins & (rows > 0))[:, None], _FORGET, decay)
    nums = tl.where(first[:, None], num[None, :], v)
    dens = tl.where(first[:, None], den[None, :], tl.where(used, 1.0, 0.0))
    tops = tl.where(first[:, None], top[None, :], k)
    _, nums, dens, tops = tl.associative_scan((decay, nums, dens, tops), 0, _combine)
    _, starts = marks(reset, mask, b, t0 + rows, T, HAS_RESET, HAS_MASK)
    nums = tl.where(starts[:, None], 0.0, nums)
    dens = tl.where(starts[:, None], 0.0, dens)
    tops = tl.where(starts[:, None], _EMPTY, tops)
    return nums, dens, tops


@triton.jit
def _tile_inputs(key, value, b, t, T, C, channels, live, real):
    """Keys and values of steps t, (L, BLOCK): `_EMPTY` and 0 at padded steps."""
    used = real[:, None] & live[None, :]
    offsets = (b * T + t)[:, None] * C + channels[None, :]
    k = tl.load(key + offsets, mask=used, other=0.0).to(tl.float32)
    v = tl.load(value + offsets, mask=used, other=0.0).to(tl.float32)
    return tl.where(used, k, _EMPTY), v, used, offsets


@tuned()
def _forward_kernel(
    key, value, decay, first, state, reset, mask, output, final, T, C, near_B, near_T,
    HAS_RESET: tl.constexpr, HAS_MASK: tl.constexpr, L: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = channels < C
    rows = tl.arange(0, L)
    w = tl.load(decay + channels, mask=live, other=0.0)
    u = tl.load(first + channels, mask=live, other=0.0)
    num = tl.load(state + (b * 3 + 0) * C + channels, mask=live, other=0.0)
    den = tl.load(state + (b * 3 + 1) * C + channels, mask=live, other=0.0)
    top = tl.load(state + (b * 3 + 2) * C + channels, mask=live, other=_EMPTY)
    for t0 in range(0, T, L):
        nums, dens, tops = _sums_before(
            key, value, reset, mask, b, t0, T, C, channels, live, w, num, den, top, rows,
            HAS_RESET, HAS_MASK,
        )  # fmt: skip
        t = t0 + rows
        real, _ = marks(reset, mask, b, t, T, HAS_RESET, HAS_MASK)
        k, v, used, offsets = _tile_inputs(key, value, b, t, T, C, channels, live, real)
        history = u[None, :] + tops
        scale = tl.maximum(history, k)
        past, now = tl.exp(history - scale), tl.exp(k - scale)
        y = (past * nums + now * v) / (past * dens + now)
        inside = (t < T)[:, None] & live[None, :]
        tl.store(output + offsets, tl.where(used, y, 0.0), mask=inside)
        # The sums after the tile's last step go on to the next tile.
        step = tl.where(used, w[None, :], 0.0)
        ones = tl.where(used, 1.0, 0.0)
        nums, dens, tops = _absorb(nums, dens, tops, step, v, ones, k)
        num, den, top = _row(nums, rows, L - 1), _row(dens, rows, L - 1), _row(tops, rows, L - 1)
    tl.store(final + (b * 3 + 0) * C + channels, num, mask=live)
    tl.store(final + (b * 3 + 1) * C + channels, den, mask=live)
    tl.store(final + (b * 3 + 2) * C + channels, top, mask=live)


@triton.jit
def _output_gradients(nums, dens, tops, k, v, g, u):
    """The weights of history and token, y, scale, and the gradients of the two sums of y."""
    history = u[None, :] + tops
    scale = tl.maximum(history, k)
    past, now = tl.exp(history - scale), tl.exp(k - scale)
    below = past * dens + now
    below = tl.where(below == 0.0, 1.0, below)  # padded steps without a past
    y = (past * nums + now * v) / below
    grad_num = g / below
    return past, now, y, scale, grad_num, -grad_num * y


@tuned()
def _backward_kernel(
    key, value, decay, first, state, reset, mask, grad_output, grad_final, starts,
    grad_key, grad_value, grad_decay, grad_first, grad_start, T, C, near_B, near_T,
    HAS_RESET: tl.constexpr, HAS_MASK: tl.constexpr, L: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = channels < C
    rows = tl.arange(0, L)
    w = tl.load(decay + channels, mask=live, other=0.0)
    u = tl.load(first + channels, mask=live, other=0.0)
    num0 = tl.load(state + (b * 3 + 0) * C + channels, mask=live, other=0.0)
    den0 = tl.load(state + (b * 3 + 1) * C + channels, mask=live, other=0.0)
    top0 = tl.load(state + (b * 3 + 2) * C + channels, mask=live, other=_EMPTY)

    # Forwards: the sums carried into every tile.
    tiles = tl.cdiv(T, L)
    num, den, top = num0, den0, top0
    for tile in range(tiles):
        place = starts + ((b * tiles + tile) * 3) * C + channels
        tl.store(place, num, mask=live)
        tl.store(place + C, den, mask=live)
        tl.store(place + 2 * C, top, mask=live)
        t0 = tile * L
        nums, dens, tops = _sums_before(
            key, value, reset, mask, b, t0, T, C, channels, live, w, num, den, top, rows,
            HAS_RESET, HAS_MASK,
        )  # fmt: skip
        real, _ = marks(reset, mask, b, t0 + rows, T, HAS_RESET, HAS_MASK)
        k, v, used, _ = _tile_inputs(key, value, b, t0 + rows, T, C, channels, live, real)
        nums, dens, tops = _absorb(
            nums, dens, tops, tl.where(used, w[None, :], 0.0), v, tl.where(used, 1.0, 0.0), k
        )
        num, den, top = _row(nums, rows, L - 1), _row(dens, rows, L - 1), _row(tops, rows, L - 1)
    tl.debug_barrier()

    # Backwards: the adjoint of the sums after the last step of the tile is carried.
    carry_num = tl.load(grad_final + (b * 3 + 0) * C + channels, mask=live, other=0.0)
    carry_den = tl.load(grad_final + (b * 3 + 1) * C + channels, mask=live, other=0.0)
    carry_top = -top
    sum_decay = tl.zeros((BLOCK,), tl.float32)
    sum_first = tl.zeros((BLOCK,), tl.float32)
    for back in range(tiles):
        tile = tiles - 1 - back
        t0 = tile * L
        t = t0 + rows
        place = starts + ((b * tiles + tile) * 3) * C + channels
        num = tl.load(place, mask=live, other=0.0)
        den = tl.load(place + C, mask=live, other=0.0)
        top = tl.load(place + 2 * C, mask=live, other=_EMPTY)
        nums, dens, tops = _sums_before(
            key, value, reset, mask, b, t0, T, C, channels, live, w, num, den, top, rows,
            HAS_RESET, HAS_MASK,
        )  # fmt: skip
        real, begins = marks(reset, mask, b, t, T, HAS_RESET, HAS_MASK)
        k, v, used, offsets = _tile_inputs(key, value, b, t, T, C, channels, live, real)
        g = tl.load(grad_output + offsets, mask=used, other=0.0).to(tl.float32)
        past, now, y, scale, grad_num, grad_den = _output_gradients(nums, dens, tops, k, v, g, u)

        # Row j of the reverse scan holds what token t + 1 tells the sums after token t; the
        # last row holds what the next tile tells.
        step = tl.where(used, w[None, :], 0.0)
        after_nums, after_dens, after_tops = _absorb(
            nums, dens, tops, step, v, tl.where(used, 1.0, 0.0), k
        )
        next_real, next_begins = marks(reset, mask, b, t + 1, T, HAS_RESET, HAS_MASK)
        next_k, next_v, next_used, next_offsets = _tile_inputs(
            key, value, b, t + 1, T, C, channels, live, next_real
        )
        next_g = tl.load(grad_output + next_offsets, mask=next_used, other=0.0).to(tl.float32)
        cut = next_begins[:, None]
        after_nums = tl.where(cut, 0.0, after_nums)
        after_dens = tl.where(cut, 0.0, after_dens)
        after_tops = tl.where(cut, _EMPTY, after_tops)
        _, _, _, next_scale, next_num, next_den = _output_gradients(
            after_nums, after_dens, after_tops, next_k, next_v, next_g, u
        )
        last = (rows == L - 1)[:, None]
        tells = next_used & (~cut)
        adjoint_decay = tl.where(next_used, w[None, :], 0.0)
        adjoint_decay = tl.where(cut, _FORGET, adjoint_decay)
        adjoint_num = tl.where(last, carry_num[None, :], tl.where(tells, next_num, 0.0))
        adjoint_den = tl.where(last, carry_den[None, :], tl.where(tells, next_den, 0.0))
        adjoint_top = tl.where(
            last, carry_top[None, :], tl.where(tells, u[None, :] - next_scale, _EMPTY)
        )
        _, adjoint_num, adjoint_den, adjoint_top = tl.associative_scan(
            (adjoint_decay, adjoint_num, adjoint_den, adjoint_top), 0, _combine, reverse=True
        )

        reach = tl.exp(tl.minimum(k + adjoint_top, 0.0))  # at most 1: see README.md
        inside = (t < T)[:, None] & live[None, :]
        dv = now * grad_num + reach * adjoint_num
        dk = now * grad_num * (v - y) + reach * (adjoint_num * v + adjoint_den)
        tl.store(grad_value + offsets, tl.where(used, dv, 0.0), mask=inside)
        tl.store(grad_key + offsets, tl.where(used, dk, 0.0), mask=inside)
        du = past * (nums * grad_num + dens * grad_den)
        sum_first += tl.sum(tl.where(used, du, 0.0), axis=0)
        kept = tl.exp(tl.minimum(w[None, :] + tops + adjoint_top, 0.0))
        dw = kept * (nums * adjoint_num + dens * adjoint_den)
        sum_decay += tl.sum(tl.where(used, dw, 0.0), axis=0)

        # What the tile's first step tells the sums before it.
        before_num, before_den, before_top = _absorb(
            adjoint_num, adjoint_den, adjoint_top, step,
            tl.where(used, grad_num, 0.0), tl.where(used, grad_den, 0.0),
            tl.where(used, u[None, :] - scale, _EMPTY),
        )  # fmt: skip
        forgets = begins[:, None]
        carry_num = _row(tl.where(forgets, 0.0, before_num), rows, 0)
        carry_den = _row(tl.where(forgets, 0.0, before_den), rows, 0)
        carry_top = _row(tl.where(forgets, _EMPTY, before_top), rows, 0)

    reach = tl.exp(tl.minimum(top0 + carry_top, 0.0))
    dnum, dden = reach * carry_num, reach * carry_den
    tl.store(grad_start + (b * 3 + 0) * C + channels, dnum, mask=live)
    tl.store(grad_start + (b * 3 + 1) * C + channels, dden, mask=live)
    tl.store(grad_start + (b * 3 + 2) * C + channels, num0 * dnum + den0 * dden, mask=live)
    tl.store(grad_decay + b * C + channels, sum_decay, mask=live)
    tl.store(grad_first + b * C + channels, sum_first, mask=live)


def _grid(B: int, C: int) -> Callable[[dict[str, int]], tuple[int, int]]:
    return lambda settings: (B, triton.cdiv(C, settings["BLOCK"]))


def wkv_triton(
    key: Tensor,
    value: Tensor,
    time_decay: Tensor,
    time_first: Tensor,
    state: Tensor,
    reset: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Computes `i3lm.ops.wkv` on a GPU; same arguments and results as `wkv_reference`."""
    B, _, C = key.shape
    output = key.new_empty(key.shape)
    final = state.clone(memory_format=torch.contiguous_format)
    if key.numel():
        time_decay = time_decay.clamp_min(FASTEST_DECAY)
        inputs = as_read(key, key, value, time_decay, time_first, state, reset, mask)
        _forward_kernel[_grid(B, C)](
            *inputs, output, final, **problem_size(key), **flags(reset, mask)
        )
    return output, final


def wkv_triton_backward(
    grad_output: Tensor,
    grad_state: Tensor,
    key: Tensor,
    value: Tensor,
    time_decay: Tensor,
    time_first: Tensor,
    state: Tensor,
    reset: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, ...]:
    """The gradients of key, value, time_decay, time_first and state; sums are recomputed."""
    B, T, C = key.shape
    grad_key, grad_value = key.new_empty(key.shape), key.new_empty(key.shape)
    grad_decay, grad_first = state.new_zeros(B, C), state.new_zeros(B, C)
    grad_start = grad_state.clone(memory_format=torch.contiguous_format)
    if key.numel():
        starts = state.new_empty(B, triton.cdiv(T, SHORTEST_TILE), 3, C)  # of tiles
        time_decay = time_decay.clamp_min(FASTEST_DECAY)
        inputs = as_read(
            key, key, value, time_decay, time_first, state, reset, mask, grad_output, grad_state
        )
        results = (grad_key, grad_value, grad_decay, grad_first, grad_start)
        _backward_kernel[_grid(B, C)](
            *inputs, starts, *results, **problem_size(key), **flags(reset, mask)
        )
    return grad_key, grad_value, grad_decay.sum(0), grad_first.sum(0), grad_start
