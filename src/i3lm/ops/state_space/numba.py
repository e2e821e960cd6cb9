"""The hybrid mixer's recurrence for CPUs, compiled from Python by numba.

The running average goes channel by channel (one task per batch row and block of channels), the
hidden state row by row of the batch (a step is one small matrix times a vector). The large
matrices around them stay PyTorch's matrix products. The backward pass recomputes the running
average block by block and runs the adjoints in one sweep each.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import prange
from torch import Tensor

from i3lm.ops.numba_bridge import as_arrays, compiled, match_threads

_BLOCK = 128  # channels per task


@compiled()
def _average_forward(x, mix, D, start, reset, mask, y, final):
    """Adds ``D * h_t`` to y."""
    B, T, C = x.shape
    zero = x.dtype.type(0)
    blocks = (C + _BLOCK - 1) // _BLOCK
    for task in prange(B * blocks):
        b, low = task // blocks, (task % blocks) * _BLOCK
        width = min(_BLOCK, C - low)
        h = np.empty(_BLOCK, x.dtype)
        for i in range(width):
            h[i] = start[b, low + i]
        for t in range(T):
            if reset.size and reset[b, t]:
                h[:] = zero
            if mask.size and not mask[b, t]:
                for i in range(width):
                    y[b, t, low + i] = zero
                continue
            for i in range(width):
                c = low + i
                h[i] = mix[c] * (h[i] - x[b, t, c]) + x[b, t, c]
                y[b, t, c] += D[c] * h[i]
        for i in range(width):
            final[b, low + i] = h[i]


@compiled()
def _average_backward(
    x, mix, D, start, reset, mask, grad_y, grad_final, grad_x, grad_mix, grad_D, grad_start
):
    """Adds to grad_x; writes the rest."""
    B, T, C = x.shape
    zero = x.dtype.type(0)
    blocks = (C + _BLOCK - 1) // _BLOCK
    for task in prange(B * blocks):
        b, low = task // blocks, (task % blocks) * _BLOCK
        width = min(_BLOCK, C - low)
        before = np.empty((T, _BLOCK), x.dtype)  # h as each step finds it
        h, adjoint = np.empty(_BLOCK, x.dtype), np.empty(_BLOCK, x.dtype)
        sum_mix, sum_D = np.zeros(_BLOCK, x.dtype), np.zeros(_BLOCK, x.dtype)
        for i in range(width):
            h[i], adjoint[i] = start[b, low + i], grad_final[b, low + i]
        for t in range(T):
            if reset.size and reset[b, t]:
                h[:] = zero
            for i in range(width):
                before[t, i] = h[i]
            if not mask.size or mask[b, t]:
                for i in range(width):
                    c = low + i
                    h[i] = mix[c] * (h[i] - x[b, t, c]) + x[b, t, c]
        for step in range(T):
            t = T - 1 - step
            if not mask.size or mask[b, t]:
                for i in range(width):
                    c = low + i
                    now = mix[c] * (before[t, i] - x[b, t, c]) + x[b, t, c]
                    sum_D[i] += grad_y[b, t, c] * now
                    adjoint[i] += D[c] * grad_y[b, t, c]
                    sum_mix[i] += adjoint[i] * (before[t, i] - x[b, t, c])
                    grad_x[b, t, c] += adjoint[i] - mix[c] * adjoint[i]
                    adjoint[i] *= mix[c]
            if reset.size and reset[b, t]:
                adjoint[:] = zero
        for i in range(width):
            c = low + i
            grad_mix[b, c], grad_D[b, c], grad_start[b, c] = sum_mix[i], sum_D[i], adjoint[i]


@compiled()
def _hidden_forward(u, At, start, reset, mask, before, states, final):
    """``s_t = A s_{t-1} + u_t``; keeps s_{t-1} as the step finds it, and s_t."""
    B, T, N = u.shape
    zero = u.dtype.type(0)
    for b in prange(B):
        s, moved = np.empty(N, u.dtype), np.empty(N, u.dtype)
        for i in range(N):
            s[i] = start[b, i]
        for t in range(T):
            if reset.size and reset[b, t]:
                s[:] = zero
            for i in range(N):
                before[b, t, i] = s[i]
            if not mask.size or mask[b, t]:
                for i in range(N):
                    moved[i] = u[b, t, i]
                for j in range(N):
                    for i in range(N):
                        moved[i] += At[j, i] * s[j]
                s, moved = moved, s
            for i in range(N):
                states[b, t, i] = s[i]
        for i in range(N):
            final[b, i] = s[i]


@compiled()
def _hidden_backward(grad_states, A, reset, mask, grad_final, adjoints, grad_start):
    """The gradient of every ``A s_{t-1} + u_t``: zero at padded steps."""
    B, T, N = grad_states.shape
    zero = grad_states.dtype.type(0)
    for b in prange(B):
        adjoint, moved = np.empty(N, grad_states.dtype), np.empty(N, grad_states.dtype)
        for i in range(N):
            adjoint[i] = grad_final[b, i]
        for step in range(T):
            t = T - 1 - step
            if not mask.size or mask[b, t]:
                for i in range(N):
                    adjoint[i] += grad_states[b, t, i]
                    adjoints[b, t, i] = adjoint[i]
                    moved[i] = zero
                for j in range(N):
                    for i in range(N):
                        moved[i] += A[j, i] * adjoint[j]
                adjoint, moved = moved, adjoint
            else:
                for i in range(N):
                    adjoints[b, t, i] = zero
            if reset.size and reset[b, t]:
                adjoint[:] = zero
        for i in range(N):
            grad_start[b, i] = adjoint[i]


def _hidden_states(
    x: Tensor, A: Tensor, B: Tensor, hidden: Tensor, reset: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """s_{t-1} as each step finds it, s_t (both (B, T, N)), and the last s (B, N)."""
    u = x @ B.T
    before, states, last = torch.empty_like(u), torch.empty_like(u), hidden.new_empty(hidden.shape)
    _hidden_forward(*as_arrays(u, A.T, hidden, reset, mask, before, states, last))
    return before, states, last


def state_space_numba(
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
    """Computes `i3lm.ops.state_space` on the CPU; as `state_space_reference` in the rest."""
    average, hidden = state.split([x.shape[2], A.shape[0]], dim=1)
    last_average = average.new_empty(average.shape)
    match_threads()
    _, states, last_hidden = _hidden_states(x, A, B, hidden, reset, mask)
    y = states @ C.T
    _average_forward(*as_arrays(x, mix, D, average, reset, mask, y, last_average))
    return y, torch.cat([last_average, last_hidden], dim=1)


def state_space_numba_backward(
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
    sizes = [x.shape[2], A.shape[0]]
    average, hidden = state.split(sizes, dim=1)
    grad_average, grad_hidden = grad_state.split(sizes, dim=1)
    if mask is not None:
        grad_output = grad_output.masked_fill(~mask[..., None], 0)
    match_threads()
    before, states, _ = _hidden_states(x, A, B, hidden, reset, mask)
    adjoints, start_hidden = torch.empty_like(states), hidden.new_empty(hidden.shape)
    _hidden_backward(
        *as_arrays(grad_output @ C, A, reset, mask, grad_hidden, adjoints, start_hidden)
    )
    grad_x, start_average = adjoints @ B, average.new_empty(average.shape)
    grad_mix, grad_D = (x.new_empty(x.shape[0], x.shape[2]) for _ in range(2))
    inputs = (x, mix, D, average, reset, mask, grad_output, grad_average)
    _average_backward(*as_arrays(*inputs, grad_x, grad_mix, grad_D, start_average))
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
