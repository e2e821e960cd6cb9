"""The position-wise network of RWKV-4."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from i3lm.layers.linear import Linear
from i3lm.ops import squared_relu, token_shift_mix


class ChannelMix(nn.Module):
    """RWKV-4 channel mixing (arXiv:2305.13048, equations 16-18).

    ``sigmoid(Wr xr) * (Wv relu(Wk xk)^2)``, where xk and xr mix in the previous token as in
    `TimeMix`. No biases.

    Args:
        hidden_size: Width C of the residual stream.
        intermediate_size: Width F of the middle, usually 4 C.
    """

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.time_mix_key = nn.Parameter(torch.empty(hidden_size))
        self.time_mix_receptance = nn.Parameter(torch.empty(hidden_size))
        self.key = Linear(hidden_size, intermediate_size, bias=False)
        self.receptance = Linear(hidden_size, hidden_size, bias=False)
        self.value = Linear(intermediate_size, hidden_size, bias=False)

    def forward(
        self,
        x: Tensor,
        state: Tensor | None = None,
        *,
        reset: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Maps (B, T, C) to (B, T, C), and gives the state (B, C), the last input."""
        shares = (self.time_mix_key, self.time_mix_receptance)
        (xk, xr), state = token_shift_mix(x, shares, state, reset=reset, mask=mask)
        value = self.value(squared_relu(self.key(xk)))
        return torch.sigmoid(self.receptance(xr)) * value, state
