"""The exact GELU, with a form that computes value and derivative at once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from i3lm.ops.dispatch import Implementation, Op, numba_refuses_bits


class _ByTable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        from i3lm.ops.gelu.numba import gelu_numba

        value, derivative = gelu_numba(x, wants_derivative=True)
        ctx.save_for_backward(derivative)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        from i3lm.ops.gelu.numba import gelu_numba_backward

        return gelu_numba_backward(grad, *ctx.saved_tensors)


def _numba(x: Tensor) -> Tensor:
    if x.requires_grad and torch.is_grad_enabled():
        return _ByTable.apply(x)
    from i3lm.ops.gelu.numba import gelu_numba

    return gelu_numba(x, wants_derivative=False)[0]


def _numba_refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype != torch.bfloat16:
        return f"is a table of bfloat16's numbers, not of those of {dtype}"
    return numba_refuses_bits(device, dtype)


GELU = Op(
    "gelu",
    [
        Implementation("numba", _numba, refuses=_numba_refuses),
        Implementation("torch", F.gelu),
    ],
)


def gelu(x: Tensor) -> Tensor:
    """Gives ``x Phi(x)``, where Phi is the normal distribution (arXiv:1606.08415).

    In bfloat16 on a CPU, value and derivative are looked up together, and the derivative is kept
    for the backward pass in place of x, which then is one product (benchmarks/NOTES.md). All else
    is `torch.nn.functional.gelu`, traced calls too, which a compiler fuses itself.

    Args:
        x: Any shape.

    Returns:
        The shape and dtype of x.
    """
    if torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter):
        return F.gelu(x)
    return GELU.choose(x.device, x.dtype).implementation.forward(x)
