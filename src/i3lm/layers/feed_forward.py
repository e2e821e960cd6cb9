"""The position-wise network of the attention and hybrid layers."""

from __future__ import annotations

from torch import Tensor, nn

from i3lm.layers.linear import Linear
from i3lm.layers.low_rank import LowRankLinear
from i3lm.ops import gelu


class FeedForward(nn.Module):
    """``down(gelu(up(x)))`` with biases and the exact GELU.

    Args:
        hidden_size: Width C of the residual stream.
        intermediate_size: Width F of the middle, usually 4 C.
        rank: Rank of both maps, or None for full matrices.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, rank: int | None = None) -> None:
        super().__init__()
        if rank is None:
            self.up: nn.Module = Linear(hidden_size, intermediate_size)
            self.down: nn.Module = Linear(intermediate_size, hidden_size)
        else:
            self.up = LowRankLinear(hidden_size, intermediate_size, rank)
            self.down = LowRankLinear(intermediate_size, hidden_size, rank)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, T, C) to (B, T, C)."""
        return self.down(gelu(self.up(x)))
