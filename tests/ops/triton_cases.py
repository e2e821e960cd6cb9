"""Runs the Triton kernels in Triton's interpreter and prints how far they are from the truth.

A process of its own, because Triton decides when it is imported whether to interpret.
"""

from __future__ import annotations

import itertools
import json
import os

os.environ["TRITON_INTERPRET"] = "1"

import torch

from i3lm.ops import state_space, wkv
from i3lm.ops.self_check import example_inputs

CHANNELS, STATE_SIZE = 20, 5  # not multiples of the kernels' blocks


def initial_state(op: str, draw: torch.Generator) -> torch.Tensor:
    """A state as some tokens would have left it, float64."""
    if op == "state_space":
        return torch.randn(2, CHANNELS + STATE_SIZE, generator=draw, dtype=torch.float64)
    state = torch.randn(2, 3, CHANNELS, generator=draw, dtype=torch.float64)
    state[:, 1] = state[:, 1].abs() + 1
    return state


def difference(op: str, steps: int, with_reset: bool, with_mask: bool, reverse: bool) -> float:
    """The largest relative difference of output, continued output and all gradients."""
    door = {"wkv": wkv, "state_space": state_space}[op]
    draw = torch.Generator().manual_seed(steps)
    truth = [
        *example_inputs(op, 2, steps, CHANNELS, state_size=STATE_SIZE),
        initial_state(op, draw),
    ]
    marks = {
        "reset": torch.rand(2, steps, generator=draw) < 0.15 if with_reset else None,
        "mask": torch.rand(2, steps, generator=draw) < 0.7 if with_mask else None,
        "reverse": reverse,
    }
    following = example_inputs(op, 2, 3, CHANNELS, state_size=STATE_SIZE)
    results = []
    for name, dtype in (("reference", torch.float64), ("triton", torch.float32)):
        leaves = [x.to(dtype).requires_grad_() for x in truth]
        output, state = door(*leaves, **marks, implementation=name)
        # A state means what it does to the steps that follow.
        follow = [x.to(dtype) for x in following]
        continued, _ = door(*follow, state, implementation="reference")
        loss = (output * torch.linspace(-1, 1, output.numel(), dtype=dtype).view_as(output)).sum()
        grads = torch.autograd.grad(loss + continued.square().sum(), leaves, allow_unused=True)
        filled = [
            torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True)
        ]
        results.append([x.detach().double() for x in (output, continued, *filled)])
    return max(
        ((a - b).abs().max() / a.abs().max().clamp_min(1)).item()
        for a, b in zip(*results, strict=True)
    )


if __name__ == "__main__":
    found = {}
    for op in ("wkv", "state_space"):
        for steps, marked in itertools.product((1, 2, 33, 65), (False, True)):
            case = f"{op} T={steps} marked={marked}"
            found[case] = difference(op, steps, marked, marked, reverse=marked and steps == 33)
    print(json.dumps(found))
