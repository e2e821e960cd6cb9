"""Functions on tensors: the recurrences and the small things around them.

No parameters, no configuration, no transformers. One public function per op, each with a plain
loop that states the equation (``reference``) and faster forms that must agree with it.
"""

from i3lm.ops.attention import causal_attention
from i3lm.ops.cross_entropy import linear_cross_entropy
from i3lm.ops.gelu import gelu
from i3lm.ops.linear import linear
from i3lm.ops.squared_relu import squared_relu
from i3lm.ops.state_space import state_space
from i3lm.ops.token_shift import token_shift, token_shift_mix
from i3lm.ops.wkv import wkv

__all__ = [
    "causal_attention",
    "gelu",
    "linear",
    "linear_cross_entropy",
    "squared_relu",
    "state_space",
    "token_shift",
    "token_shift_mix",
    "wkv",
]
