"""The hybrid mixer's recurrence for GPUs, in Triton.

The running average goes in tiles of `L` steps and `BLOCK` channels, each one associative scan of
``h -> m h + x`` maps. The hidden state is small: a program per row of the batch keeps it, and its
matrix, in registers and walks over time. The large matrices around both stay matrix products. The
backward pass recomputes all states.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from i3lm.ops.triton_bridge import SHORTEST_TILE, as_read, flags, marks, problem_size, tuned


@triton.jit
def _then(factor1, sum1, factor2, sum2):
    """The map ``h -> factor h + sum`` of two neighbouring stretches of time."""
    return factor1 * factor2, sum1 * factor2 + sum2


@triton.jit
def _averages(
    x, reset, mask, b, t, T, C, channels, live, mix, carried,
    HAS_RESET: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """The running average after every step of a tile (L, BLOCK), the inputs, and what is real."""
    real, begins = marks(reset, mask, b, t, T, HAS_RESET, HAS_MASK)
    used = real[:, None] & live[None, :]
    offsets = (b * T + t)[:, None] * C + channels[None, :]
    inputs = tl.load(x + offsets, mask=used, other=0.0).to(tl.float32)
    factor = tl.where(used, mix[None, :], 1.0)
    factor = tl.where(begins[:, None], 0.0, factor)
    added = tl.where(used, (1.0 - mix)[None, :] * inputs, 0.0)
    factor, added = tl.associative_scan((factor, added), 0, _then)
    return factor * carried[None, :] + added, inputs, used, begins, offsets


@tuned(restore=["y"])
def _average_forward_kernel(
    x, mix, D, start, reset, mask, y, final, T, C, near_B, near_T,
    HAS_RESET: tl.constexpr, HAS_MASK: tl.constexpr, L: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = channels < C
    rows = tl.arange(0, L)
    m = tl.load(mix + channels, mask=live, other=0.0)
    d = tl.load(D + channels, mask=live, other=0.0)
    carried = tl.load(start + b * C + channels, mask=live, other=0.0)
    for t0 in range(0, T, L):
        h, _, used, _, offsets = _averages(
            x, reset, mask, b, t0 + rows, T, C, channels, live, m, carried, HAS_RESET, HAS_MASK
        )
        inside = ((t0 + rows) < T)[:, None] & live[None, :]
        read = tl.load(y + offsets, mask=inside, other=0.0)
        tl.store(y + offsets, tl.where(used, read + d[None, :] * h, 0.0), mask=inside)
        carried = tl.sum(tl.where(rows[:, None] == L - 1, h, 0.0), axis=0)
    tl.store(final + b * C + channels, carried, mask=live)


@tuned(restore=["grad_x"])
def _average_backward_kernel(
    x, mix, D, start, reset, mask, grad_y, grad_final, starts,
    grad_x, grad_mix, grad_D, grad_start, T, C, near_B, near_T,
    HAS_RESET: tl.constexpr, HAS_MASK: tl.constexpr, L: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = channels < C
    rows = tl.arange(0, L)
    m = tl.load(mix + channels, mask=live, other=0.0)
    d = tl.load(D + channels, mask=live, other=0.0)
    carried = tl.load(start + b * C + channels, mask=live, other=0.0)
    tiles = tl.cdiv(T, L)
    for tile in range(tiles):
        tl.store(starts + (b * tiles + tile) * C + channels, carried, mask=live)
        h, _, _, _, _ = _averages(
            x, reset, mask, b, tile * L + rows, T, C, channels, live, m, carried,
            HAS_RESET, HAS_MASK,
        )  # fmt: skip
        carried = tl.sum(tl.where(rows[:, None] == L - 1, h, 0.0), axis=0)
    tl.debug_barrier()

    adjoint = tl.load(grad_final + b * C + channels, mask=live, other=0.0)
    sum_mix = tl.zeros((BLOCK,), tl.float32)
    sum_D = tl.zeros((BLOCK,), tl.float32)
    for back in range(tiles):
        tile = tiles - 1 - back
        t = tile * L + rows
        carried = tl.load(starts + (b * tiles + tile) * C + channels, mask=live, other=0.0)
        h, inputs, used, begins, offsets = _averages(
            x, reset, mask, b, t, T, C, channels, live, m, carried, HAS_RESET, HAS_MASK
        )
        g = tl.load(grad_y + offsets, mask=used, other=0.0).to(tl.float32)
        # dL/dh_t = D g_t + factor_{t+1} dL/dh_{t+1}; the factor of the tile's last row is in what
        # the next tile handed over already.
        next_real, next_begins = marks(reset, mask, b, t + 1, T, HAS_RESET, HAS_MASK)
        factor = tl.where(next_real[:, None] & live[None, :], m[None, :], 1.0)
        factor = tl.where(next_begins[:, None], 0.0, factor)
        factor = tl.where(rows[:, None] == L - 1, 1.0, factor)
        factor, added = tl.associative_scan((factor, d[None, :] * g), 0, _then, reverse=True)
        adjoints = factor * adjoint[None, :] + added
        read = tl.load(grad_x + offsets, mask=used, other=0.0)
        tl.store(grad_x + offsets, read + (1.0 - m)[None, :] * adjoints, mask=used)
        # Where mix is not 0, the average before the step follows from the one after it; it is
        # found from the step's own tile instead, so that any mix will do.
        before = _average_before(
            x, reset, mask, b, t, T, C, channels, live, m, carried, rows, HAS_RESET, HAS_MASK
        )
        sum_mix += tl.sum(tl.where(used, adjoints * (before - inputs), 0.0), axis=0)
        sum_D += tl.sum(tl.where(used, g * h, 0.0), axis=0)
        first = tl.where(used, m[None, :] * adjoints, adjoints)
        first = tl.where(begins[:, None], 0.0, first)
        adjoint = tl.sum(tl.where(rows[:, None] == 0, first, 0.0), axis=0)
    tl.store(grad_mix + b * C + channels, sum_mix, mask=live)
    tl.store(grad_D + b * C + channels, sum_D, mask=live)
    tl.store(grad_start + b * C + channels, adjoint, mask=live)


@triton.jit
def _average_before(
    x, reset, mask, b, t, T, C, channels, live, mix, carried, rows,
    HAS_RESET: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """The running average that every step of a tile sees: the scan of the elements one earlier."""
    real, begins = marks(reset, mask, b, t - 1, T, HAS_RESET, HAS_MASK)
    later = rows > 0
    used = (real & later)[:, None] & live[None, :]
    offsets = (b * T + t - 1)[:, None] * C + channels[None, :]
    inputs = tl.load(x + offsets, mask=used, other=0.0).to(tl.float32)
    factor = tl.where(used, mix[None, :], 1.0)
    factor = tl.where((begins & later)[:, None], 0.0, factor)
    added = tl.where(used, (1.0 - mix)[None, :] * inputs, 0.0)
    factor, added = tl.associative_scan((factor, added), 0, _then)
    h = factor * carried[None, :] + added
    _, starts = marks(reset, mask, b, t, T, HAS_RESET, HAS_MASK)
    return tl.where(starts[:, None], 0.0, h)


@triton.jit
def _hidden_forward_kernel(
    u, A, start, reset, mask, before, states, final, T, N,
    HAS_RESET: tl.constexpr, HAS_MASK: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, SIZE)
    live = i < N
    square = live[:, None] & live[None, :]
    matrix = tl.load(A + i[:, None] * N + i[None, :], mask=square, other=0.0)
    s = tl.load(start + b * N + i, mask=live, other=0.0)
    for t in range(T):
        place = (b * T + t) * N + i
        if HAS_RESET:
            s = tl.where(tl.load(reset + b * T + t) != 0, 0.0, s)
        tl.store(before + place, s, mask=live)
        moved = tl.sum(matrix * s[None, :], axis=1) + tl.load(u + place, mask=live, other=0.0)
        if HAS_MASK:
            moved = tl.where(tl.load(mask + b * T + t) != 0, moved, s)
        s = moved
        tl.store(states + place, s, mask=live)
    tl.store(final + b * N + i, s, mask=live)


@triton.jit
def _hidden_backward_kernel(
    grad_states, A, reset, mask, grad_final, adjoints, grad_start, T, N,
    HAS_RESET: tl.constexpr, HAS_MASK: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, SIZE)
    live = i < N
    square = live[:, None] & live[None, :]
    matrix = tl.load(A + i[:, None] * N + i[None, :], mask=square, other=0.0)
    adjoint = tl.load(grad_final + b * N + i, mask=live, other=0.0)
    for back in range(T):
        t = T - 1 - back
        place = (b * T + t) * N + i
        added = adjoint + tl.load(grad_states + place, mask=live, other=0.0)
        moved = tl.sum(matrix * added[:, None], axis=0)
        told = added
        if HAS_MASK:
            is_real = tl.load(mask + b * T + t) != 0
            moved = tl.where(is_real, moved, adjoint)
            told = tl.where(is_real, told, 0.0)
        tl.store(adjoints + place, told, mask=live)
        adjoint = moved
        if HAS_RESET:
            adjoint = tl.where(tl.load(reset + b * T + t) != 0, 0.0, adjoint)
    tl.store(grad_start + b * N + i, adjoint, mask=live)


def _grid(B: int, C: int) -> Callable[[dict[str, int]], tuple[int, int]]:
    return lambda settings: (B, triton.cdiv(C, settings["BLOCK"]))


def _hidden_states(x, A, B, hidden, reset, mask) -> tuple[Tensor, Tensor, Tensor]:
    """s_{t-1} as each step finds it, s_t (both (B, T, N)), and the last s (B, N)."""
    batch, T, _ = x.shape
    N = A.shape[0]
    u = x @ B.T
    before, states, last = u.new_empty(u.shape), u.new_empty(u.shape), torch.empty_like(hidden)
    inputs = as_read(u, u, A, hidden, reset, mask)
    size = triton.next_power_of_2(N)
    _hidden_forward_kernel[(batch,)](
        *inputs, before, states, last, T, N, SIZE=size, **flags(reset, mask)
    )
    return before, states, last


def state_space_triton(
    x: Tensor,
    mix: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    state: Tensor,
    reset: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Computes `i3lm.ops.state_space` on a GPU; as `state_space_reference` in the rest."""
    batch, _, channels = x.shape
    if not x.numel():
        return torch.zeros_like(x), state.clone()
    average, hidden = (p.contiguous() for p in state.split([channels, A.shape[0]], dim=1))
    _, states, last_hidden = _hidden_states(x, A, B, hidden, reset, mask)
    y, last_average = (states @ C.T).contiguous(), torch.empty_like(average)
    inputs = as_read(x, x, mix, D, average, reset, mask)
    _average_forward_kernel[_grid(batch, channels)](
        *inputs, y, last_average, **problem_size(x), **flags(reset, mask)
    )
    return y, torch.cat([last_average, last_hidden], dim=1)


