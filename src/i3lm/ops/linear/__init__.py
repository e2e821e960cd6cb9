"""The product with a weight matrix, by a kernel of ours or by one of PyTorch's two libraries."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from i3lm.ops.dispatch import (
    Implementation,
    Op,
    amx_refuses,
    gradient_dtype,
    numba_refuses_bits,
    processor_vendor,
)

# Up to so many rows, a product is bound by reading the matrix.
FEW_ROWS = 8
# What autocast turns into its own dtype.
_NARROWABLE = (torch.float32, torch.bfloat16, torch.float16)


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


def _onednn_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    # The gradient of a sum is one number expanded; oneDNN would take its slowest path for it.
    x, weight = (y.contiguous() if 0 in y.stride() else y for y in (x, weight))
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Product(torch.autograd.Function):
    """``x @ weight.T + bias`` of matrices, and its gradients, by a function that multiplies two.

    It takes x (M, K), y (K, N), a bias or None, and whether sums of x's rows are wanted. It gives
    ``x @ y + bias``, and the sums or None.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, product):
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if wants_weight else None, weight if wants_x else None)
        ctx.product = product
        return product(x, weight.T, bias, False)[0]

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
        # PyTorch's own products where the gradients themselves are to be differentiated.
        product = _multiply_by_torch if torch.is_grad_enabled() else ctx.product
        grad_x = grad_weight = grad_bias = None
        if wants_x:
            grad_x = product(grad, weight, None, False)[0]
        if wants_weight:
            grad_weight, grad_bias = product(grad.T, x, None, wants_bias)
        elif wants_bias:
            grad_bias = grad.sum(dim=0)
        return grad_x, grad_weight, grad_bias, None


def _multiply_by_torch(
    x: Tensor, y: Tensor, bias: Tensor | None, wants_sums: bool
) -> tuple[Tensor, Tensor | None]:
    return F.linear(x, y.T, bias), x.sum(dim=1) if wants_sums else None


def _multiply_by_onednn(
    x: Tensor, y: Tensor, bias: Tensor | None, wants_sums: bool
) -> tuple[Tensor, Tensor | None]:
    return _onednn_product(x, y.T, bias), x.sum(dim=1) if wants_sums else None


def _multiply_wide_by_tiles(
    x: Tensor, y: Tensor, bias: Tensor | None, wants_sums: bool
) -> tuple[Tensor, Tensor | None]:
    from i3lm.ops.linear.amx_float32 import multiply_float32, refuses

    if refuses(x, y, bias, wants_sums) is None:
        return multiply_float32(x, y, bias, wants_sums)
    return _multiply_by_torch(x, y, bias, wants_sums)


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    output: Tensor = _Product.apply(x.flatten(0, -2), weight, bias, _multiply_by_onednn)
    return output.unflatten(0, x.shape[:-1])


