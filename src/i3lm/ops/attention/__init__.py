"""Softmax attention, with a form of its own where PyTorch's is slow."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from i3lm.ops.attention.tiles import causal_tiles
from i3lm.ops.dispatch import Implementation, Op, amx_refuses, numba_refuses_bits


def _causal_amx(query: Tensor, key: Tensor, value: Tensor, first: Tensor | None) -> Tensor:
    from i3lm.ops.attention.amx import causal_amx

    return causal_amx(query, key, value, first)


def _causal_numba(query: Tensor, key: Tensor, value: Tensor, first: Tensor | None) -> Tensor:
    from i3lm.ops.attention.numba import softmax_numba

    return causal_tiles(query, key, value, first, softmax_numba)


def _numba_refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype != torch.bfloat16:
        return f"serves bfloat16, not {dtype}"
    return numba_refuses_bits(device, dtype)


def _tiles_refuse(device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype != torch.bfloat16 and device.type == "cpu":
        return f"gains nothing in {dtype}"
    return _packed_tiles_refuse(device, dtype)


def _packed_tiles_refuse(device: torch.device, dtype: torch.dtype) -> str | None:
    # Passing over the keys of other documents pays in every dtype.
    return None if device.type == "cpu" else f"runs on the CPU, not on {device.type}"


def _causal_torch(query: Tensor, key: Tensor, value: Tensor, first: Tensor | None) -> Tensor:
    if first is None:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)
    places = torch.arange(query.shape[2], device=query.device)
    sees = (places <= places[:, None]) & (places >= first[..., None])  # (B, T, T)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=sees.unsqueeze(1))


CAUSAL_ATTENTION = Op(
    "causal_attention",
    [
        Implementation("amx", _causal_amx, refuses=amx_refuses),
        Implementation("numba", _causal_numba, refuses=_numba_refuses),
        Implementation("tiles", causal_tiles, refuses=_tiles_refuse),
        Implementation("torch", _causal_torch),
    ],
)
PACKED_ATTENTION = Op(
    "packed_attention",
    [
        Implementation("amx", _causal_amx, refuses=amx_refuses),
        Implementation("numba", _causal_numba, refuses=_numba_refuses),
        Implementation("tiles", causal_tiles, refuses=_packed_tiles_refuse),
        Implementation("torch", _causal_torch),
    ],
)


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, *, first: Tensor | None = None
) -> Tensor:
    """Gives ``softmax(q k^T / sqrt(D)) v`` where position t sees positions first_t to t.

    `scaled_dot_product_attention` of PyTorch 2.13 multiplies bfloat16 on a CPU without the
    processor's bfloat16 instructions; batched products have them and are two to three times as
    fast, forward and backward, and a kernel for AMX again as much (benchmarks/NOTES.md). Tiles of
    queries keep memory linear in T. By batched products, scores are rounded to bfloat16 before the
    softmax, as in eager attention; by AMX they are not.

    Args:
        query: Shape (B, H, T, D).
        key: Shape (B, H, T, D).
        value: Shape (B, H, T, D).
        first: The earliest position that each position sees, at most itself, shape (B, T), int64:
            where its document begins, or its window, perhaps before 0. None means 0 for all.

    Returns:
        Shape (B, H, T, D).

    Raises:
        ValueError: Shapes or dtypes that do not fit together.
    """
    B, _, T, _ = query.shape
    for name, x in (("key", key), ("value", value)):
        if x.shape != query.shape or x.dtype != query.dtype:  # kernels follow addresses
            raise ValueError(
                f"{name} ({x.dtype}, {tuple(x.shape)}) must be as query ({query.dtype}, "
                f"{tuple(query.shape)})"
            )
    if first is not None and (first.shape != (B, T) or first.dtype != torch.int64):
        raise ValueError(
            f"first ({first.dtype}, {tuple(first.shape)}) must be torch.int64 of shape {(B, T)}"
        )
    if torch.compiler.is_compiling():
        return _causal_torch(query, key, value, first)
    op = CAUSAL_ATTENTION if first is None else PACKED_ATTENTION
    implementation = op.choose(query.device, query.dtype).implementation
    if first is not None:
        first = first.clamp_min(0)
    return implementation.forward(query, key, value, first)
