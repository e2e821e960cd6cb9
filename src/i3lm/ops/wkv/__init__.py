"""The RWKV-4 recurrence: one door, several implementations, one truth."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from i3lm.ops.dispatch import (
    Implementation,
    Op,
    accumulation_dtype,
    full_precision,
    numba_refuses,
    runs_directly,
    triton_refuses,
)
from i3lm.ops.registration import register_recurrence
from i3lm.ops.wkv.reference import empty_state, wkv_reference
from i3lm.ops.wkv.scan import wkv_scan, wkv_scan_backward


def _numba(*inputs: Any) -> tuple[Tensor, ...]:
    from i3lm.ops.wkv.numba import wkv_numba

    return wkv_numba(*inputs)


def _numba_backward(*inputs: Any) -> tuple[Tensor, ...]:
    from i3lm.ops.wkv.numba import wkv_numba_backward

    return wkv_numba_backward(*inputs)


def _triton(*inputs: Any) -> tuple[Tensor, ...]:
    from i3lm.ops.wkv.triton import wkv_triton

    return wkv_triton(*inputs)


def _triton_backward(*inputs: Any) -> tuple[Tensor, ...]:
    from i3lm.ops.wkv.triton import wkv_triton_backward

    return wkv_triton_backward(*inputs)


WKV = Op(
    "wkv",
    [
        Implementation("numba", _numba, _numba_backward, numba_refuses, reads_bfloat16=True),
        Implementation("triton", _triton, _triton_backward, triton_refuses, reads_bfloat16=True),
        Implementation("scan", wkv_scan, wkv_scan_backward),
        Implementation("reference", wkv_reference),
    ],
)


_wkv = register_recurrence(WKV, ("key", "value", "time_decay", "time_first", "state"))


def wkv(
    key: Tensor,
    value: Tensor,
    time_decay: Tensor,
    time_first: Tensor,
    state: Tensor | None = None,
    *,
    reset: Tensor | None = None,
    mask: Tensor | None = None,
    reverse: bool = False,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Gives the exponentially decayed, key-weighted mean of the values at every step.

    With ``w = time_decay`` and ``u = time_first``, per channel::

              sum_{i<t} e^{(t-1-i) w + u + k_i} v_i + e^{k_t} v_t
        y_t = ---------------------------------------------------
              sum_{i<t} e^{(t-1-i) w + u + k_i}     + e^{k_t}

    This is the WKV of RWKV-4 (arXiv:2305.13048, equation 14) with one difference of the i3
    family: the bonus ``u`` weighs the *history*, where RWKV-4 gives it to the *current* key.
    Dividing both sums by ``e^u`` shows that the two agree under ``u -> -u``.

    The recurrence runs in float32 (float64 for float64 inputs) whatever the inputs' dtype and
    under autocast.

    Args:
        key: Keys, shape (B, T, C).
        value: Values, shape (B, T, C).
        time_decay: Log decay per step, not positive, shape (C,). The layer owns the
            ``-exp(...)`` that makes it so.
        time_first: Bonus of the history, shape (C,).
        state: The sums so far, shape (B, 3, C): rows num_state, den_state and max_state, where
            the sums are ``num_state * e^max_state`` and ``den_state * e^max_state``. None means
            no token so far. Gradients flow into all three rows; of a returned state, max_state
            is a choice of scale through which no gradient flows back.
        reset: Document starts, bool, shape (B, T): the state is emptied before such a token.
        mask: True at real tokens, bool, shape (B, T). A padded step outputs zero and leaves the
            state as it was.
        reverse: Run from the last token to the first (the state then belongs before token 0).
        implementation: A name from ``WKV.names`` to use instead of the best.

    Returns:
        The output, shape (B, T, C), in the dtype of `value`, and the state after the last step,
        shape (B, 3, C), float32 or float64.

    Raises:
        ValueError: Shapes that do not fit, or an implementation that is unknown or refuses.
    """
    _check(key, value, time_decay, time_first, state, reset, mask)
    dtype = accumulation_dtype(value.dtype)
    choice = WKV.choose(value.device, dtype, implementation)
    narrow = choice.implementation.reads_bfloat16 and key.dtype == value.dtype == torch.bfloat16
    sequences = [x if narrow else x.to(dtype) for x in (key, value)]
    if state is None:
        state = empty_state(key.shape[0], key.shape[2], like=time_decay.to(dtype))
    with full_precision(value.device):
        marks = [None if m is None else m.bool() for m in (reset, mask)]
        if reverse:
            sequences = [x.flip(1) for x in sequences]
            marks = [None if m is None else m.flip(1) for m in marks]
        inputs = [*sequences, time_decay.to(dtype), time_first.to(dtype), state.to(dtype)]
        if runs_directly(choice.implementation):
            output, state = choice.implementation.forward(*inputs, *marks)
        else:
            output, state = _wkv(*inputs, *marks, choice.implementation.name)
        if reverse:
            output = output.flip(1)
    return output.to(value.dtype), state


def _check(key, value, time_decay, time_first, state, reset, mask) -> None:
    if key.dim() != 3 or key.shape != value.shape:
        raise ValueError(
            f"key {tuple(key.shape)} and value {tuple(value.shape)} must share one shape (B, T, C)"
        )
    B, T, C = key.shape
    expected = {
        "time_decay": (time_decay, (C,)),
        "time_first": (time_first, (C,)),
        "state": (state, (B, 3, C)),
        "reset": (reset, (B, T)),
        "mask": (mask, (B, T)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} {tuple(tensor.shape)} must have shape {shape}")
