"""Random inputs for ops, and small tools to compare what ops give."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from i3lm.ops.dispatch import TRITON_INTERPRETS, Op

MARKS = {
    "plain": (False, False),
    "reset": (True, False),
    "mask": (False, True),
    "reset and mask": (True, True),
}


def cases_on_cpu(op: Op) -> list[tuple[str, torch.dtype]]:
    """The implementations that run on a CPU, each with every dtype that it computes in."""
    cpu = torch.device("cpu")
    return [
        (implementation.name, dtype)
        for implementation in op.implementations
        for dtype in (torch.float64, torch.float32)
        if implementation.refuses(cpu, dtype) is None
    ]


# A step, lengths around whole stretches of the kernels, and many stretches.
LENGTHS = [
    (1, "plain", False),
    (2, "mask", True),
    (63, "reset and mask", True),
    (64, "plain", True),
    (65, "reset and mask", False),
    (700, "reset and mask", True),
]


def device_of(name: str | None) -> torch.device:
    """Where tests run an implementation: Triton's on a GPU, unless it interprets; others not."""
    return torch.device("cuda" if name == "triton" and not TRITON_INTERPRETS else "cpu")


def cases_here(op: Op) -> list[tuple[str, torch.dtype]]:
    """The implementations that run on this machine, each with every dtype that it computes in."""
    return [
        (implementation.name, dtype)
        for implementation in op.implementations
        for dtype in (torch.float64, torch.float32)
        if implementation.refuses(device_of(implementation.name), dtype) is None
    ]


def on_its_device(door: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Any]:
    """The door of an op, for tensors on the CPU, whatever the device that computes."""

    @functools.wraps(door)
    def run(*inputs: Any, implementation: str | None = None, **options: Any):
        device = device_of(implementation)

        def moved(x: Any) -> Any:
            return x.to(device) if isinstance(x, Tensor) else x

        options = {name: moved(value) for name, value in options.items()}
        output, state = door(*map(moved, inputs), **options, implementation=implementation)
        return output.cpu(), state.cpu()

    return run


def make_generator(*numbers: int) -> torch.Generator:
    """A random generator that depends on all the numbers."""
    seed = 0
    for number in numbers:
        seed = seed * 1009 + number + 1
    return torch.Generator().manual_seed(seed % 2**63)


def lay(x: Tensor, by_rows: bool, margin: int) -> Tensor:
    """The matrix with its rows or its columns in one piece each, and so many NaN between them."""
    x = x if by_rows else x.T
    wide = torch.full((x.shape[0], x.shape[1] + margin), torch.nan, dtype=x.dtype)
    wide[:, : x.shape[1]] = x
    view = wide[:, : x.shape[1]]
    return view if by_rows else view.T


def draw_marks(kind: str, B: int, T: int, generator: torch.Generator) -> dict[str, Tensor | None]:
    """Random document starts (one step in six) and padding (one step in four), as `kind` says."""
    has_reset, has_mask = MARKS[kind]
    return {
        "reset": torch.rand(B, T, generator=generator) < 1 / 6 if has_reset else None,
        "mask": torch.rand(B, T, generator=generator) < 3 / 4 if has_mask else None,
    }


def cut_marks(marks: dict[str, Tensor | None], part: slice) -> dict[str, Tensor | None]:
    """The marks of some of the steps."""
    return {name: None if mark is None else mark[:, part] for name, mark in marks.items()}


def gradients(
    function: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor], weights: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """The results of a function, and the gradient of their weighted sum for every input."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    results = function(*leaves)
    total = sum((r * w).sum() for r, w in zip(results, weights, strict=True))
    total = total + sum(0 * leaf.sum() for leaf in leaves)  # no step, no path to any input
    grads = torch.autograd.grad(total, leaves, materialize_grads=True)
    return [r.detach() for r in results], list(grads)


def assert_close(got: Tensor, expected: Tensor, tolerance: float, name: str = "result") -> None:
    """Compares whole tensors: errors may be `tolerance` times the largest entry, at least of 1."""
    largest = float(expected.detach().abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(
        got.double(),
        expected.double(),
        rtol=0,
        atol=tolerance * max(1.0, largest),
        msg=lambda text: f"{name}: {text}",
    )


def assert_all_close(
    got: list[Tensor], expected: list[Tensor], names: list[str], tolerance: float
) -> None:
    """`assert_close` for several tensors, naming the one that differs."""
    for one, other, name in zip(got, expected, names, strict=True):
        assert_close(one, other, tolerance, name)
