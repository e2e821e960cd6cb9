"""Softmax, loss and gradient of a piece of logits, in PyTorch, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from i3lm.ops.dispatch import accumulation_dtype

# The part of a piece that is in float32 at one time, in bytes: small ones stay in a processor's
# cache, and elsewhere each is a dozen launches, whatever its size.
SLICE_BYTES, LAUNCHED_SLICE_BYTES = 4 * 2**20, 64 * 2**20


def softmax_loss_reference(
    logits: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scale: Tensor,
    grad_bias: Tensor | None,
    wants_grad: bool,
    normalizer: Tensor | None = None,
) -> tuple[Tensor]:
    """Gives the loss of every row; the gradient of the logits takes their place.

    ``loss = logsumexp(z) - z[label]`` with ``z = logits + bias``; the gradient is
    ``scale * (softmax(z) - onehot(label))``.

    Args:
        logits: Shape (R, V), without bias; overwritten where `wants_grad`.
        bias: Shape (V,), float32 or float64, or None.
        labels: The right column of every row, shape (R,); -1 where it is in no column, as that of a
            part of the vocabulary may be: then the loss is the logsumexp alone.
        scale: What the row's gradient is multiplied by, shape (R,); 0 for rows that do not count.
        grad_bias: Where to add the gradient of the bias, shape (V,), or None.
        wants_grad: Whether to compute gradients.
        normalizer: The logsumexp of all the vocabulary, shape (R,), where the logits are a part; or
            None where they are the whole.

    Returns:
        The losses, shape (R,), float32 or float64.
    """
    precise = accumulation_dtype(logits.dtype)
    size = SLICE_BYTES if logits.device.type == "cpu" else LAUNCHED_SLICE_BYTES
    rows = max(1, size // (precise.itemsize * logits.shape[1]))
    losses = torch.empty(logits.shape[0], dtype=precise, device=logits.device)
    for start in range(0, logits.shape[0], rows):
        part = slice(start, start + rows)
        scores = logits[part].to(precise)
        if bias is not None:
            scores = scores + bias
        index = labels[part].unsqueeze(1)
        is_here, index = index >= 0, index.clamp_min(0)
        if normalizer is None:
            total = torch.logsumexp(scores, dim=1, keepdim=True)
        else:
            total = normalizer[part].unsqueeze(1)
        losses[part] = (total - scores.gather(1, index).where(is_here, 0)).squeeze(1)
        if wants_grad:
            grad = (scores - total).exp_()
            grad.scatter_add_(1, index, -is_here.to(precise))
            grad.mul_(scale[part].unsqueeze(1))
            if grad_bias is not None:
                grad_bias += grad.sum(dim=0)
            logits[part] = grad.to(logits.dtype)
    return (losses,)
