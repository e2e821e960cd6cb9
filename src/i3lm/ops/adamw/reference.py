"""Gradient norm and AdamW in PyTorch, tensor by tensor, on any device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from i3lm.ops.adamw.float8 import decode, encode

if TYPE_CHECKING:
    from i3lm.ops.adamw import AdamWSettings


# Odd numbers with bits all over, for a hash of 32 bits: the first spreads what is counted, the
# others are those of MurmurHash3's last mix (Appleby).
HASH_FACTORS = 0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35
_WORD = 0xFFFFFFFF


def rounding_key(tensor: int, step: int) -> int:
    """What the random bits of a tensor in a step begin with: a hash of both numbers."""
    return _mixed(step * HASH_FACTORS[1] + _mixed(tensor * HASH_FACTORS[0] & _WORD) & _WORD)


def random_bits(size: int, key: int) -> Tensor:
    """32 random bits for every place of a tensor, as int64, shape (size,): a hash of the places."""
    return _mixed(torch.arange(size) * HASH_FACTORS[0] + key & _WORD)


def _mixed(x: Any) -> Any:
    for shift, factor in zip((16, 13), HASH_FACTORS[1:], strict=True):
        x = ((x ^ (x >> shift)) * factor) & _WORD
    return x ^ (x >> 16)


def _read(average: Tensor, like: Tensor, signed: bool) -> Tensor:
    if average.dtype == torch.uint8:
        return decode(average, signed, like.shape).to(like.dtype)
    return average.to(like.dtype)


def _put(target: Tensor, value: Tensor, signed: bool, random: Tensor | None) -> None:
    """Writes float32 numbers into narrow ones, each up or down as 16 random bits say."""
    if random is None:
        target.copy_(value)
        return
    if target.dtype == torch.uint8:
        target.copy_(encode(value, signed, random.to(value.device)))
        return
    bits = value.float().view(torch.int32).flatten() + random.to(value.device).int()
    target.copy_((bits & ~0xFFFF).view(torch.float32).view_as(target))


def gradient_norm_reference(gradients: Sequence[Tensor]) -> float:
    """The square root of the sum of all squares."""
    squares = [gradient.double().square().sum() for gradient in gradients]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0


def adamw_step_reference(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    averages: Sequence[Tensor],
    squares: Sequence[Tensor],
    settings: Sequence[AdamWSettings],
    scale: float,
) -> None:
    """Changes parameters and averages in place; `i3lm.ops.adamw.adamw_step` has the equations."""
    for i, (p, gradient, m, v, s) in enumerate(
        zip(parameters, gradients, averages, squares, settings, strict=True)
    ):
        g = gradient.to_dense().to(p.dtype) * scale
        beta1, beta2 = s.betas
        mean = _read(m, p, True).lerp(g, 1 - beta1)
        mean_square = (_read(v, p, False) * beta2).addcmul_(g, g, value=1 - beta2)
        spread = (mean_square / (1 - beta2**s.step)).sqrt_().add_(s.eps)
        p.mul_(1 - s.learning_rate * s.weight_decay)
        p.addcdiv_(mean, spread, value=-s.learning_rate / (1 - beta1**s.step))
        low = high = None
        if m.dtype in (torch.bfloat16, torch.uint8):
            random = random_bits(p.numel(), rounding_key(i, s.step))
            low, high = random & 0xFFFF, random >> 16
        _put(m, mean, True, low)
        _put(v, mean_square, False, high)
