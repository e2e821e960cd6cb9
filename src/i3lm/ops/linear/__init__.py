"""The product with a weight matrix, by the faster of the two libraries that PyTorch carries."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from i3lm.ops.dispatch import (
    Implementation,
    Op,
    gradient_dtype,
    numba_refuses_bits,
    processor_vendor,
)

# Up to so many rows, a product is bound by reading the matrix.
FEW_ROWS = 4
# What autocast turns into its own dtype.
_NARROWABLE = (torch.float32, torch.bfloat16, torch.float16)
# With so many rows a product of bfloat16 tiles is slow (of few columns and a large inner size), and
# so many of its columns are not.
_SLOW_ROWS, _PIECE = range(768, 1153), 256


def _onednn_refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return f"runs on the CPU, not on {device.type}"
    if dtype != torch.float32:
        return f"serves float32, not {dtype}"
    if not _has_onednn():
        return "this PyTorch is built without oneDNN"
    if "AVX512" not in torch.backends.cpu.get_cpu_capability():
        return "gains nothing without AVX512"
    if processor_vendor() == "GenuineIntel":
        return "MKL is the faster one on Intel's processors"
    return None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    # The gradient of a sum is one number expanded; oneDNN would take its slowest path for it.
    x, weight = (y.contiguous() if 0 in y.stride() else y for y in (x, weight))
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


def _few_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    from i3lm.ops.linear.numba import few_rows

    output = few_rows(x.reshape(-1, x.shape[-1]).float(), weight, bias)
    return output.view(*x.shape[:-1], -1).to(x.dtype)


def _mixed_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    low = None if bias is None else bias.to(weight.dtype)
    return F.linear(x.to(weight.dtype), weight, low).to(x.dtype)


class _Narrowed(torch.autograd.Function):
    """A product in autocast's dtype with a matrix that is kept in float32.

    Autocast would keep its copy of the matrix until its block ends, though no product needs it
    again; and the gradient stays in the dtype of the product where `gradient_dtype` allows.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, dtype):
        low, narrow = x.to(dtype), weight.to(dtype)
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(low if wants_weight else None, narrow if wants_x else None)
        ctx.dtypes = x.dtype, gradient_dtype(weight), None if bias is None else bias.dtype
        offset = None if bias is None else bias.to(dtype)
        return _narrow_product(low.flatten(0, -2), narrow, offset).unflatten(0, x.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        low, narrow = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.dtypes
        wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
        flat, shape = grad.flatten(0, -2), grad.shape[:-1]
        grad_x = grad_weight = grad_bias = None
        if wants_x:
            grad_x = _narrow_product(flat, narrow.T).unflatten(0, shape).to(of_x)
        if wants_weight:
            turned, sums = _turn(flat, wants_bias)
            grad_weight = torch.mm(turned, low.flatten(0, -2)).to(of_weight or grad.dtype)
            grad_bias = None if sums is None else sums.to(of_bias)
        elif wants_bias:
            grad_bias = flat.sum(dim=0).to(of_bias)
        return grad_x, grad_weight, grad_bias, None


@functools.cache
def has_tiles() -> bool:
    """Whether the processor multiplies tiles of bfloat16 (AMX), and PyTorch has oneDNN for it."""
    return _has_onednn() and bool(torch.cpu._is_amx_tile_supported())


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _narrow_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Gives ``x @ weight.T + bias`` of matrices (M, K) and (N, K) in a narrow dtype.

    With tiles, the output takes half the time in pieces of few columns where it has about a
    thousand rows and K is large. And PyTorch would have the product added to a bias that it wrote
    everywhere before; oneDNN adds one at the end (benchmarks/NOTES.md).
    """
    if x.dtype != torch.bfloat16 or not has_tiles():
        return F.linear(x, weight, bias)
    (rows, inner), columns = x.shape, weight.shape[0]
    is_slow = rows in _SLOW_ROWS and _PIECE < columns <= 3 * _PIECE and inner >= 2 * columns
    if not is_slow or columns % _PIECE:
        return F.linear(x, weight) if bias is None else _product(x, weight, bias)
    output = x.new_empty(rows, columns)
    for start in range(0, columns, _PIECE):
        piece = slice(start, start + _PIECE)
        torch.mm(x, weight[piece].T, out=output[:, piece])
    return output if bias is None else output.add_(bias)


def _turn(grad: Tensor, wants_sums: bool) -> tuple[Tensor, Tensor | None]:
    """The transpose of a gradient, for the product with an input, and perhaps sums of its columns.

    With tiles, oneDNN multiplies a transposed bfloat16 matrix at half speed: it is written down.
    """
    bits = has_tiles() and grad.dtype == torch.bfloat16
    if not bits or numba_refuses_bits(grad.device, grad.dtype):
        return grad.T, grad.sum(dim=0) if wants_sums else None
    from i3lm.ops.linear.numba_transpose import transpose

    return transpose(grad, wants_sums)


# Of one row or a few, as in decoding.
LINEAR_OF_FEW_ROWS = Op(
    "linear_of_few_rows",
    [
        Implementation("numba", _few_rows, refuses=numba_refuses_bits),
        Implementation("torch", _mixed_linear),
    ],
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
    twice as fast, but on Intel's own the slower one. Without gradients, a few rows go through a
    kernel that reads the matrix at the speed of memory (benchmarks/NOTES.md). Under autocast on a
    CPU, products of a float32 weight and their gradients, which are not differentiated further,
    take the form in which oneDNN is fast.
    All other cases are `torch.nn.functional.linear`: accelerators, quantised weights, and traced
    calls, which a compiler replaces anyway.

    Args:
        x: Inputs, shape (..., in).
        weight: Shape (out, in), of x's dtype; or bfloat16 under float32 inputs, to be read faster.
        bias: Shape (out,), or None.

    Returns:
        Shape (..., out), of x's dtype (autocast's under autocast).
    """
    mixed = (x.dtype, weight.dtype) == (torch.float32, torch.bfloat16)
    plain = _mixed_linear if mixed else F.linear
    if (
        x.device.type != "cpu"
        or x.dim() < 2
        or x.numel() == 0
        or type(weight) not in (Tensor, torch.nn.Parameter)
        or torch.compiler.is_compiling()
    ):
        return plain(x, weight, bias)
    if torch.is_autocast_enabled("cpu"):
        both = weight.dtype == torch.float32 and x.dtype in _NARROWABLE
        if both and weight.requires_grad and torch.is_grad_enabled():
            return _Narrowed.apply(x, weight, bias, torch.get_autocast_dtype("cpu"))
        return plain(x, weight, bias)
    if (
        x.numel() <= FEW_ROWS * x.shape[-1]
        and not torch.is_grad_enabled()
        and weight.is_contiguous()
        and (mixed or x.dtype == weight.dtype)
        and weight.dtype in (torch.float32, torch.bfloat16)
    ):
        choice = LINEAR_OF_FEW_ROWS.choose(x.device, weight.dtype)
        return choice.implementation.forward(x, weight, bias)
    if x.dtype != torch.float32 or weight.dtype != torch.float32:
        return plain(x, weight, bias)
    return LINEAR.choose(x.device, x.dtype).implementation.forward(x, weight, bias)
