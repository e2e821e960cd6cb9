"""The full matrix of every layer."""

from __future__ import annotations

from torch import Tensor, nn

from i3lm.ops import linear


class Linear(nn.Linear):
    """`torch.nn.Linear` whose product goes through `i3lm.ops.linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """Maps (..., in_features) to (..., out_features)."""
        return linear(input, self.weight, self.bias)

    def stored(self) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
        """Matrix, factor per output and bias as they lie in memory; None if there is more to it."""
        return (self.weight, None, self.bias) if type(self) is Linear else None
