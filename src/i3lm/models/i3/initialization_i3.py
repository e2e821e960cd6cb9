"""How new weights are drawn: the original code's way, or RWKV-4's own."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import initialization as init

from i3lm.layers import (
    CausalSelfAttention,
    ChannelMix,
    FeedForward,
    HybridMixer,
    LowRankLinear,
    TimeMix,
)


def initialize_original(module: nn.Module, std: float) -> None:
    """Draws one module's own parameters as the released open-i3 code does.

    Matrices and embeddings normal, biases zero; the hybrid mixer's average 0.5, D 0.1, A, B, C
    normal with deviation 0.01; an RWKV layer without token shift, bonus 1, log decay rates
    uniform in (-6, -3).
    """
    if isinstance(module, nn.Linear | nn.Embedding):
        init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        init.ones_(module.weight)
        init.zeros_(module.bias)
    elif isinstance(module, LowRankLinear):
        init.normal_(module.lora_A, std=std)
        init.normal_(module.lora_B, std=std)
        init.zeros_(module.bias)
    elif isinstance(module, HybridMixer):
        init.constant_(module.mix, 0.5)
        init.constant_(module.D, 0.1)
        for matrix in (module.A, module.B, module.C):
            init.normal_(matrix, std=0.01)
    elif isinstance(module, TimeMix):
        init.uniform_(module.time_decay, -6.0, -3.0)
        init.ones_(module.time_first)
        for shift in (module.time_mix_key, module.time_mix_value, module.time_mix_receptance):
            init.ones_(shift)
    elif isinstance(module, ChannelMix):
        init.ones_(module.time_mix_key)
        init.ones_(module.time_mix_receptance)


def initialize_rwkv(parts: list[nn.Module], layer_idx: int, num_layers: int) -> None:
    """Re-draws the parts of one layer in the way of RWKV-4's training code.

    With ``d = layer / (layers - 1)``, ``r = 1 - layer / layers`` and ``c = channel / C``:

    - log decay rate ``-5 + 8 (channel / (C - 1))^(0.7 + 1.3 d)``, slow channels to fast ones;
    - bonus ``log 0.3`` plus -0.5, 0 or 0.5 by turns, given here with the i3 family's sign;
    - token shift ``c^r`` for keys, ``c^r + 0.3 d`` for values, ``c^(r/2)`` for receptances;
    - zero keys, receptances and outputs, so that every layer begins as the identity.

    The rule is from RWKV-LM (https://github.com/BlinkDL/RWKV-LM, RWKV-v4/src/model.py). Ours
    goes further in two places that RWKV-4 does not have: attention and GELU networks begin
    with zero outputs too, and the hybrid mixer's running average gets the same graded decays.
    """
    depth = layer_idx / max(num_layers - 1, 1)
    remaining = 1 - layer_idx / num_layers
    for part in parts:
        if isinstance(part, TimeMix):
            C = part.time_decay.shape[0]
            channel = torch.arange(C) / C
            init.copy_(part.time_decay, _graded_decay(C, depth))
            zigzag = 0.5 * ((torch.arange(C) + 1) % 3 - 1)
            init.copy_(part.time_first, -(math.log(0.3) + zigzag))
            init.copy_(part.time_mix_key, channel**remaining)
            init.copy_(part.time_mix_value, channel**remaining + 0.3 * depth)
            init.copy_(part.time_mix_receptance, channel ** (0.5 * remaining))
            for projection in (part.key, part.receptance, part.output):
                init.zeros_(projection.weight)
        elif isinstance(part, ChannelMix):
            C = part.time_mix_key.shape[0]
            channel = torch.arange(C) / C
            init.copy_(part.time_mix_key, channel**remaining)
            init.copy_(part.time_mix_receptance, channel**remaining)
            init.zeros_(part.value.weight)
            init.zeros_(part.receptance.weight)
        elif isinstance(part, HybridMixer):
            rate = torch.exp(_graded_decay(part.mix.shape[0], depth))
            init.copy_(part.mix, torch.exp(-rate))
        elif isinstance(part, CausalSelfAttention):
            init.zeros_(part.output.weight)
        elif isinstance(part, FeedForward):
            down = part.down
            init.zeros_(down.lora_A if isinstance(down, LowRankLinear) else down.weight)


def _graded_decay(channels: int, depth: float) -> Tensor:
    """Log decay rates, (C,): low for slow channels, high for fast ones."""
    position = torch.arange(channels) / max(channels - 1, 1)
    return -5 + 8 * position ** (0.7 + 1.3 * depth)
