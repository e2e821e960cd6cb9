"""Holding an implementation against the reference, on the machine where it will run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from i3lm.ops.adamw import ADAMW_STEP, GRADIENT_NORM, AdamWSettings, adamw_step, gradient_norm
from i3lm.ops.attention import CAUSAL_ATTENTION, PACKED_ATTENTION, causal_attention
from i3lm.ops.cross_entropy import SOFTMAX_LOSS, linear_cross_entropy
from i3lm.ops.decoding_step import DECODING_STEP, reference
from i3lm.ops.dispatch import Op, use_implementation
from i3lm.ops.gelu import GELU, gelu
from i3lm.ops.linear import LINEAR, LINEAR_OF_FEW_ROWS, NARROW_PRODUCT, linear, multiply
from i3lm.ops.squared_relu import SQUARED_RELU, squared_relu
from i3lm.ops.state_space import STATE_SPACE, state_space
from i3lm.ops.token_shift import TOKEN_SHIFT_MIX, token_shift_mix
from i3lm.ops.wkv import WKV, wkv

RECURRENCES = {"wkv": WKV, "state_space": STATE_SPACE}
_DOORS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"wkv": wkv, "state_space": state_space}


@dataclass(frozen=True)
class Check:
    """How the implementations of an op are held against the truth.

    Attributes:
        op: The op.
        dtype: What its implementations are run in.
        tolerance: The largest difference allowed, relative to each result's size.
        results: Runs the op on a device in a dtype and gives all that it computes.
    """

    op: Op
    dtype: torch.dtype
    tolerance: float
    results: Callable[[torch.device, torch.dtype], list[Tensor]]


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


def _recurrence(op: str, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Output, final state and gradients of a recurrence, with document resets and padding."""
    draw = torch.Generator().manual_seed(1)
    reset = torch.rand(2, 100, generator=draw) < 0.05
    mask = torch.rand(2, 100, generator=draw) < 0.9
    inputs = [x.to(device, dtype).requires_grad_() for x in example_inputs(op, 2, 100, 40)]
    output, state = _DOORS[op](*inputs, reset=reset.to(device), mask=mask.to(device))
    return [output, state, *_gradients(output, inputs)]


