"""Causal attention by batched products in tiles of queries, each with the keys that it sees."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from i3lm.ops.dispatch import accumulation_dtype

# Queries per tile: the causal rule lets a tile skip all later keys, and few rows stay in cache.
TILE = 128
# Heads per tile where rows differ in what they see: as many rows as make these are computed at
# once, since small products leave the cores waiting, and no more, since each skips other keys.
HEADS = 32
# Softmax weights are kept for the backward pass up to so many bytes a call, else computed again.
KEPT_BYTES = 16 * 2**20


class Tile(NamedTuple):
    """A part of the queries, and the keys that any of them sees.

    Attributes:
        batch: Rows of the batch.
        rows: Places of the queries.
        seen: Places of the keys, up to the last query's own.
        first: The first of these keys that each query sees, (rows of the batch, R), or None for
            all from the beginning.
    """

    batch: slice
    rows: slice
    seen: slice
    first: Tensor | None

    @property
    def before(self) -> int:
        """How many of the keys stand before the first query."""
        return self.rows.start - self.seen.start


# `softmax_torch`, or another of its kind.
Softmax = Callable[[Tensor, Tensor | None, int, int, float], Tensor]


def softmax_torch(
    scores: Tensor, first: Tensor | None, heads: int, before: int, scale: float
) -> Tensor:
    """Gives ``softmax(scale scores)`` over the keys that each query sees, and 0 for the others.

    Args:
        scores: Products of queries and keys, shape (N, R, S); may be overwritten.
        first: The first key that each query sees, shape (N / heads, R), or None for 0.
        heads: Heads per row of the batch.
        before: Query r sees keys up to ``before + r``.
        scale: What scores are multiplied by.
    """
    R, S = scores.shape[1:]
    places = torch.arange(S)
    hidden = places > places[before : before + R, None]  # (R, S)
    if first is not None:
        hidden = (hidden | (places < first[..., None])).repeat_interleave(heads, dim=0)
    exact = scores.to(accumulation_dtype(scores.dtype)) * scale
    weights = torch.softmax(exact.masked_fill_(hidden, float("-inf")), dim=-1)
    return weights.to(scores.dtype)


def _tiles(T: int, first: Tensor | None, heads: int) -> Iterator[Tile]:
    together = max(1, HEADS // heads)
    for start in range(0, T, TILE):
        rows = slice(start, min(start + TILE, T))
        if first is None:
            yield Tile(slice(None), rows, slice(0, rows.stop), None)
            continue
        for b in range(0, len(first), together):
            part = first[b : b + together, rows]
            begin = int(part.min())
            yield Tile(slice(b, b + together), rows, slice(begin, rows.stop), part - begin)


class _CausalTiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, first, softmax):
        B, H, T, D = query.shape
        # As the next matrix wants it: the heads of a token side by side.
        output = value.new_empty(B, T, H, D).transpose(1, 2)
        weights_bytes = B * H * T * (T + TILE) // 2 * query.dtype.itemsize
        keeps = first is None and weights_bytes <= KEPT_BYTES and any(ctx.needs_input_grad)
        kept = []
        # Copies that the products would make anyway, of keys and values for every tile.
        keys, values = key.contiguous(), value.contiguous()
        for tile in _tiles(T, first, H):
            weights = _weights(query, keys, tile, softmax)
            mixed = weights @ _part(values, tile.batch, tile.seen)
            output[tile.batch, :, tile.rows] = mixed.unflatten(0, (-1, H))
            if keeps:
                kept.append(weights)
        ctx.save_for_backward(query, key, value, first, *kept)
        ctx.softmax = softmax
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        query, key, value, first, *kept = ctx.saved_tensors
        H, T, D = query.shape[1:]
        scale = D**-0.5  # of the scores: multiplies what is smaller than they are
        grad_query = query.new_empty(query.shape)
        # Later tiles add to earlier keys: sums of many parts, hence no bfloat16.
        grad_key, grad_value = (
            x.new_zeros(x.shape, dtype=accumulation_dtype(x.dtype)) for x in (key, value)
        )
        key, value = key.contiguous(), value.contiguous()
        with torch.autocast("cpu", enabled=False):
            for i, tile in enumerate(_tiles(T, first, H)):
                batch, rows, seen, _ = tile
                weights = kept[i] if kept else _weights(query, key, tile, ctx.softmax)
                grad_rows = _part(grad, batch, rows)
                _part(grad_value, batch, seen).add_(weights.mT @ grad_rows)
                grad_scores = _softmax_backward(grad_rows @ _part(value, batch, seen).mT, weights)
                part = grad_scores @ _part(key, batch, seen)
                torch.mul(part, scale, out=_part(grad_query, batch, rows))
                _part(grad_key, batch, seen).add_(grad_scores.mT @ _part(query, batch, rows))
        found = (grad_query, grad_key.mul_(scale).to(key.dtype), grad_value.to(value.dtype))
        return (*found, None, None)


def _softmax_backward(grad: Tensor, weights: Tensor) -> Tensor:
    """The gradient of the scores, in place of that of the weights."""
    backward = torch.ops.aten._softmax_backward_data.out
    return backward(grad, weights, -1, weights.dtype, grad_input=grad)


def _part(x: Tensor, batch: slice, places: slice) -> Tensor:
    """Some rows and places of (B, H, T, D) with the heads in one dimension: a view if it can be."""
    return x[batch, :, places].flatten(0, 1)


def _weights(query: Tensor, key: Tensor, tile: Tile, softmax: Softmax) -> Tensor:
    scores = _part(query, tile.batch, tile.rows) @ _part(key, tile.batch, tile.seen).mT
    return softmax(scores, tile.first, query.shape[1], tile.before, query.shape[3] ** -0.5)


def causal_tiles(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: Tensor | None,
    softmax: Softmax = softmax_torch,
) -> Tensor:
    """Computes `i3lm.ops.causal_attention` with a softmax of its own; see there."""
    with torch.autocast("cpu", enabled=False):
        return _CausalTiles.apply(query, key, value, first, softmax)
