"""The RWKV-4 recurrence in about 2 * sqrt(T) tensor steps, on any device.

Time is cut into chunks. A first sweep runs all chunks at once from empty states and keeps each
chunk's total; a short loop carries the totals from chunk to chunk; a second sweep runs all chunks
at once again, now from their true states. The backward pass is the same scan in reverse time: see
README.md beside this file for the derivation.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from i3lm.ops.chunks import chunk_length, join_chunks, next_step_mark, split_chunks
from i3lm.ops.wkv.reference import EMPTY_EXPONENT, FASTEST_DECAY


class _Sums(NamedTuple):
    """Two decayed sums that share a scale: ``num * e^largest`` and ``den * e^largest``."""

    num: Tensor
    den: Tensor
    largest: Tensor

    def cleared(self, where: Tensor) -> _Sums:
        """Empty sums where the mask is True."""
        return _Sums(
            self.num.masked_fill(where, 0),
            self.den.masked_fill(where, 0),
            self.largest.masked_fill(where, EMPTY_EXPONENT),
        )

    def absorb(self, decay: Tensor, num: Tensor, den: Tensor, exponent: Tensor) -> _Sums:
        """``self * e^decay + (num, den) * e^exponent``."""
        decayed = self.largest + decay
        scale = torch.maximum(decayed, exponent)
        past, now = torch.exp(decayed - scale), torch.exp(exponent - scale)
        return _Sums(
            torch.addcmul(past * self.num, now, num),
            torch.addcmul(past * self.den, now, den),
            scale,
        )


def _sums_before(
    steps: _Sums, time_decay: Tensor, sums: _Sums, reset: Tensor | None, mask: Tensor | None
) -> _Sums:
    """Gives, at every step, the decayed sums of all steps before it, each (B, T, C).

    Args:
        steps: What each step adds: ``(num, den) * e^largest``, each (B, T, C); nothing
            (`EMPTY_EXPONENT`) at padded steps.
        time_decay: Log decay per step, (C,).
        sums: The sums before the first step, each (B, C).
        reset: Where earlier sums are dropped, bool, (B, T).
        mask: Where the sums decay, bool, (B, T); None means everywhere.
    """
    T = steps.num.shape[1]
    L = chunk_length(T)
    num, den = split_chunks(steps.num, L), split_chunks(steps.den, L)  # (B, n, L, C)
    exponent = split_chunks(steps.largest, L, fill=EMPTY_EXPONENT)
    starts = None if reset is None else split_chunks(reset, L)[..., None]
    moves = None if mask is None else split_chunks(mask, L)[..., None]

    def sweep(sums: _Sums, keep: list[_Sums] | None) -> _Sums:
        for j in range(L):
            if starts is not None:
                sums = sums.cleared(starts[:, :, j])
            if keep is not None:
                keep.append(sums)
            decay = time_decay if moves is None else time_decay * moves[:, :, j]
            sums = sums.absorb(decay, num[:, :, j], den[:, :, j], exponent[:, :, j])
        return sums

    empty = torch.zeros_like(num[:, :, 0])
    totals = sweep(_Sums(empty, empty, torch.full_like(empty, EMPTY_EXPONENT)), None)
    carried = []
    for c in range(num.shape[1]):
        carried.append(sums)
        if starts is not None:
            sums = sums.cleared(starts[:, c].any(dim=1))
        decay = time_decay * (L if moves is None else moves[:, c].sum(dim=1))
        sums = sums.absorb(decay, *(part[:, c] for part in totals))

    kept: list[_Sums] = []
    sweep(_Sums(*(torch.stack(parts, dim=1) for parts in zip(*carried, strict=True))), kept)
    parts = (torch.stack(part, dim=2) for part in zip(*kept, strict=True))
    return _Sums(*(join_chunks(part, T) for part in parts))


class _Forward(NamedTuple):
    """What a forward pass computes on its way, each (B, T, C)."""

    before: _Sums  # the sums of the history
    past: Tensor  # weight of the history, times e^-scale
    now: Tensor  # weight of the current token, times e^-scale
    scale: Tensor
    denominator: Tensor
    output: Tensor


def _run_forward(key, value, time_decay, time_first, state, reset, mask) -> _Forward:
    """The forward pass; padded steps must already have key `EMPTY_EXPONENT` and value 0."""
    steps = _Sums(value, _counts(value, mask), key)
    before = _sums_before(steps, time_decay, _Sums(*state.unbind(1)), reset, mask)
    history = time_first + before.largest
    scale = torch.maximum(history, key)
    past, now = torch.exp(history - scale), torch.exp(key - scale)
    denominator = past * before.den + now
    output = (past * before.num + now * value) / denominator
    return _Forward(before, past, now, scale, denominator, output)


def _counts(value: Tensor, mask: Tensor | None) -> Tensor:
    """What each step adds to the denominator: 1, or 0 if it is padded, (B, T, C)."""
    ones = value.new_ones(()) if mask is None else mask[..., None].to(value.dtype)
    return ones.expand_as(value)


def _decay_at(time_decay: Tensor, mask: Tensor | None, t: int) -> Tensor:
    """The log decay that step t applies: none if it is padded, (C,) or (B, C)."""
    return time_decay if mask is None else time_decay * mask[:, t, None]


def _hide(mask: Tensor | None, fill: float, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors (B, T, C) with padded steps set to `fill`."""
    if mask is None:
        return tensors
    padded = ~mask[..., None]
    return tuple(tensor.masked_fill(padded, fill) for tensor in tensors)


