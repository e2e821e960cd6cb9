"""The state-space mixer of the i3-80m."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from i3lm.ops import state_space


class HybridMixer(nn.Module):
    """The linear "RWKV-Mamba" mixer: a running average and a small state, read out linearly.

    ``N^2 + 2 N C + 2 C`` parameters; the equation is in `i3lm.ops.state_space`.

    Args:
        hidden_size: Width C of the residual stream.
        state_size: Size N of the hidden state.
    """

    matrices = ("B", "C")  # A maps the state to itself, step after step: see parameter_groups

    def __init__(self, hidden_size: int, state_size: int) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.empty(hidden_size))
        self.A = nn.Parameter(torch.empty(state_size, state_size))
        self.B = nn.Parameter(torch.empty(state_size, hidden_size))
        self.C = nn.Parameter(torch.empty(hidden_size, state_size))
        self.D = nn.Parameter(torch.empty(hidden_size))

    def forward(
        self,
        x: Tensor,
        state: Tensor | None = None,
        *,
        reset: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Maps (B, T, C) to (B, T, C), and gives the state (B, C + N) after the last token."""
        return state_space(
            x, self.mix, self.A, self.B, self.C, self.D, state, reset=reset, mask=mask
        )
