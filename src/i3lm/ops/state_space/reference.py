"""The hybrid mixer's recurrence as the equation reads: a loop over time."""

from __future__ import annotations

import torch
from torch import Tensor


def state_space_reference(
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
    """Computes `i3lm.ops.state_space` step by step; see there for the equation and arguments."""
    average, hidden = state.split([x.shape[2], A.shape[0]], dim=1)
    outputs = []
    for t in range(x.shape[1]):
        if reset is not None:
            start = reset[:, t, None]
            average, hidden = average.masked_fill(start, 0), hidden.masked_fill(start, 0)

        next_average = mix * average + (1 - mix) * x[:, t]
        next_hidden = hidden @ A.T + x[:, t] @ B.T
        output = next_hidden @ C.T + D * next_average

        if mask is None:
            average, hidden = next_average, next_hidden
        else:
            real = mask[:, t, None]
            output = output.masked_fill(~real, 0)
            average = torch.where(real, next_average, average)
            hidden = torch.where(real, next_hidden, hidden)
        outputs.append(output)
    stacked = torch.stack(outputs, dim=1) if outputs else torch.zeros_like(x)
    return stacked, torch.cat([average, hidden], dim=1)
