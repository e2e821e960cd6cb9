"""Softmax attention, with a form of its own where PyTorch's is slow."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from i3lm.ops.dispatch import Implementation, Op, accumulation_dtype

# Queries per tile: the causal rule lets a tile skip all later keys, and few rows stay in cache.
TILE = 128
# Heads per tile where rows differ in what they see: as many rows as make these are computed at
# once, since small products leave the cores waiting, and no more, since each skips other keys.
HEADS = 32


def _tiles_refuse(device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype != torch.bfloat16 and device.type == "cpu":
        return f"gains nothing in {dtype}"
    return _packed_tiles_refuse(device, dtype)


def _packed_tiles_refuse(device: torch.device, dtype: torch.dtype) -> str | None:
    # Passing over the keys of other documents pays in every dtype.
    return None if device.type == "cpu" else f"runs on the CPU, not on {device.type}"


# Softmax weights are kept for the backward pass up to so many bytes a call, else computed again.
KEPT_BYTES = 16 * 2**20

# Rows of batch and heads, queries, keys, and what the scores start from: 0, and minus infinity
# where a query does not see a key.
_Tile = tuple[slice, slice, slice, Tensor]


def _tiles(query: Tensor, first: Tensor | None, heads: int) -> Iterator[_Tile]:
    """Cuts queries (B H, T, D) into tiles, each with the keys that any of its queries sees."""
    T, together = query.shape[1], max(1, HEADS // heads)
    for start in range(0, T, TILE):
        rows = slice(start, min(start + TILE, T))
        if first is None:
            hidden = query.new_full((rows.stop - start, rows.stop), float("-inf")).triu(start + 1)
            yield slice(None), rows, slice(0, rows.stop), hidden
            continue
        places = torch.arange(rows.stop)
        for b in range(0, len(first), together):
            part = first[b : b + together, rows, None]
            begin = int(part.min())
            keys = places[begin:]
            sees = (keys <= places[rows, None]) & (keys >= part)  # (rows of the batch, R, S)
            hidden = query.new_zeros(sees.shape).masked_fill_(~sees, float("-inf"))
            batch = slice(b * heads, (b + together) * heads)
            yield batch, rows, slice(begin, rows.stop), hidden.repeat_interleave(heads, dim=0)


def _weights(query: Tensor, key: Tensor, hidden: Tensor) -> Tensor:
    """Softmax weights (N, R, S) of the queries of a tile over its keys."""
    scores = torch.baddbmm(hidden, query, key.mT, alpha=query.shape[2] ** -0.5)
    return torch.softmax(scores, dim=-1)


class _CausalTiles(torch.autograd.Function):
    """Causal attention by tiles of queries, (N, T, D) each."""

    @staticmethod
    def forward(ctx, query, key, value, first, heads):
        output = torch.empty_like(value)
        N, T, _ = query.shape
        weights_bytes = N * T * (T + TILE) // 2 * query.dtype.itemsize
        keeps = first is None and weights_bytes <= KEPT_BYTES and any(ctx.needs_input_grad)
        kept = []
        for n, rows, seen, hidden in _tiles(query, first, heads):
            weights = _weights(query[n, rows], key[n, seen], hidden)
            output[n, rows] = weights @ value[n, seen]
            if keeps:
                kept.append(weights)
        ctx.save_for_backward(query, key, value, first, *kept)
        ctx.heads = heads
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        query, key, value, first, *kept = ctx.saved_tensors
        scale = query.shape[2] ** -0.5
        grad_query = torch.empty_like(query)
        # Later tiles add to earlier keys: sums of many parts, hence no bfloat16.
        grad_key, grad_value = (
            torch.zeros_like(x, dtype=accumulation_dtype(x.dtype)) for x in (key, value)
        )
        with torch.autocast("cpu", enabled=False):
            for i, (n, rows, seen, hidden) in enumerate(_tiles(query, first, ctx.heads)):
                weights = kept[i] if kept else _weights(query[n, rows], key[n, seen], hidden)
                grad_value[n, seen] += weights.mT @ grad[n, rows]
                grad_weights = grad[n, rows] @ value[n, seen].mT
                grad_scores = torch._softmax_backward_data(
                    grad_weights, weights, -1, weights.dtype
                ).mul_(scale)
                grad_query[n, rows] = grad_scores @ key[n, seen]
                grad_key[n, seen] += grad_scores.mT @ query[n, rows]
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), None, None


def _causal_tiles(query: Tensor, key: Tensor, value: Tensor, first: Tensor | None) -> Tensor:
    B, H, T, D = query.shape
    folded = (x.reshape(B * H, T, D) for x in (query, key, value))
    with torch.autocast("cpu", enabled=False):
        return _CausalTiles.apply(*folded, first, H).view(B, H, T, D)


def _causal_torch(query: Tensor, key: Tensor, value: Tensor, first: Tensor | None) -> Tensor:
    if first is None:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)
    places = torch.arange(query.shape[2], device=query.device)
    sees = (places <= places[:, None]) & (places >= first[..., None])  # (B, T, T)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=sees.unsqueeze(1))


CAUSAL_ATTENTION = Op(
    "causal_attention",
    [
        Implementation("tiles", _causal_tiles, refuses=_tiles_refuse),
        Implementation("torch", _causal_torch),
    ],
)
PACKED_ATTENTION = Op(
    "packed_attention",
    [
        Implementation("tiles", _causal_tiles, refuses=_packed_tiles_refuse),
        Implementation("torch", _causal_torch),
    ],
)


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, *, first: Tensor | None = None
) -> Tensor:
    """Gives ``softmax(q k^T / sqrt(D)) v`` where position t sees positions first_t to t.

    `scaled_dot_product_attention` of PyTorch 2.13 multiplies bfloat16 on a CPU without the
    processor's bfloat16 instructions; batched products have them and are two to three times as
    fast, forward and backward (benchmarks/NOTES.md). Tiles of queries keep memory linear in T;
    scores are rounded to bfloat16 before the softmax, as in eager attention.

    Args:
        query: Shape (B, H, T, D).
        key: Shape (B, H, T, D).
        value: Shape (B, H, T, D).
        first: The earliest position that each position sees, at most itself, shape (B, T), int64:
            where its document begins, or its window. None means 0 for all.

    Returns:
        Shape (B, H, T, D).

    Raises:
        ValueError: `first` has another shape or dtype.
    """
    B, _, T, _ = query.shape
    if first is not None and (first.shape != (B, T) or first.dtype != torch.int64):
        raise ValueError(
            f"first ({first.dtype}, {tuple(first.shape)}) must be torch.int64 of shape {(B, T)}"
        )
    if torch.compiler.is_compiling():
        return _causal_torch(query, key, value, first)
    op = CAUSAL_ATTENTION if first is None else PACKED_ATTENTION
    implementation = op.choose(query.device, query.dtype).implementation
    return implementation.forward(query, key, value, first)
