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
from i3lm.ops.linear import linear

# Logits that exist at one time, in bytes: large pieces make efficient matrix products.
PIECE_BYTES = 96 * 2**20


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
    most = max(1, piece_bytes // (dtype.itemsize * weight.shape[0]))
    pieces = max(1, -(-hidden.shape[0] // most))
    rows = max(1, -(-hidden.shape[0] // pieces))  # equal pieces: no small one at the end
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
        softmax_loss = SOFTMAX_LOSS.choose(hidden.device, dtype, name).implementation.forward
        with full_precision(hidden.device):
            narrow = weight.to(dtype)
            offset = None if bias is None else bias.to(precise)
            for start in range(0, hidden.shape[0], rows):
                piece = slice(start, start + rows)
                x = hidden[piece].to(dtype)
                logits = linear(x, narrow)  # (rows, V)
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
                    grad_hidden[piece] = linear(logits, narrow.T)
                if start + rows >= hidden.shape[0]:
                    del narrow  # its memory serves the gradient
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
        # A last loss is usually differentiated as it is: spare the copies then. An accelerator
        # would stall for the comparison.
        plain = grad_loss.device.type == "cpu" and not torch.compiler.is_compiling()
        as_it_is = plain and grad_loss.item() == 1
        grads = [
            grad if grad is None or as_it_is else grad * grad_loss for grad in ctx.saved_tensors
        ]
        grads = [
            g if g is None or d is None else g.to(d) for g, d in zip(grads, ctx.dtypes, strict=True)
        ]
        return (*grads, None, None, None, None, None)
