"""Linear maps of low rank, for the v1 members of the family."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from i3lm.ops import linear


class LowRankLinear(nn.Module):
    """``y = A (B x) + bias`` with A (out, r) and B (r, in): r (in + out) + out parameters.

    The low-rank pretraining layer ("LoRPt") of the i3 family.

    Args:
        in_features: Size of the input.
        out_features: Size of the output.
        rank: Size r of the narrow middle.
    """

    matrices = ("lora_A", "lora_B")

    def __init__(self, in_features: int, out_features: int, rank: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.lora_A = nn.Parameter(torch.empty(out_features, rank))
        self.lora_B = nn.Parameter(torch.empty(rank, in_features))
        self.bias = nn.Parameter(torch.empty(out_features))
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Normal factors, zero bias."""
        nn.init.normal_(self.lora_A, std=std)
        nn.init.normal_(self.lora_B, std=std)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., in_features) to (..., out_features)."""
        return linear(linear(x, self.lora_B), self.lora_A, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.rank} -> {self.out_features}"