def _gradients(output: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view_as(output)
    return torch.autograd.grad((output * weights.to(output)).sum(), inputs)


def _normal(device: torch.device, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    draw = torch.Generator().manual_seed(2)
    drawn = [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes]
    return [x.to(device, dtype).requires_grad_() for x in drawn]


def _linear(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    # So large that every implementation serves it itself.
    inputs = _normal(device, dtype, (2, 512, 256), (640, 256), (640,))
    output = linear(*inputs)
    return [output, *_gradients(output, inputs)]


@torch.no_grad()
def _narrow_product(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    x, weight, bias, grad = _normal(device, dtype, (50, 64), (96, 64), (96,), (50, 96))
    of_weight, of_bias = multiply(grad.T, x, wants_sums=True)
    assert of_bias is not None
    return [multiply(x, weight.T, bias)[0], multiply(grad, weight)[0], of_weight, of_bias]


@torch.no_grad()
def _few_rows(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    return [linear(*_normal(device, dtype, (1, 2, 64), (96, 64), (96,)))]


def _gelu(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    inputs = _normal(device, dtype, (20, 30))
    output = gelu(*inputs)
    return [output, *_gradients(output, inputs)]


def _attention(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    inputs = _normal(device, dtype, *[(2, 3, 200, 16)] * 3)
    output = causal_attention(*inputs)
    return [output, *_gradients(output, inputs)]


def _packed_attention(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    inputs = _normal(device, dtype, *[(2, 3, 200, 16)] * 3)
    lengths = torch.tensor([[70], [23]], device=device)  # of documents, row by row
    first = torch.arange(200, device=device) // lengths * lengths
    output = causal_attention(*inputs, first=first)
    return [output, *_gradients(output, inputs)]


def _token_shift_mix(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    reset = (torch.rand(2, 50, generator=draw) < 0.05).to(device)
    mask = (torch.rand(2, 50, generator=draw) < 0.9).to(device)
    x, state, *shares = _normal(device, dtype, (2, 50, 40), (2, 40), (40,), (40,))
    mixes, last = token_shift_mix(x, shares, state, reset=reset, mask=mask)
    outputs = torch.cat([*mixes, last.unsqueeze(1)], dim=1)
    return [outputs, *_gradients(outputs, [x, state, *shares])]


def _squared_relu(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    inputs = _normal(device, dtype, (50, 40))
    output = squared_relu(*inputs)
    return [output, *_gradients(output, inputs)]


def _loss(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    hidden, weight, bias = _normal(device, dtype, (50, 16), (90, 16), (90,))
    loss = linear_cross_entropy(hidden, weight, bias, torch.arange(50, device=device))
    return [loss, *torch.autograd.grad(loss, [hidden, weight, bias])]


@torch.no_grad()
def _gradient_norm(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    gradients = _normal(device, dtype, (300, 7), (5,), (70_000,))
    return [torch.tensor(gradient_norm(gradients), device=device)]


@torch.no_grad()
def _adamw(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    tensors = _normal(device, dtype, *[(300, 7), (5,), (70_000,)] * 4)
    parameters, gradients, averages, squares = (tensors[i : i + 3] for i in (0, 3, 6, 9))
    squares = [square.square() for square in squares]
    settings = [AdamWSettings(0.1, (0.9, 0.99), 1e-8, 0.1, step) for step in (1, 2, 10)]
    adamw_step(parameters, gradients, averages, squares, settings, scale=0.5)
    return [*parameters, *averages, *squares]


# The shapes of the vectors, matrices and states of half a layer for two rows of 64 channels.
_C, _N, _H = 64, 8, 4
_HALVES: dict[str, tuple[list[tuple[int, ...]], ...]] = {
    "time_mix": ([(_C,)] * 5, [(_C, _C)] * 4, [(2, 3, _C), (2, _C)]),
    "channel_mix": ([(_C,)] * 2, [(96, _C), (_C, _C), (_C, 96)], [(2, _C)]),
    "state_space": ([(_C,), (_N, _N), (_N, _C), (_C, _N), (_C,)], [], [(2, _C + _N)]),
    "feed_forward": ([], [(96, _C), (_C, 96)], []),
    "attention": ([], [(3 * _C, _C), (_C, _C)], [(2, _H, 9, _C // _H)] * 2),
}


@torch.no_grad()
def _decoding_step(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    kernels = DECODING_STEP.choose(device, dtype).implementation.forward() or reference
    results: list[Tensor] = []
    for name, shapes in _HALVES.items():
        x, weight, bias = _normal(device, dtype, (2, _C), (_C,), (_C,))
        groups = [[y.detach() / 4 for y in _normal(device, dtype, *group)] for group in shapes]
        results += kernels.half(name, x.detach(), [weight.detach(), bias.detach()], *groups)
    return results


# float32: sums over a hundred terms, in the recurrences with exponents up to about 30. bfloat16
# keeps 8 bits, and attention rounds to it four times, GELU and its inputs thrice.
TOLERANCE = 1e-4
CHECKS = {
    check.op.name: check
    for check in (
        *(
            Check(op, torch.float32, TOLERANCE, lambda *where, name=name: _recurrence(name, *where))
            for name, op in RECURRENCES.items()
        ),
        Check(CAUSAL_ATTENTION, torch.bfloat16, 3e-2, _attention),
        Check(PACKED_ATTENTION, torch.bfloat16, 3e-2, _packed_attention),
        Check(GELU, torch.bfloat16, 3e-2, _gelu),
        Check(TOKEN_SHIFT_MIX, torch.float32, TOLERANCE, _token_shift_mix),
        Check(SQUARED_RELU, torch.float32, TOLERANCE, _squared_relu),
        Check(SOFTMAX_LOSS, torch.float32, TOLERANCE, _loss),
        Check(LINEAR, torch.float32, TOLERANCE, _linear),
        Check(NARROW_PRODUCT, torch.bfloat16, 3e-2, _narrow_product),
        Check(LINEAR_OF_FEW_ROWS, torch.float32, TOLERANCE, _few_rows),
        Check(GRADIENT_NORM, torch.float32, TOLERANCE, _gradient_norm),
        Check(ADAMW_STEP, torch.float32, TOLERANCE, _adamw),
        Check(DECODING_STEP, torch.float32, TOLERANCE, _decoding_step),
    )
}


def largest_difference(op: str, implementation: str, device: torch.device | str = "cpu") -> float:
    """How far an implementation is from the op's plainest in float64, relative to each result.

    Compares all outputs, final states and gradients. A NaN in any of them is infinitely far.

    Args:
        op: The op's name, a key of `CHECKS`.
        implementation: Its name.
        device: Where to run it.

    Raises:
        ValueError: There is no such implementation, or it refuses the device.
    """
    check = CHECKS[op]
    with use_implementation(**{op: check.op.names[-1]}):
        expected = check.results(torch.device("cpu"), torch.float64)
    with use_implementation(**{op: implementation}):
        got = check.results(torch.device(device), check.dtype)
    differences = [
        (a.cpu() - b.cpu().double()).abs().max() / a.abs().max().clamp_min(1)
        for a, b in zip(expected, got, strict=True)
    ]
    largest = torch.stack(differences).max().item()  # Python's own passes over NaN
    return math.inf if math.isnan(largest) else largest
