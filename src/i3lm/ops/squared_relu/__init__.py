"""The activation between the two products of RWKV's position-wise network."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from i3lm.ops.dispatch import Implementation, Op, numba_refuses_bits, runs_directly


def _torch(x: Tensor) -> Tensor:
    positive = torch.relu(x)
    return positive * positive  # autocast would compute and keep a power in float32


def _numba(x: Tensor) -> Tensor:
    from i3lm.ops.squared_relu.numba import squared_relu_numba

    return squared_relu_numba(x)


def _numba_backward(grad: Tensor, output: Tensor) -> tuple[Tensor]:
    from i3lm.ops.squared_relu.numba import squared_relu_numba_backward

    return squared_relu_numba_backward(grad, output)


SQUARED_RELU = Op(
    "squared_relu",
    [
        Implementation("numba", _numba, _numba_backward, numba_refuses_bits),
        Implementation("torch", _torch),
    ],
)


class _SquaredReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, implementation, x):
        output = implementation.forward(x)
        # The output alone is kept, as the product behind it keeps it too.
        ctx.save_for_backward(output)
        ctx.implementation = implementation
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return None, *ctx.implementation.backward(grad, *ctx.saved_tensors)


def squared_relu(x: Tensor) -> Tensor:
    """Gives ``max(x, 0)^2`` (arXiv:2109.08668, section 3), in the dtype of `x` and rounded once.

    Args:
        x: Any shape.
    """
    implementation = SQUARED_RELU.choose_for(x, x.dtype)
    if runs_directly(implementation):
        return implementation.forward(x)
    return _SquaredReLU.apply(implementation, x)
