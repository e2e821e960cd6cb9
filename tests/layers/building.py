"""Layers with random parameters."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

AnyModule = TypeVar("AnyModule", bound=nn.Module)


def with_random_parameters(layer: AnyModule, seed: int = 0) -> AnyModule:
    """The layer in float64, every parameter drawn from a normal distribution."""
    generator = torch.Generator().manual_seed(seed)
    layer = layer.double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.5, generator=generator)
    return layer


def draw(*shape: int, seed: int = 1) -> Tensor:
    """A random float64 tensor."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def count(layer: nn.Module) -> int:
    """The number of parameters."""
    return sum(parameter.numel() for parameter in layer.parameters())
