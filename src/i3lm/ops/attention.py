"""Softmax attention, with a form of its own where PyTorch's is slow."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from i3lm.ops.dispatch import Implementation, Op

# Queries per tile: the causal rule lets a tile skip all later keys, and few rows stay in cache.
TILE = 128


def _tiles_refuse(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return f"runs on the CPU, not on {device.type}"
    if dtype != torch.bfloat16:
        return f"gains nothing in {dtype}"
    return None


def _weights(query: Tensor, key: Tensor, start: int) -> Tensor:
    """Softmax weights (N, R, S) of queries at positions `start` on, over keys 0 to S - 1."""
    R, S = query.shape[1], key.shape[1]
    later = torch.full((R, S), float("-inf"), dtype=query.dtype).triu(start + 1)
    scores = torch.baddbmm(later, query, key.mT, alpha=query.shape[2] ** -0.5)
    return torch.softmax(scores, dim=-1)


class _CausalTiles(torch.autograd.Function):
    """Causal attention by tiles of queries, (N, T, D) each; the backward pass recomputes them."""

    @staticmethod
    def forward(ctx, query, key, value):
        output = torch.empty_like(value)
        for start in range(0, query.shape[1], TILE):
            rows = slice(start, start + TILE)
            seen = slice(0, min(start + TILE, query.shape[1]))
            output[:, rows] = _weights(query[:, rows], key[:, seen], start) @ value[:, seen]
        ctx.save_for_backward(query, key, value)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        query, key, value = ctx.saved_tensors
        scale = query.shape[2] ** -0.5
        grad_query = torch.empty_like(query)
        # Later tiles add to earlier keys: sums of many parts, hence float32.
        grad_key = torch.zeros_like(key, dtype=torch.float32)
        grad_value = torch.zeros_like(value, dtype=torch.float32)
        with torch.autocast("cpu", enabled=False):
            for start in range(0, query.shape[1], TILE):
                rows = slice(start, start + TILE)
                seen = slice(0, min(start + TILE, query.shape[1]))
                weights = _weights(query[:, rows], key[:, seen], start)
                grad_value[:, seen] += weights.mT @ grad[:, rows]
                grad_weights = grad[:, rows] @ value[:, seen].mT
                grad_scores = torch._softmax_backward_data(
                    grad_weights, weights, -1, weights.dtype
                ).mul_(scale)
                grad_query[:, rows] = grad_scores @ key[:, seen]
                grad_key[:, seen] += grad_scores.mT @ query[:, rows]
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)


def _causal_tiles(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    B, H, T, D = query.shape
    folded = (x.reshape(B * H, T, D) for x in (query, key, value))
    with torch.autocast("cpu", enabled=False):
        return _CausalTiles.apply(*folded).view(B, H, T, D)


def _causal_torch(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


CAUSAL_ATTENTION = Op(
    "causal_attention",
    [
        Implementation("tiles", _causal_tiles, refuses=_tiles_refuse),
        Implementation("torch", _causal_torch),
    ],
)


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Gives ``softmax(q k^T / sqrt(D)) v`` where position t sees positions 0 to t.

    `scaled_dot_product_attention` of PyTorch 2.13 multiplies bfloat16 on a CPU without the
    processor's bfloat16 instructions; batched products have them and are two to three times as
    fast, forward and backward (benchmarks/NOTES.md). Tiles of queries keep memory linear in T;
    scores are rounded to bfloat16 before the softmax, as in eager attention.

    Args:
        query: Shape (B, H, T, D).
        key: Shape (B, H, T, D).
        value: Shape (B, H, T, D).

    Returns:
        Shape (B, H, T, D).
    """
    if torch.compiler.is_compiling():
        return _causal_torch(query, key, value)
    return CAUSAL_ATTENTION.choose(query.device, query.dtype).implementation.forward(
        query, key, value
    )
