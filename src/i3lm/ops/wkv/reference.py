"""The RWKV-4 recurrence as the equation reads: a loop over time."""

from __future__ import annotations

import torch
from torch import Tensor

# The exponent of an empty sum. Far below any key, and far enough above the float32 minimum
# that adding a decay or a bonus to it cannot overflow.
EMPTY_EXPONENT = -1e38
# A log decay below this forgets everything at once in any dtype; bounding it keeps its multiples
# finite.
FASTEST_DECAY = -1e30


def empty_state(batch_size: int, channels: int, *, like: Tensor) -> Tensor:
    """The state before any token: zero sums, shape (B, 3, C), on the device and dtype of `like`."""
    state = torch.zeros(batch_size, 3, channels, dtype=like.dtype, device=like.device)
    state[:, 2] = EMPTY_EXPONENT
    return state


def wkv_reference(
    key: Tensor,
    value: Tensor,
    time_decay: Tensor,
    time_first: Tensor,
    state: Tensor,
    reset: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Computes `i3lm.ops.wkv` step by step; see there for the equation and the arguments.

    The sums are kept as ``num * e^max`` and ``den * e^max`` so that no exponential overflows.
    ``max`` is only a choice of scale, so no gradient flows out of it.
    """
    num, den, largest = state.unbind(1)  # each (B, C)
    outputs = []
    for t in range(key.shape[1]):
        k, v = key[:, t], value[:, t]
        if reset is not None:
            start = reset[:, t, None]
            num, den = num.masked_fill(start, 0), den.masked_fill(start, 0)
            largest = largest.masked_fill(start, EMPTY_EXPONENT)

        scale = torch.maximum(time_first + largest, k).detach()
        past, now = torch.exp(time_first + largest - scale), torch.exp(k - scale)
        output = (past * num + now * v) / (past * den + now)

        scale = torch.maximum(time_decay + largest, k).detach()
        past, now = torch.exp(time_decay + largest - scale), torch.exp(k - scale)
        step = (past * num + now * v, past * den + now, scale)

        if mask is None:
            num, den, largest = step
        else:
            real = mask[:, t, None]
            output = output.masked_fill(~real, 0)
            num = torch.where(real, step[0], num)
            den = torch.where(real, step[1], den)
            largest = torch.where(real, step[2], largest)
        outputs.append(output)
    stacked = torch.stack(outputs, dim=1) if outputs else torch.zeros_like(value)
    return stacked, torch.stack([num, den, largest], dim=1)
