"""Gradient norm and AdamW in PyTorch, tensor by tensor, on any device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from i3lm.ops.adamw import AdamWSettings


def gradient_norm_reference(gradients: Sequence[Tensor]) -> float:
    """The square root of the sum of all squares."""
    squares = [gradient.double().square().sum() for gradient in gradients]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0


def adamw_step_reference(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    averages: Sequence[Tensor],
    squares: Sequence[Tensor],
    settings: Sequence[AdamWSettings],
    scale: float,
) -> None:
    """Changes parameters and averages in place; `i3lm.ops.adamw.adamw_step` has the equations."""
    for p, gradient, m, v, s in zip(
        parameters, gradients, averages, squares, settings, strict=True
    ):
        g = gradient.to(p.dtype) * scale
        beta1, beta2 = s.betas
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        spread = v.sqrt().div_((1 - beta2**s.step) ** 0.5).add_(s.eps)
        p.mul_(1 - s.learning_rate * s.weight_decay)
        p.addcdiv_(m, spread, value=-s.learning_rate / (1 - beta1**s.step))
