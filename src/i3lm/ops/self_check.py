"""Holding an implementation against the reference, on the machine where it will run."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from i3lm.ops.state_space import STATE_SPACE, state_space
from i3lm.ops.wkv import WKV, wkv

OPS = {"wkv": WKV, "state_space": STATE_SPACE}
_DOORS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"wkv": wkv, "state_space": state_space}

# float32 sums over a hundred steps, with exponents up to about 30.
TOLERANCE = 1e-4


def example_inputs(
    op: str, batch: int, steps: int, channels: int, *, state_size: int = 32
) -> list[Tensor]:
    """Seeded random inputs of an op, without its state, in float64 on the CPU."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64) * scale

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=draw, dtype=torch.float64)

    sequence = (batch, steps, channels)
    if op == "wkv":
        return [normal(*sequence, scale=3), normal(*sequence), -uniform(channels), normal(channels)]
    return [
        normal(*sequence),
        uniform(channels),
        normal(state_size, state_size, scale=0.5 / state_size**0.5),
        normal(state_size, channels, scale=channels**-0.5),
        normal(channels, state_size, scale=state_size**-0.5),
        normal(channels),
    ]


def largest_difference(op: str, implementation: str, device: torch.device | str = "cpu") -> float:
    """How far an implementation is from the float64 reference, relative to each result's size.

    Compares output, final state and the gradient of every input, with document resets and
    padding, in float32.

    Args:
        op: ``wkv`` or ``state_space``.
        implementation: Its name.
        device: Where to run it.

    Raises:
        ValueError: There is no such implementation, or it refuses the device.
    """
    draw = torch.Generator().manual_seed(1)
    reset = torch.rand(2, 100, generator=draw) < 0.05
    mask = torch.rand(2, 100, generator=draw) < 0.9
    results = []
    for name, where, dtype in (
        ("reference", torch.device("cpu"), torch.float64),
        (implementation, torch.device(device), torch.float32),
    ):
        inputs = [x.to(where, dtype).requires_grad_() for x in example_inputs(op, 2, 100, 40)]
        marks = {"reset": reset.to(where), "mask": mask.to(where)}
        output, state = _DOORS[op](*inputs, **marks, implementation=name)
        weights = torch.linspace(-1, 1, output.numel(), dtype=dtype, device=where)
        loss = (output * weights.view_as(output)).sum()
        grads = torch.autograd.grad(loss, inputs)
        results.append([x.detach().cpu().double() for x in (output, state, *grads)])
    expected, got = results
    return max(
        ((a - b).abs().max() / a.abs().max().clamp_min(1)).item()
        for a, b in zip(expected, got, strict=True)
    )