def _by_tiles(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    from i3lm.ops.linear.amx_float32 import refuses

    flat = x.flatten(0, -2)
    if refuses(flat, weight.T, bias) is not None:
        return F.linear(x, weight, bias)
    output: Tensor = _Product.apply(flat, weight, bias, _multiply_wide_by_tiles)
    return output.unflatten(0, x.shape[:-1])


def _few_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    from i3lm.ops.linear.numba import few_rows

    output = few_rows(x.reshape(-1, x.shape[-1]).float(), weight, bias)
    return output.view(*x.shape[:-1], -1).to(x.dtype)


def _mixed_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    low = None if bias is None else bias.to(weight.dtype)
    return F.linear(x.to(weight.dtype), weight, low).to(x.dtype)


def _tiles_refuse(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return f"runs on the CPU, not on {device.type}"
    if dtype != torch.float32:
        return f"serves float32, not {dtype}"
    if not torch.cpu._is_amx_tile_supported():  # before numba is loaded to say more
        return "this processor has no AMX"
    if torch.get_float32_matmul_precision() != "highest":
        return "PyTorch is told that float32 products may be less exact"
    return amx_refuses(device, torch.bfloat16)  # of which float32 numbers are made


class _Narrowed(torch.autograd.Function):
    """A product in autocast's dtype with a matrix that is kept in float32.

    Autocast would keep its copy of the matrix until its block ends, though no product needs it
    again; and the gradient stays in the dtype of the product where `gradient_dtype` allows.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, dtype):
        low = x.to(dtype)
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        output, matrix = _multiply_kept(low.flatten(0, -2), weight, bias)
        ctx.save_for_backward(low if wants_weight else None, matrix if wants_x else None)
        ctx.dtypes = x.dtype, gradient_dtype(weight), None if bias is None else bias.dtype
        return output.unflatten(0, x.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        low, matrix = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.dtypes
        wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
        flat, shape = grad.flatten(0, -2), grad.shape[:-1]
        if 0 in flat.stride():  # that of a sum is one number expanded
            flat = flat.contiguous()
        grad_x = grad_weight = grad_bias = None
        if wants_x:
            grad_x = multiply(flat, matrix)[0].unflatten(0, shape).to(of_x)
        if wants_weight:
            product, sums = multiply(flat.T, low.flatten(0, -2), wants_sums=wants_bias)
            grad_weight = product.to(of_weight or grad.dtype)
            grad_bias = None if sums is None else sums.to(of_bias)
        elif wants_bias:
            grad_bias = flat.sum(dim=0).to(of_bias)
        return grad_x, grad_weight, grad_bias, None


def _multiply_kept(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gives ``x @ weight.T + bias``, and the matrix that the gradient of x is to be taken with."""
    # Tiles narrow the matrix as they read it; else it is done once, not in each product.
    narrows = _served_by_tiles(x, weight.T, bias) and _served_by_tiles(
        x.new_empty(1, weight.shape[0]), weight
    )
    matrix = weight if narrows else weight.to(x.dtype)
    return multiply(x, matrix.T, bias)[0], matrix


def _served_by_tiles(
    x: Tensor, y: Tensor, bias: Tensor | None = None, wants_sums: bool = False
) -> bool:
    """Whether the kernel for AMX is chosen, and serves these."""
    if NARROW_PRODUCT.choose(x.device, x.dtype).implementation.name != "amx":
        return False
    from i3lm.ops.linear.amx import refuses

    return refuses(x, y, bias, wants_sums) is None


def multiply(
    x: Tensor, y: Tensor, bias: Tensor | None = None, wants_sums: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Gives ``x @ y + bias`` in the dtype of x, a narrow one, and the sums of x's rows or None.

    Without gradients of its own.

    Args:
        x: Shape (M, K), bfloat16 or float16.
        y: Shape (K, N), of that dtype or float32; taken as that.
        bias: Shape (N,), or None.
        wants_sums: Whether the sums are wanted, shape (M,).
    """
    implementation = NARROW_PRODUCT.choose(x.device, x.dtype).implementation
    return implementation.forward(x, y, bias, wants_sums)


def _multiply_by_tiles(
    x: Tensor, y: Tensor, bias: Tensor | None, wants_sums: bool
) -> tuple[Tensor, Tensor | None]:
    from i3lm.ops.linear import amx

    if amx.refuses(x, y, bias, wants_sums) is None:
        return amx.multiply(x, y, bias, wants_sums)
    return _multiply_by_library(x, y, bias, wants_sums)


def _multiply_by_library(
    x: Tensor, y: Tensor, bias: Tensor | None, wants_sums: bool
) -> tuple[Tensor, Tensor | None]:
    weight, sums = y.T.to(x.dtype), None
    low = None if bias is None else bias.to(x.dtype)
    # With tiles, oneDNN multiplies a transposed bfloat16 matrix at half speed: it is written down.
    # And a bias is best added by it at the end; PyTorch has the product added to what it wrote
    # everywhere before (benchmarks/NOTES.md).
    tiles = x.device.type == "cpu" and x.dtype == torch.bfloat16 and has_tiles()
    if tiles and x.stride(0) == 1 and numba_refuses_bits(x.device, x.dtype) is None:
        from i3lm.ops.linear.numba_transpose import transpose

        x, sums = transpose(x.T, wants_sums)
    elif wants_sums:
        sums = x.sum(dim=1, dtype=torch.float32)
    by_onednn = tiles and low is not None and low.shape == weight.shape[:1]
    return (_onednn_product if by_onednn else F.linear)(x, weight, low), sums


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@functools.cache
def has_tiles() -> bool:
    """Whether the processor multiplies tiles of bfloat16 (AMX), and PyTorch has oneDNN for it."""
    return _has_onednn() and bool(torch.cpu._is_amx_tile_supported())


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
        Implementation("amx", _by_tiles, refuses=_tiles_refuse),
        Implementation("onednn", _by_onednn, refuses=_onednn_refuses),
        Implementation("torch", F.linear),
    ],
)


# Of matrices in autocast's dtype.
NARROW_PRODUCT = Op(
    "narrow_product",
    [
        Implementation("amx", _multiply_by_tiles, refuses=amx_refuses),
        Implementation("torch", _multiply_by_library),
    ],
)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Gives ``x @ weight.T + bias``.

    PyTorch computes float32 products on a CPU with MKL, which keeps to AVX2 on processors that
    are not Intel's; oneDNN, in the same wheel, uses AVX512 on all that have it and is then about
    twice as fast, but on Intel's own the slower one. Where a processor has AMX, large float32
    products are sums of products of bfloat16 parts, no less exact and 1.3 to 1.6 times as fast as
    either, but for numbers near the ends of float32's range (`i3lm.ops.linear.amx_float32`).
    Without gradients, a few rows go through a kernel that reads the matrix at the speed of memory
    (benchmarks/NOTES.md). Under autocast on a CPU, products of a float32 weight and their
    gradients, which are not differentiated further, go to a kernel for AMX, or take the form in
    which oneDNN is fast.
    All other cases are `torch.nn.functional.linear`: accelerators, quantised weights, transforms of
    `torch.func`, and traced calls, which a compiler replaces anyway.

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
        or torch._C._are_functorch_transforms_active()
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
