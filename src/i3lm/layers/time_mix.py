"""The token mixer of RWKV-4."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from i3lm.layers.linear import Linear
from i3lm.ops import token_shift_mix, wkv


class TimeMixState(NamedTuple):
    """What a time mix carries from one call to the next."""

    shift: Tensor  # the last input, (B, C)
    sums: Tensor  # the sums of `i3lm.ops.wkv`, (B, 3, C), float32 or float64


class TimeMix(nn.Module):
    """RWKV-4 time mixing (arXiv:2305.13048, equations 11-15), with the i3 family's bonus sign.

    ``xk = x mk + x' (1 - mk)``, likewise xv and xr, where x' is the previous token's vector;
    ``out = Wo (sigmoid(Wr xr) * wkv(Wk xk, Wv xv))``. No biases.

    Args:
        hidden_size: Width C of the residual stream.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.time_decay = nn.Parameter(torch.empty(hidden_size))
        self.time_first = nn.Parameter(torch.empty(hidden_size))
        self.time_mix_key = nn.Parameter(torch.empty(hidden_size))
        self.time_mix_value = nn.Parameter(torch.empty(hidden_size))
        self.time_mix_receptance = nn.Parameter(torch.empty(hidden_size))
        self.key = Linear(hidden_size, hidden_size, bias=False)
        self.value = Linear(hidden_size, hidden_size, bias=False)
        self.receptance = Linear(hidden_size, hidden_size, bias=False)
        self.output = Linear(hidden_size, hidden_size, bias=False)

    def forward(
        self,
        x: Tensor,
        state: TimeMixState | None = None,
        *,
        reset: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, TimeMixState]:
        """Maps (B, T, C) to (B, T, C), and gives the state after the last token."""
        shift, sums = state if state is not None else (None, None)
        shares = (self.time_mix_key, self.time_mix_value, self.time_mix_receptance)
        (xk, xv, xr), shift = token_shift_mix(x, shares, shift, reset=reset, mask=mask)
        key, value, receptance = self.key(xk), self.value(xv), self.receptance(xr)
        time_decay = -torch.exp(self.time_decay)
        mixed, sums = wkv(key, value, time_decay, self.time_first, sums, reset=reset, mask=mask)
        return self.output(torch.sigmoid(receptance) * mixed), TimeMixState(shift, sums)
