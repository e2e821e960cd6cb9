"""The building blocks, as modules made from plain values; only the model reads a configuration.

A token mixer maps (B, T, C) to (B, T, C) and carries a state between calls, so that a sequence
given in pieces gives what it gives at once.
"""

from i3lm.layers.attention import CausalSelfAttention, RotaryEmbedding
from i3lm.layers.channel_mix import ChannelMix
from i3lm.layers.feed_forward import FeedForward
from i3lm.layers.hybrid import HybridMixer
from i3lm.layers.linear import Linear
from i3lm.layers.low_rank import LowRankLinear
from i3lm.layers.parameter_groups import parameter_groups
from i3lm.layers.time_mix import TimeMix

__all__ = [
    "CausalSelfAttention",
    "ChannelMix",
    "FeedForward",
    "HybridMixer",
    "Linear",
    "LowRankLinear",
    "RotaryEmbedding",
    "TimeMix",
    "parameter_groups",
]
