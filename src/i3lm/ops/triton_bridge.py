"""What the Triton implementations share: which steps are real, and which begin a document."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def marks(reset, mask, b, t, T, HAS_RESET: tl.constexpr, HAS_MASK: tl.constexpr):
    """Whether steps are real, and whether they begin a document; both False outside [0, T)."""
    inside = (t >= 0) & (t < T)
    real = inside
    begins = inside & (t < 0)
    if HAS_MASK:
        real = inside & (tl.load(mask + b * T + t, mask=inside, other=0) != 0)
    if HAS_RESET:
        begins = inside & (tl.load(reset + b * T + t, mask=inside, other=0) != 0)
    return real, begins
