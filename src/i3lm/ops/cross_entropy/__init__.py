"""The loss over a large vocabulary without ever holding all its logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from i3lm.ops.cross_entropy.reference import softmax_loss_reference
from i3lm.ops.dispatch import (
    Implementation,
    Op,
    accumulation_dtype,
    full_precision,
    gradient_dtype,
    numba_refuses_bits,
    product_dtype,
)
from i3lm.ops.linear import FEW_ROWS, has_tiles, linear

# Logits that exist at one time, in bytes: large pieces make efficient matrix products.
PIECE_BYTES = 96 * 2**20
# Logits at one time where they are computed twice, and the fewest columns of them.
SMALL_PIECE, FEWEST_COLUMNS = 2**22, 128
# What tiles of a processor's matrix unit make multiples of best.
SIDE = 32
# Rows of a piece from which on a transposed copy of the matrix is worth its writing.
MANY_ROWS = 512


def _numba(*inputs: Any) -> tuple[Tensor, ...]:
    from i3lm.ops.cross_entropy.numba import softmax_loss_numba

    return softmax_loss_numba(*inputs)


# From the logits of a piece, its loss; the gradient takes the logits' place.
SOFTMAX_LOSS = Op(
    "softmax_loss",
    [
        Implementation("numba", _numba, refuses=numba_refuses_bits),
        Implementation("reference", softmax_loss_reference),
    ],
)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    piece_bytes: int = PIECE_BYTES,
    recompute: bool = False,
) -> Tensor:
    """Gives ``cross_entropy(hidden @ weight.T + bias, labels)``, the mean in nats per token.

    The rows are taken in pieces whose logits fit in `piece_bytes`; where gradients are wanted,
    each piece's are computed while its logits are there, so nothing of size N x V is kept or
    computed twice. Products run in autocast's dtype; bias, softmax, loss and the gradients of
    weight and bias accumulate in float32 (float64 for float64 inputs).

    Args:
        hidden: Last hidden states, shape (N, C).
        weight: The head's matrix, shape (V, C).
        bias: The head's bias, shape (V,), or None.
        labels: Token ids to predict, shape (N,).
        ignore_index: The label of positions that do not count.
        piece_bytes: Most bytes of logits at one time (at least one row).
        recompute: Compute logits twice, in small pieces of the vocabulary, for less memory: neither
            they nor a copy of the matrix are ever there as a whole. Not in float16, nor where
            one such piece holds them all.

    Returns:
        The loss, a float32 (float64) scalar; 0 where no label counts.

    Raises:
        ValueError: Shapes that do not fit, or a label outside the vocabulary.
    """
    if hidden.dim() != 2 or labels.shape != hidden.shape[:1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} must have shape (N, C) and labels "
            f"{tuple(labels.shape)} shape (N,)"
        )
    if weight.shape[1:] != hidden.shape[1:] or (
        bias is not None and bias.shape != weight.shape[:1]
    ):
        shape = None if bias is None else tuple(bias.shape)
        raise ValueError(
            f"weight {tuple(weight.shape)} must have shape (V, {hidden.shape[1]}) and bias "
            f"{shape} shape (V,)"
        )
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        # An accelerator would stall for this check; there the gather itself fails.
        wrong = labels[(labels != ignore_index) & ((labels < 0) | (labels >= weight.shape[0]))]
        if len(wrong):
            raise ValueError(
                f"label {int(wrong[0])} is outside the vocabulary: labels run from 0 to "
                f"{weight.shape[0] - 1}, and {ignore_index} does not count"
            )
    dtype = product_dtype(hidden)
    recompute = recompute and dtype != torch.float16
    if recompute and len(_pieces_of(weight.shape[0], hidden.shape[0])) > 1:
        wants = torch.is_grad_enabled()
        return _InPiecesOfVocabulary.apply(hidden, weight, bias, labels, ignore_index, dtype, wants)
    most = max(1, piece_bytes // (dtype.itemsize * weight.shape[0]))
    multiple = SIDE if most >= SIDE else 1
    most -= most % multiple
    pieces = max(1, -(-hidden.shape[0] // most))
    # Equal pieces but for whole tiles: only the last may be smaller.
    rows = max(-(-hidden.shape[0] // pieces // multiple) * multiple, 1)
    # Inside the function PyTorch hides whether gradients are on.
    settings = (ignore_index, rows, dtype, torch.is_grad_enabled())
    return _LinearCrossEntropy.apply(hidden, weight, bias, labels, *settings)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, ignore_index, rows, dtype, grad_enabled):
        precise = accumulation_dtype(hidden.dtype)
        wants_hidden, wants_weight, wants_bias = (
            needed and grad_enabled for needed in ctx.needs_input_grad[:3]
        )
        wants = wants_hidden or wants_weight or wants_bias
        scale = 1 / (labels != ignore_index).sum().clamp_min(1).to(precise)
        weight_of_row, rest = scale, None
        if dtype == torch.float16:
            # Shares of 1/N would underflow, before any loss scaling. There a row weighs as much as
            # sums over the rows of a piece allow, and the rest of the scale comes afterwards.
            weight_of_row = min(1.0, 2048 / rows)
            rest = scale / weight_of_row
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_bias = weight.new_zeros(weight.shape[0], dtype=precise) if wants_bias else None
        grad_weight = None
        # Of one piece, the gradient may stay in the dtype of the product that gave it.
        as_it_comes = gradient_dtype(weight) is None and rows >= hidden.shape[0]
        summed = dtype if as_it_comes else precise
        total = hidden.new_zeros((), dtype=precise)
        # A compiler fuses the plain form itself.
        name = "reference" if torch.compiler.is_compiling() else None
        kernel = SOFTMAX_LOSS.choose(hidden.device, dtype, name).implementation
        softmax_loss = kernel.forward
        with full_precision(hidden.device):
            narrow, turned = _narrowed(weight, dtype, kernel, rows if wants_hidden else 0)
            offset = None if bias is None else bias.to(precise)
            for start in range(0, hidden.shape[0], rows):
                piece = slice(start, start + rows)
                x = hidden[piece].to(dtype)
                logits = _logits(x, narrow, kernel)
                marked = labels[piece]
                counts = marked != ignore_index
                (losses,) = softmax_loss(
                    logits,
                    offset,
                    marked.where(counts, 0),
                    counts * weight_of_row,
                    grad_bias,
                    wants,
                )
                total += losses.masked_fill(~counts, 0).sum() * scale
                # From here on, `logits` holds its own gradient.
                if grad_hidden is not None:
                    grad_hidden[piece] = _hidden_gradient(logits, narrow, turned)
                if start + rows >= hidden.shape[0]:
                    del narrow, turned  # their memory serves the gradient
                if wants_weight:
                    part = linear(logits.T, x.T)
                    grad_weight = part.to(summed) if grad_weight is None else grad_weight.add_(part)
                    del part
                del logits  # before those of the next piece
        if rest is not None:
            for grad in (grad_hidden, grad_weight, grad_bias):
                if grad is not None:
                    grad.mul_(rest)
        if wants_weight and grad_weight is None:  # not one row
            grad_weight = torch.zeros_like(weight, dtype=precise)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (hidden.dtype, gradient_dtype(weight), None if bias is None else bias.dtype)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        return (*_scaled(ctx, grad_loss), None, None, None, None, None)


def _narrowed(
    weight: Tensor, dtype: torch.dtype, kernel: Implementation, rows: int
) -> tuple[Tensor, Tensor | None]:
    """The head's matrix (V, C) in the dtype of products; and transposed, (C, V), where that pays.

    oneDNN multiplies tiles of bfloat16 (AMX) by a matrix that lies transposed at half speed, and
    the product for the gradients of hidden states is such (benchmarks/NOTES.md).
    """
    pays = kernel.name == "numba" and rows >= MANY_ROWS and has_tiles()
    if not pays or (weight.dtype, dtype) != (torch.float32, torch.bfloat16) or not _plain(weight):
        return weight.to(dtype), None
    from i3lm.ops.linear.numba_transpose import narrow_and_transpose

    return narrow_and_transpose(weight)


def _hidden_gradient(grad: Tensor, weight: Tensor, turned: Tensor | None) -> Tensor:
    """The gradient (R, C) of hidden states, from that of the logits (R, V)."""
    if turned is None:
        return linear(grad, weight.T)
    from i3lm.ops.linear.numba_transpose import transpose

    return transpose(torch.mm(turned, grad.T), wants_sums=False)[0]


def _plain(weight: Tensor) -> bool:
    return type(weight) in (Tensor, torch.nn.Parameter)  # others are quantised


def _logits(x: Tensor, weight: Tensor, kernel: Implementation) -> Tensor:
    """The logits of some rows, (R, V), as the kernel of the loss reads them best.

    Numba's has all rows of a token together. oneDNN gives them so in half the time where R is much
    smaller than V, and takes half the time for the gradient of the matrix (benchmarks/NOTES.md).
    """
    if kernel.name != "numba" or not _plain(weight) or x.shape[0] <= FEW_ROWS:
        return linear(x, weight)
    return linear(weight, x).T


def _scaled(ctx: Any, grad_loss: Tensor) -> list[Tensor | None]:
    """The gradients that a forward pass kept, times that of the loss."""
    # A last loss is usually differentiated as it is: spare the copies then. An accelerator
    # would stall for the comparison.
    plain = grad_loss.device.type == "cpu" and not torch.compiler.is_compiling()
    as_it_is = plain and grad_loss.item() == 1
    grads = [grad if grad is None or as_it_is else grad * grad_loss for grad in ctx.saved_tensors]
    return [
        g if g is None or d is None else g.to(d) for g, d in zip(grads, ctx.dtypes, strict=True)
    ]


class _InPiecesOfVocabulary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, ignore_index, dtype, grad_enabled):
        precise = accumulation_dtype(hidden.dtype)
        wants_hidden, wants_weight, wants_bias = (
            needed and grad_enabled for needed in ctx.needs_input_grad[:3]
        )
        wants = wants_hidden or wants_weight or wants_bias
        counts = labels != ignore_index
        scale = 1 / counts.sum().clamp_min(1).to(precise)
        grad_hidden = torch.zeros_like(hidden, dtype=precise) if wants_hidden else None
        grad_bias = weight.new_zeros(weight.shape[0], dtype=precise) if wants_bias else None
        grad_weight = None
        if wants_weight:
            grad_weight = torch.empty_like(weight, dtype=gradient_dtype(weight) or dtype)
        name = "reference" if torch.compiler.is_compiling() else None
        kernel = SOFTMAX_LOSS.choose(hidden.device, dtype, name).implementation
        softmax_loss = kernel.forward
        pieces = _pieces_of(weight.shape[0], hidden.shape[0])
        normalizer = hidden.new_full(labels.shape, float("-inf"), dtype=precise)
        right = torch.zeros_like(normalizer)  # the logit of every row's label
        with full_precision(hidden.device):
            x = hidden.to(dtype)
            for piece in pieces:
                logits = _logits(x, weight[piece].to(dtype), kernel)
                offset = None if bias is None else bias[piece].to(precise)
                here = _labels_in(piece, labels)
                (partial,) = softmax_loss(logits, offset, here, normalizer, None, False)
                column = here.clamp_min(0)
                own = logits.gather(1, column.unsqueeze(1)).squeeze(1).to(precise)
                own = (own if offset is None else own + offset[column]).where(here >= 0, 0)
                normalizer = torch.logaddexp(normalizer, partial + own)
                right += own
            total = (normalizer - right).where(counts, 0).sum() * scale
            for piece in pieces if wants else ():
                narrow = weight[piece].to(dtype)
                logits = _logits(x, narrow, kernel)
                offset = None if bias is None else bias[piece].to(precise)
                sums = None if grad_bias is None else grad_bias[piece]
                here, share = _labels_in(piece, labels), counts * scale
                softmax_loss(logits, offset, here, share, sums, True, normalizer)
                # From here on, `logits` holds its own gradient.
                if grad_hidden is not None:
                    grad_hidden += linear(logits, narrow.T)
                if grad_weight is not None:
                    grad_weight[piece] = linear(logits.T, x.T)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (hidden.dtype, gradient_dtype(weight), None if bias is None else bias.dtype)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        return (*_scaled(ctx, grad_loss), None, None, None, None)


def _labels_in(piece: slice, labels: Tensor) -> Tensor:
    """The column of every label in a piece of the vocabulary, or -1."""
    columns = labels - piece.start
    return columns.where((columns >= 0) & (labels < piece.stop), -1)


def _pieces_of(vocabulary: int, rows: int) -> list[slice]:
    """The vocabulary in equal pieces, of so many logits that they stay in cache."""
    most = max(FEWEST_COLUMNS, SMALL_PIECE // max(rows, 1))
    count = -(-vocabulary // most)
    size = -(-vocabulary // count)
    return [slice(start, min(start + size, vocabulary)) for start in range(0, vocabulary, size)]
