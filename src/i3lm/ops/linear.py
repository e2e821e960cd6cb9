"""The product with a weight matrix, by the faster of the two libraries that PyTorch carries."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from i3lm.ops.dispatch import Implementation, Op


def _onednn_refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return f"runs on the CPU, not on {device.type}"
    if dtype != torch.float32:
        return f"serves float32, not {dtype}"
    if not torch.backends.mkldnn.is_available() or not hasattr(
        torch.ops.mkldnn, "_linear_pointwise"
    ):
        return "this PyTorch is built without oneDNN"
    if "AVX512" not in torch.backends.cpu.get_cpu_capability():
        return "gains nothing without AVX512"
    return None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _OneDNN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        flat = grad.flatten(0, -2)
        return (
            _product(grad, weight.T) if wants_x else None,
            _product(flat.T, x.flatten(0, -2).T) if wants_weight else None,
            flat.sum(dim=0) if wants_bias else None,
        )


LINEAR = Op(
    "linear",
    [
        Implementation("onednn", _OneDNN.apply, refuses=_onednn_refuses),
        Implementation("torch", F.linear),
    ],
)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Gives ``x @ weight.T + bias``.

    PyTorch computes float32 products on a CPU with MKL, which keeps to AVX2 on processors that
    are not Intel's; oneDNN, in the same wheel, uses AVX512 on all that have it and is then about
    twice as fast (benchmarks/NOTES.md). All other cases are `torch.nn.functional.linear`: low
    precision and autocast, accelerators, quantised weights, and traced calls, which a compiler
    replaces anyway.

    Args:
        x: Inputs, shape (..., in).
        weight: Shape (out, in).
        bias: Shape (out,), or None.

    Returns:
        Shape (..., out).
    """
    plain = (
        x.dtype != torch.float32
        or weight.dtype != torch.float32
        or x.dim() < 2
        or x.numel() == 0
        or type(weight) not in (Tensor, torch.nn.Parameter)
        or torch.compiler.is_compiling()
        or torch.is_autocast_enabled(x.device.type)
    )
    if plain:
        return F.linear(x, weight, bias)
    return LINEAR.choose(x.device, x.dtype).implementation.forward(x, weight, bias)
