"""The previous token's vector at every position, and the mixes of it with the token's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from i3lm.ops.dispatch import (
    Implementation,
    Op,
    full_precision,
    numba_refuses_bits,
    product_dtype,
    runs_directly,
)


def token_shift(
    inputs: Tensor,
    state: Tensor | None = None,
    *,
    reset: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gives each position the vector of the real token before it.

    ``shifted_t = inputs_{t-1}``, with ``inputs_{-1}`` taken from ``state`` (zero when None).
    RWKV (arXiv:2305.13048, section 3.1.1) calls this token shift.

    Args:
        inputs: Vectors of the tokens, shape (B, T, C).
        state: The vector of the last real token seen before, shape (B, C).
        reset: Document starts, bool, shape (B, T), at real tokens; such a token sees zero before
            it.
        mask: True at real tokens, bool, shape (B, T). A padded token is never anyone's
            previous token.

    Returns:
        The shifted vectors, shape (B, T, C), and the state after the last token, shape (B, C).
    """
    B, T, C = inputs.shape
    reset, mask = _as_marks(reset, mask)
    before = inputs.new_zeros(B, 1, C) if state is None else state.to(inputs.dtype).unsqueeze(1)
    if mask is None and reset is None and T == 1:  # a step of decoding
        return before, inputs[:, 0]
    with full_precision(inputs.device):  # autocast to bfloat16 concatenates no float16
        history = torch.cat([before, inputs], dim=1)  # (B, T + 1, C): history[:, t] precedes t
    if mask is None:
        shifted, last = history[:, :-1], history[:, -1]
    else:
        # For every position, where in `history` the last real token at or before it stands.
        places = torch.arange(1, T + 1, device=inputs.device).expand(B, T)
        latest = torch.where(mask, places, 0).cummax(dim=1).values
        latest = torch.cat([latest.new_zeros(B, 1), latest], dim=1)  # (B, T + 1)
        seen = history.gather(1, latest.unsqueeze(-1).expand(B, T + 1, C))
        shifted, last = seen[:, :-1], seen[:, -1]
    if reset is not None:
        shifted = shifted.masked_fill(reset.unsqueeze(-1), 0)
    return shifted, last


def _as_marks(*marks: Tensor | None) -> Iterator[Tensor | None]:
    return (None if mark is None else mark.bool() for mark in marks)


def _torch(
    x: Tensor,
    shares: Sequence[Tensor],
    state: Tensor | None,
    reset: Tensor | None,
    mask: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """The mixes of `token_shift_mix`, in a dtype, and the state after the last token."""
    previous, last = token_shift(x, state, reset=reset, mask=mask)
    mixes = (torch.lerp(previous, x, share.to(x.dtype)).to(dtype) for share in shares)
    return *mixes, last


def _numba(*inputs: Any) -> tuple[Tensor, ...]:
    from i3lm.ops.token_shift.numba import token_shift_mix_numba

    return token_shift_mix_numba(*inputs)


def _numba_backward(*inputs: Any) -> tuple[Any, ...]:
    from i3lm.ops.token_shift.numba import token_shift_mix_numba_backward

    return token_shift_mix_numba_backward(*inputs)


TOKEN_SHIFT_MIX = Op(
    "token_shift_mix",
    [
        Implementation("numba", _numba, _numba_backward, numba_refuses_bits),
        Implementation("torch", _torch),
    ],
)


class _TokenShiftMix(torch.autograd.Function):
    @staticmethod
    def forward(ctx, implementation, x, state, reset, mask, dtype, *shares):
        ctx.implementation = implementation
        ctx.save_for_backward(x, state, reset, mask, *shares)
        return implementation.forward(x, shares, state, reset, mask, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        x, state, reset, mask, *shares = ctx.saved_tensors
        *grad_mixes, grad_last = grads
        grad_x, grad_shares, grad_state = ctx.implementation.backward(
            grad_mixes, grad_last, x, shares, state, reset, mask
        )
        return None, grad_x, grad_state, None, None, None, *grad_shares


def token_shift_mix(
    x: Tensor,
    shares: Sequence[Tensor],
    state: Tensor | None = None,
    *,
    reset: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Mixes each token's vector with the one before it: ``x m + x' (1 - m)`` for every m.

    ``x'`` is `token_shift` of x. RWKV (arXiv:2305.13048, equations 11-13 and 16-17) feeds its
    projections so; hence the mixes come in the dtype in which a product of x runs, which is
    autocast's where that is on. They are computed in float32 (float64 for float64 inputs) and
    rounded once.

    Args:
        x: Vectors of the tokens, shape (B, T, C).
        shares: The vectors m, each of shape (C,).
        state: The vector of the last real token seen before, shape (B, C).
        reset: As for `token_shift`.
        mask: As for `token_shift`.

    Returns:
        The mixes, one for each m, each of shape (B, T, C), and the state after the last token,
        shape (B, C).

    Raises:
        ValueError: Shapes that do not fit.
    """
    _check(x, shares, state, reset, mask)
    reset, mask = _as_marks(reset, mask)
    dtype = product_dtype(x)
    implementation = TOKEN_SHIFT_MIX.choose_for(x, dtype)
    if runs_directly(implementation):
        *mixes, last = implementation.forward(x, shares, state, reset, mask, dtype)
    else:
        inputs = (x, state, reset, mask, dtype, *shares)
        *mixes, last = _TokenShiftMix.apply(implementation, *inputs)
    return tuple(mixes), last


def _check(x, shares, state, reset, mask) -> None:
    if x.dim() != 3:
        raise ValueError(f"x {tuple(x.shape)} must have shape (B, T, C)")
    B, T, C = x.shape
    expected = [
        *(("a share", share, (C,)) for share in shares),
        ("state", state, (B, C)),
        ("reset", reset, (B, T)),
        ("mask", mask, (B, T)),
    ]
    for name, tensor, shape in expected:
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} {tuple(tensor.shape)} must have shape {shape}")