def wkv_scan(
    key: Tensor,
    value: Tensor,
    time_decay: Tensor,
    time_first: Tensor,
    state: Tensor,
    reset: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Computes `i3lm.ops.wkv` chunk by chunk; same arguments and results as `wkv_reference`."""
    if key.shape[1] == 0:
        return torch.zeros_like(value), state.clone()
    time_decay = time_decay.clamp_min(FASTEST_DECAY)
    key, value = _hide(mask, EMPTY_EXPONENT, key)[0], _hide(mask, 0, value)[0]
    run = _run_forward(key, value, time_decay, time_first, state, reset, mask)
    last = _Sums(*(part[:, -1] for part in run.before))
    decay = _decay_at(time_decay, mask, -1)
    final = last.absorb(decay, value[:, -1], _counts(value, mask)[:, -1], key[:, -1])
    return _hide(mask, 0, run.output)[0], torch.stack(final, dim=1)


def wkv_scan_backward(
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
    """The gradients of key, value, time_decay, time_first and state; states are recomputed."""
    if key.shape[1] == 0:
        zeros = [torch.zeros_like(x) for x in (key, value, time_decay, time_first)]
        return (*zeros, grad_state.clone())
    time_decay = time_decay.clamp_min(FASTEST_DECAY)
    key, value = _hide(mask, EMPTY_EXPONENT, key)[0], _hide(mask, 0, value)[0]
    run = _run_forward(key, value, time_decay, time_first, state, reset, mask)
    before = run.before

    # Gradients of the two sums that make the output, times e^scale.
    (grad_num,) = _hide(mask, 0, grad_output / run.denominator)
    grad_den = -grad_num * run.output

    # In reverse time, the adjoint of the sums obeys the recurrence of the sums. Its first entry
    # belongs to the state after the last step.
    (exponent,) = _hide(mask, EMPTY_EXPONENT, time_first - run.scale)
    decayed = before.largest[:, -1] + _decay_at(time_decay, mask, -1)
    final_scale = torch.maximum(decayed, key[:, -1])
    after = _sums_before(
        _Sums(grad_num.flip(1), grad_den.flip(1), exponent.flip(1)),
        time_decay,
        _Sums(grad_state[:, 0], grad_state[:, 1], -final_scale),
        next_step_mark(reset),
        None if mask is None else mask.flip(1),
    )
    after = _Sums(*(part.flip(1) for part in after))

    reach = torch.exp(key + after.largest)  # at most 1: see README.md
    grad_value = run.now * grad_num + reach * after.num
    grad_key = run.now * grad_num * (value - run.output) + reach * (after.num * value + after.den)
    grad_value, grad_key = _hide(mask, 0, grad_value, grad_key)
    grad_first = run.past * (before.num * grad_num + before.den * grad_den)
    kept = torch.exp(time_decay + before.largest + after.largest)
    (grad_decay,) = _hide(mask, 0, kept * (before.num * after.num + before.den * after.den))

    first = _Sums(*(part[:, 0] for part in after)).absorb(
        _decay_at(time_decay, mask, 0), grad_num[:, 0], grad_den[:, 0], exponent[:, 0]
    )
    if reset is not None:
        first = first.cleared(reset[:, :1])
    reach = torch.exp(state[:, 2] + first.largest)
    state_num, state_den = reach * first.num, reach * first.den
    state_max = state[:, 0] * state_num + state[:, 1] * state_den
    return (
        grad_key,
        grad_value,
        grad_decay.sum(dim=(0, 1)),
        grad_first.sum(dim=(0, 1)),
        torch.stack([state_num, state_den, state_max], dim=1),
    )
