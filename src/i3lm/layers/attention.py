"""Causal self-attention."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from i3lm.layers.linear import Linear
from i3lm.ops import causal_attention

# What turns queries and keys: cosines and sines, each (B, 1, T, D).
Rotation = tuple[Tensor, Tensor]
# Stores new keys and values (B, H, T, D) and gives back all of them so far.
KeyValueStore = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class CausalSelfAttention(nn.Module):
    """Multi-head softmax attention over the past (arXiv:1706.03762, section 3.2), with biases.

    Weights are computed in tiles, so that memory grows with T and not with its square: by
    `i3lm.ops.causal_attention`, which keeps them for the backward pass up to a bound of bytes or
    computes them again, and by PyTorch's scaled_dot_product_attention with a mask or with earlier
    keys. A mask itself has T x S entries.

    Args:
        hidden_size: Width C of the residual stream.
        num_attention_heads: Heads H; must divide C.
        rank: If given, queries, keys and values each pass through a narrow middle of this size
            (two maps with biases), as in the v1 layer; the output map stays a full matrix.
    """

    def __init__(self, hidden_size: int, num_attention_heads: int, rank: int | None = None) -> None:
        super().__init__()
        if hidden_size % num_attention_heads:
            raise ValueError(
                f"num_attention_heads ({num_attention_heads}) must divide "
                f"hidden_size ({hidden_size})"
            )
        self.num_attention_heads = num_attention_heads
        if rank is None:
            self.query_key_value: nn.Module = Linear(hidden_size, 3 * hidden_size)
        else:
            self.query_key_value = _NarrowQueryKeyValue(hidden_size, rank)
        self.output = Linear(hidden_size, hidden_size)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        store: KeyValueStore | None = None,
        rotation: Rotation | None = None,
        first: Tensor | None = None,
    ) -> Tensor:
        """Maps (B, T, C) to (B, T, C).

        Args:
            x: Inputs, shape (B, T, C).
            mask: What each token may see, bool (True may) or additive, broadcastable to
                (B, H, T, S). None means the causal rule alone.
            store: Where keys and values are kept between calls, or None.
            rotation: What `RotaryEmbedding` gives for the tokens' positions, or None.
            first: Where no mask and no store is given, the earliest token that each token sees,
                int64, shape (B, T), or None.
        """
        B, T, C = x.shape
        H = self.num_attention_heads
        heads = self.query_key_value(x).view(B, T, 3, H, C // H)
        query, key, value = (part.transpose(1, 2) for part in heads.unbind(2))  # (B, H, T, D) each
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        if store is not None:
            key, value = store(key, value)
        S = key.shape[2]
        if mask is None and 1 < T < S:  # new tokens after stored ones: causal from the far end
            mask = torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T)
        if mask is None and T > 1:  # one new token may see everything
            mixed = causal_attention(query, key, value, first=first)
        else:
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.output(mixed.transpose(1, 2).reshape(B, T, C))


class RotaryEmbedding(nn.Module):
    """Rotary positions (arXiv:2104.09864, section 3.2.2).

    At position p, channels i and i + D/2 of a head turn by the angle ``p theta^(-2i/D)`` (the
    pairs of transformers' models), so that scores depend on distances alone.

    Args:
        head_dim: Channels D per head, an even number.
        theta: Base of the frequencies.
    """

    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        # Plain numbers, so that a cast of the model to bfloat16 leaves them alone.
        self.frequencies = [theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]

    @torch.no_grad()
    def forward(self, position_ids: Tensor, dtype: torch.dtype = torch.float32) -> Rotation:
        """Maps positions (B, T) to cosines and sines, each (B, 1, T, D), of the dtype."""
        # float32 cannot tell neighbouring angles apart a few hundred thousand tokens on.
        exact = torch.float32 if position_ids.device.type == "mps" else torch.float64
        frequencies = torch.tensor(self.frequencies, dtype=exact, device=position_ids.device)
        angles = position_ids[:, None, :, None] * frequencies  # (B, 1, T, D/2)
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turns the channels of queries or keys (B, H, T, D) by the angles of their positions."""
    cosine, sine = rotation
    low, high = x.chunk(2, dim=-1)
    return (x * cosine + torch.cat([-high, low], dim=-1) * sine).to(x.dtype)


class _NarrowQueryKeyValue(nn.Module):
    """Queries, keys and values through a narrow middle each: (B, T, C) to (B, T, 3 C)."""

    def __init__(self, hidden_size: int, rank: int) -> None:
        super().__init__()
        self.narrow = nn.ModuleList(Linear(hidden_size, rank) for _ in range(3))
        self.widen = nn.ModuleList(Linear(rank, hidden_size) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        parts = [widen(narrow(x)) for narrow, widen in zip(self.narrow, self.widen, strict=True)]
        return torch.cat(parts, dim=-1)
