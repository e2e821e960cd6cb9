"""The hybrid mixer's recurrence ("RWKV-Mamba"): one door, several implementations."""

from __future__ import annotations

from typing import Any

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
from i3lm.ops.state_space.reference import state_space_reference
from i3lm.ops.state_space.scan import state_space_scan, state_space_scan_backward


def _numba(*inputs: Any) -> tuple[Tensor, ...]:
    from i3lm.ops.state_space.numba import state_space_numba

    return state_space_numba(*inputs)


def _numba_backward(*inputs: Any) -> tuple[Tensor, ...]:
    from i3lm.ops.state_space.numba import state_space_numba_backward

    return state_space_numba_backward(*inputs)


def _triton(*inputs: Any) -> tuple[Tensor, ...]:
    from i3lm.ops.state_space.triton import state_space_triton

    return state_space_triton(*inputs)


def _triton_backward(*inputs: Any) -> tuple[Tensor, ...]:
    from i3lm.ops.state_space.triton import state_space_triton_backward

    return state_space_triton_backward(*inputs)


STATE_SPACE = Op(
    "state_space",
    [
        Implementation("numba", _numba, _numba_backward, numba_refuses),
        Implementation("triton", _triton, _triton_backward, triton_refuses),
        Implementation("scan", state_space_scan, state_space_scan_backward),
        Implementation("reference", state_space_reference),
    ],
)


_state_space = register_recurrence(STATE_SPACE, ("x", "mix", "A", "B", "C", "D", "state"))


def state_space(
    x: Tensor,
    mix: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    state: Tensor | None = None,
    *,
    reset: Tensor | None = None,
    mask: Tensor | None = None,
    reverse: bool = False,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Gives a running average and a linear state of the inputs, read out at every step.

    ::

        h_t = mix * h_{t-1} + (1 - mix) * x_t      the running average, per channel
        s_t = A s_{t-1} + B x_t                    the hidden state
        y_t = C s_t + D * h_t

    This is the mixer of the i3-80m of open-i3 (https://github.com/FlameF0X/open-i3). It is
    linear and time-invariant: A, B, C, D are parameters that do not depend on the input, unlike
    in Mamba. A is unconstrained, so a spectral radius above 1 makes the state grow without bound.

    The recurrence runs in float32 (float64 for float64 inputs) whatever the inputs' dtype and
    under autocast.

    Args:
        x: Inputs, shape (B, T, C).
        mix: Weight of the past in the running average, shape (C,).
        A: State transition, shape (N, N).
        B: Input matrix, shape (N, C).
        C: Output matrix, shape (C, N).
        D: Weight of the running average in the output, shape (C,).
        state: The running average and the hidden state before the first step, side by side,
            shape (B, C + N). None means zero.
        reset: Document starts, bool, shape (B, T): the state is zeroed before such a token.
        mask: True at real tokens, bool, shape (B, T). A padded step outputs zero and leaves the
            state as it was.
        reverse: Run from the last token to the first (the state then belongs before token 0).
        implementation: A name from ``STATE_SPACE.names`` to use instead of the best.

    Returns:
        The output, shape (B, T, C), in the dtype of `x`, and the state after the last step,
        shape (B, C + N), float32 or float64.

    Raises:
        ValueError: Shapes that do not fit, or an implementation that is unknown or refuses.
    """
    _check(x, mix, A, B, C, D, state, reset, mask)
    dtype = accumulation_dtype(x.dtype)
    choice = STATE_SPACE.choose(x.device, dtype, implementation)
    if state is None:
        state = x.new_zeros(x.shape[0], x.shape[2] + A.shape[0], dtype=dtype)
    with full_precision(x.device):
        inputs = x.to(dtype)
        marks = [None if m is None else m.bool() for m in (reset, mask)]
        if reverse:
            inputs = inputs.flip(1)
            marks = [None if m is None else m.flip(1) for m in marks]
        parameters = [p.to(dtype) for p in (mix, A, B, C, D)]
        tensors = (inputs, *parameters, state.to(dtype), *marks)
        if runs_directly(choice.implementation):
            output, state = choice.implementation.forward(*tensors)
        else:
            output, state = _state_space(*tensors, choice.implementation.name)
        if reverse:
            output = output.flip(1)
    return output.to(x.dtype), state


def _check(x, mix, A, B, C, D, state, reset, mask) -> None:
    if x.dim() != 3:
        raise ValueError(f"x {tuple(x.shape)} must have shape (B, T, C)")
    batch, steps, channels = x.shape
    N = A.shape[0]
    expected = {
        "mix": (mix, (channels,)),
        "A": (A, (N, N)),
        "B": (B, (N, channels)),
        "C": (C, (channels, N)),
        "D": (D, (channels,)),
        "state": (state, (batch, channels + N)),
        "reset": (reset, (batch, steps)),
        "mask": (mask, (batch, steps)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} {tuple(tensor.shape)} must have shape {shape}")