def state_space_triton_backward(
    grad_output: Tensor,
    grad_state: Tensor,
    x: Tensor,
    mix: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    state: Tensor,
    reset: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, ...]:
    """The gradients of x, mix, A, B, C, D and state; states are recomputed."""
    batch, T, channels = x.shape
    if not x.numel():
        return (*(torch.zeros_like(p) for p in (x, mix, A, B, C, D)), grad_state.clone())
    N = A.shape[0]
    average, hidden = (p.contiguous() for p in state.split([channels, N], dim=1))
    grad_average, grad_hidden = (p.contiguous() for p in grad_state.split([channels, N], dim=1))
    if mask is not None:
        grad_output = grad_output.masked_fill(~mask[..., None], 0)
    grad_output = grad_output.contiguous()

    before, states, _ = _hidden_states(x, A, B, hidden, reset, mask)
    grad_states = grad_output @ C
    adjoints, start_hidden = torch.empty_like(states), torch.empty_like(hidden)
    inputs = as_read(x, grad_states, A, reset, mask, grad_hidden)
    size = triton.next_power_of_2(N)
    _hidden_backward_kernel[(batch,)](
        *inputs, adjoints, start_hidden, T, N, SIZE=size, **flags(reset, mask)
    )

    grad_x, start_average = (adjoints @ B).contiguous(), torch.empty_like(average)
    grad_mix, grad_D = torch.empty_like(average), torch.empty_like(average)
    inputs = as_read(x, x, mix, D, average, reset, mask, grad_output, grad_average)
    starts = x.new_empty(batch, triton.cdiv(T, SHORTEST_TILE), channels)  # of tiles
    _average_backward_kernel[_grid(batch, channels)](
        *inputs, starts, grad_x, grad_mix, grad_D, start_average,
        **problem_size(x), **flags(reset, mask),
    )  # fmt: skip
    flat = adjoints.flatten(0, 1)
    return (
        grad_x,
        grad_mix.sum(0),
        flat.T @ before.flatten(0, 1),
        flat.T @ x.flatten(0, 1),
        grad_output.flatten(0, 1).T @ states.flatten(0, 1),
        grad_D.sum(0),
        torch.cat([start_average, start_hidden], dim=1),
    )
