"""The hybrid mixer's recurrence in about 2 * sqrt(T) tensor steps, on any device.

Both of its parts are linear with constant coefficients, ``h_t = F h_{t-1} + u_t``, with F a
diagonal (the running average) or a small matrix (the hidden state). Time is cut into chunks: one
sweep over all chunks at once gives each chunk's total, a short loop carries the totals forward
with the powers of F, and a second sweep starts every chunk from its true state. The gradient of
such a recurrence is the same recurrence with F transposed, in reverse time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from i3lm.ops.chunks import chunk_length, join_chunks, next_step_mark, split_chunks


def _apply(F: Tensor, h: Tensor) -> Tensor:
    """``F h`` for vectors in the last dimension; a 1-D F is a diagonal."""
    return F * h if F.dim() == 1 else h @ F.T


def _powers(F: Tensor, highest: int) -> Tensor:
    """F^0 ... F^highest, shape (highest + 1, *F.shape)."""
    power = torch.ones_like(F) if F.dim() == 1 else torch.eye(F.shape[0]).to(F)
    powers = [power]
    for _ in range(highest):
        power = F * power if F.dim() == 1 else F @ power
        powers.append(power)
    return torch.stack(powers)


def _recur(F: Tensor, u: Tensor, h: Tensor, reset: Tensor | None, mask: Tensor | None) -> Tensor:
    """Gives the state after every step, (B, T, K).

    Where `mask` is False, F is left out: ``h_t = h_{t-1} + u_t``. Where `reset` is True,
    ``h_{t-1}`` counts as zero.
    """
    T = u.shape[1]
    L = chunk_length(T)
    u = split_chunks(u, L)  # (B, n, L, K)
    moves = None if mask is None else split_chunks(mask, L)[..., None]
    starts = None if reset is None else split_chunks(reset, L)[..., None]

    def sweep(h: Tensor, keep: list[Tensor] | None) -> Tensor:
        for j in range(L):
            if starts is not None:
                h = h.masked_fill(starts[:, :, j], 0)
            moved = _apply(F, h)
            h = (moved if moves is None else torch.where(moves[:, :, j], moved, h)) + u[:, :, j]
            if keep is not None:
                keep.append(h)
        return h

    totals = sweep(torch.zeros_like(u[:, :, 0]), None)  # (B, n, K)
    powers = _powers(F, L)
    carried = []
    for c in range(u.shape[1]):
        carried.append(h)
        if starts is not None:
            h = h.masked_fill(starts[:, c].any(dim=1), 0)
        if moves is None:
            h = _apply(powers[L], h)
        else:
            power = powers[moves[:, c, :, 0].sum(dim=1)]  # (B, *F.shape): one power per row
            h = power * h if F.dim() == 1 else torch.einsum("bij,bj->bi", power, h)
        h = h + totals[:, c]
    kept: list[Tensor] = []
    sweep(torch.stack(carried, dim=1), kept)
    return join_chunks(torch.stack(kept, dim=2), T)


def _recur_backward(
    F: Tensor,
    grad_states: Tensor,
    states: Tensor,
    h: Tensor,
    reset: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of F, u and h, given those of `states`, the result of `_recur`."""
    Ft = F if F.dim() == 1 else F.T.contiguous()
    zero = torch.zeros_like(h)
    marks = next_step_mark(reset), next_step_mark(mask)
    adjoint = _recur(Ft, grad_states.flip(1), zero, *marks).flip(1)  # dL/dh_t, (B, T, K)
    moved = adjoint if mask is None else adjoint.masked_fill(~mask[..., None], 0)
    before = torch.cat([h.unsqueeze(1), states[:, :-1]], dim=1)
    grad_h = _apply(Ft, adjoint[:, 0])
    if mask is not None:
        grad_h = torch.where(mask[:, :1], grad_h, adjoint[:, 0])
    if reset is not None:
        before = before.masked_fill(reset[..., None], 0)
        grad_h = grad_h.masked_fill(reset[:, :1], 0)
    if F.dim() == 1:
        grad_F = (moved * before).sum(dim=(0, 1))
    else:
        grad_F = moved.flatten(0, 1).T @ before.flatten(0, 1)
    return grad_F, moved, grad_h


def _hide(mask: Tensor | None, x: Tensor) -> Tensor:
    """x (B, T, K) with padded steps set to zero."""
    return x if mask is None else x.masked_fill(~mask[..., None], 0)


def state_space_scan(
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
    """Computes `i3lm.ops.state_space` chunk by chunk; as `state_space_reference` in the rest."""
    if x.shape[1] == 0:
        return torch.zeros_like(x), state.clone()
    average, hidden = state.split([x.shape[2], A.shape[0]], dim=1)
    averages = _recur(mix, _hide(mask, (1 - mix) * x), average, reset, mask)
    hiddens = _recur(A, _hide(mask, x @ B.T), hidden, reset, mask)
    output = hiddens @ C.T + D * averages
    return _hide(mask, output), torch.cat([averages[:, -1], hiddens[:, -1]], dim=1)


def state_space_scan_backward(
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
    if x.shape[1] == 0:
        return (*(torch.zeros_like(y) for y in (x, mix, A, B, C, D)), grad_state.clone())
    sizes = [x.shape[2], A.shape[0]]
    average, hidden = state.split(sizes, dim=1)
    averages = _recur(mix, _hide(mask, (1 - mix) * x), average, reset, mask)
    hiddens = _recur(A, _hide(mask, x @ B.T), hidden, reset, mask)

    grad_output = _hide(mask, grad_output)
    grad_averages, grad_hiddens = D * grad_output, grad_output @ C
    grad_average, grad_hidden = grad_state.split(sizes, dim=1)
    grad_averages[:, -1] += grad_average
    grad_hiddens[:, -1] += grad_hidden
    grad_mix, moved, start_average = _recur_backward(
        mix, grad_averages, averages, average, reset, mask
    )
    grad_A, grad_u, start_hidden = _recur_backward(A, grad_hiddens, hiddens, hidden, reset, mask)
    return (
        (1 - mix) * moved + grad_u @ B,
        grad_mix - (moved * x).sum(dim=(0, 1)),
        grad_A,
        grad_u.flatten(0, 1).T @ x.flatten(0, 1),
        grad_output.flatten(0, 1).T @ hiddens.flatten(0, 1),
        (grad_output * averages).sum(dim=(0, 1)),
        torch.cat([start_average, start_hidden], dim=1),
    )
