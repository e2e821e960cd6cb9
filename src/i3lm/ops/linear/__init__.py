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
# Columns of a product that are taken together where all at once are slow.
_PIECE = 256


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
    """A product in autocast's dtype, of a weight that is kept in float32.

    Autocast would keep its copy of the matrix until its block ends, though no product needs it
    again; and the matrix's gradient stays in the dtype of the product where `gradient_dtype` allows.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, dtype):
        low, narrow = x.to(dtype), weight.to(dtype)
        ctx.save_for_backward(low, narrow)
        ctx.dtypes = x.dtype, gradient_dtype(weight), None if bias is None else bias.dtype
        offset = None if bias is None else bias.to(dtype)
        return matrix_product(low.flatten(0, -2), narrow, offset).unflatten(0, x.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        low, narrow = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.dtypes
        wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
        flat, shape = grad.flatten(0, -2), grad.shape[:-1]
        grad_x = grad_weight = grad_bias = None
        if wants_x:
            grad_x = matrix_product(flat, narrow.T).unflatten(0, shape).to(of_x)
        turned, sums = _turned(flat, low.shape[-1], wants_bias)
        if wants_weight:
            grad_weight = torch.mm(turned, low.flatten(0, -2)).to(of_weight or grad.dtype)
        if wants_bias:
            grad_bias = (flat.sum(dim=0) if sums is None else sums).to(of_bias)
        return grad_x, grad_weight, grad_bias, None


def _turned(grad: Tensor, width: int, wants_sums: bool) -> tuple[Tensor, Tensor | None]:
    """The transpose of a gradient, for the product with an input, and perhaps sums of its columns.

    oneDNN multiplies a transposed bfloat16 matrix at half speed. To write it down first pays where
    it is the narrow one of the two.
    """
    if (
        not _has_tiles()
        or grad.dtype != torch.bfloat16
        or numba_refuses_bits(grad.device, grad.dtype)
    ):
        return grad.T, None
    from i3lm.ops.transpose.numba import transpose_numba

    turned, sums = transpose_numba(grad, wants_sums)
    return turned, sums if wants_sums else None


@functools.cache
def _has_tiles() -> bool:
    """Whether the processor multiplies tiles of bfloat16 (AMX)."""
    return bool(torch.cpu._is_amx_tile_supported())


def matrix_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Gives ``x @ weight.T + bias`` of matrices (M, K) and (N, K), all of one dtype.

    oneDNN's product of bfloat16 tiles takes up to twice as long as it might for some thousand rows
    and few columns: those columns are taken in pieces. And PyTorch has it add to a bias that was
    written everywhere before, which takes longer than a bias that is added at the end.
    """
    if x.dtype != torch.bfloat16 or not _has_tiles():
        return F.linear(x, weight, bias)
    (rows, inner), columns = x.shape, weight.shape[0]
    few = _PIECE < columns <= 768 and columns % _PIECE == 0 and inner >= 2 * columns
    if not (few and 768 <= rows <= 1152):
        return _product(x, weight, bias) if bias is not None and x.numel() else torch.mm(x, weight.T)
    output = x.new_empty(rows, columns)
    for start in range(0, columns, _PIECE):
        piece = slice(start, start + _PIECE)
        torch.mm(x, weight[piece].T, out=output[:, piece])
    return output if bias is None else output.add_(bias)


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
    kernel that reads the matrix at the speed of memory (benchmarks/NOTES.md). All other cases are
    `torch.nn.functional.linear`: autocast, accelerators, quantised weights, and traced calls, which
    a compiler replaces anyway.

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
        if weight.dtype == torch.float32 and weight.requires_grad and torch.is_grad_enabled():
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
