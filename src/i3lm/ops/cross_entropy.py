"""The loss over a large vocabulary without ever holding all its logits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# Logits that exist at one time, in bytes: large pieces make efficient matrix products.
PIECE_BYTES = 64 * 2**20
# The part of a piece that is in float32 at one time: small ones stay in the processor's cache.
SOFTMAX_BYTES = 4 * 2**20


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
    computed twice. Products run in autocast's dtype; softmax, loss and the gradients of weight
    and bias accumulate in float32 (float64 for float64 inputs).

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
        ValueError: Shapes that do not fit.
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
    dtype = hidden.dtype
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
    rows = max(1, piece_bytes // (dtype.itemsize * weight.shape[0]))
    return _LinearCrossEntropy.apply(hidden, weight, bias, labels, ignore_index, rows, dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, ignore_index, rows, dtype):
        precise = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        device, V = hidden.device, weight.shape[0]
        scale = 1 / (labels != ignore_index).sum().clamp_min(1).to(precise)
        wants = any(ctx.needs_input_grad[:3])
        grad_hidden = torch.empty_like(hidden if wants else hidden[:0])
        grad_weight = torch.zeros(weight.shape if wants else 0, dtype=precise, device=device)
        grad_bias = torch.zeros(V if wants else 0, dtype=precise, device=device)
        total = torch.zeros((), dtype=precise, device=device)
        inner = max(1, SOFTMAX_BYTES // (4 * V))
        with torch.autocast(device.type, enabled=False):
            narrow = weight.to(dtype)
            offset = None if bias is None else bias.to(dtype)
            for start in range(0, hidden.shape[0], rows):
                piece = slice(start, start + rows)
                x = hidden[piece].to(dtype)
                logits = F.linear(x, narrow, offset)  # (rows, V)
                for low in range(0, logits.shape[0], inner):
                    part = logits[low : low + inner]
                    label = labels[piece][low : low + inner]
                    counts = label != ignore_index
                    index = label.where(counts, 0).unsqueeze(1)
                    scores = part.to(precise)
                    normalizer = torch.logsumexp(scores, dim=1, keepdim=True)
                    losses = (normalizer - scores.gather(1, index)).squeeze(1)
                    total += losses.masked_fill(~counts, 0).sum()
                    if not wants:
                        continue
                    # The gradient of the logits, softmax minus the label's one, takes their place.
                    grad = scores.sub_(normalizer).exp_()
                    grad.scatter_add_(1, index, grad.new_full((1, 1), -1).expand_as(index))
                    grad.mul_((counts * scale).unsqueeze(1))
                    grad_bias += grad.sum(dim=0)
                    part.copy_(grad)
                if wants:
                    grad_hidden[piece] = logits @ narrow
                    grad_weight += logits.T @ x
        if wants:
            ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return total * scale

    @staticmethod
    def backward(ctx, grad_loss):
        wanted = (None if dtype is None else dtype for dtype in ctx.dtypes)
        grads = [
            None if dtype is None else (grad * grad_loss).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, wanted, strict=True)
        ]
        return (*grads, None, None, None, None)
