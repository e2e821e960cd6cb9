"""The previous token's vector at every position, with the state that crosses calls."""

from __future__ import annotations

import torch
from torch import Tensor


def token_shift(
    inputs: Tensor,
    state: Tensor | None = None,
    *,
    reset: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gives each position the vector of the real token before it.

    ``shifted_t = inputs_{t-1}``, with ``inputs_{-1}`` taken from ``state`` (zero when None).
    RWKV (arXiv:2305.13048, section 3.1.1) calls this token shift.

    Args:
        inputs: Vectors of the tokens, shape (B, T, C).
        state: The vector of the last real token seen before, shape (B, C).
        reset: Document starts, bool, shape (B, T), at real tokens; such a token sees zero before
            it.
        mask: True at real tokens, bool, shape (B, T). A padded token is never anyone's
            previous token.

    Returns:
        The shifted vectors, shape (B, T, C), and the state after the last token, shape (B, C).
    """
    B, T, C = inputs.shape
    before = inputs.new_zeros(B, 1, C) if state is None else state.to(inputs.dtype).unsqueeze(1)
    if mask is None and reset is None and T == 1:  # a step of decoding
        return before, inputs[:, 0]
    history = torch.cat([before, inputs], dim=1)  # (B, T + 1, C): history[:, t] precedes token t
    if mask is None:
        shifted, last = history[:, :-1], history[:, -1]
    else:
        # For every position, where in `history` the last real token at or before it stands.
        places = torch.arange(1, T + 1, device=inputs.device).expand(B, T)
        latest = torch.where(mask, places, 0).cummax(dim=1).values
        latest = torch.cat([latest.new_zeros(B, 1), latest], dim=1)  # (B, T + 1)
        seen = history.gather(1, latest.unsqueeze(-1).expand(B, T + 1, C))
        shifted, last = seen[:, :-1], seen[:, -1]
    if reset is not None:
        shifted = shifted.masked_fill(reset.unsqueeze(-1), 0)
    return shifted, last
