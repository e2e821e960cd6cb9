"""Documents packed into one row: where each begins, and what its tokens see."""

from __future__ import annotations

import torch
from torch import Tensor


def check_reset(reset: Tensor, shape: tuple[int, int], attention_mask: Tensor | None) -> None:
    """Raises a ValueError where `reset` does not mark first tokens of documents.

    Args:
        reset: True at the first token of each document.
        shape: The shape (B, T) of the inputs.
        attention_mask: 1 at real tokens and 0 at padding, or None.
    """
    if reset.dtype != torch.bool or reset.shape != shape:
        raise ValueError(
            f"reset ({reset.dtype}, {tuple(reset.shape)}) must be torch.bool of the inputs' "
            f"shape {shape}"
        )
    if attention_mask is None:
        return
    if attention_mask.shape != shape:
        raise ValueError(
            f"with reset, attention_mask {tuple(attention_mask.shape)} must have the inputs' "
            f"shape {shape}, one mark for each token"
        )
    if not torch.compiler.is_compiling() and bool((reset & ~attention_mask.bool()).any()):
        raise ValueError("reset marks padding: mark the first real token of each document")


def document_starts(reset: Tensor) -> Tensor:
    """For every token, the place in its row where its document begins, int64, (B, T)."""
    places = torch.arange(reset.shape[1], device=reset.device)
    return torch.where(reset, places, 0).cummax(dim=1).values


def first_seen(starts: Tensor, sliding_window: int | None) -> dict[str, Tensor]:
    """The earliest token that each token attends to, int64, (B, T), by type of layer."""
    first = {"full_attention": starts, "hybrid": starts}
    if sliding_window is not None:
        places = torch.arange(starts.shape[1], device=starts.device)
        first["sliding_attention"] = torch.maximum(starts, places - sliding_window + 1)
    return first


def count_within_documents(positions: Tensor, starts: Tensor) -> Tensor:
    """Positions (B, T) that count from each document's start, given those of whole rows."""
    positions = positions.expand_as(starts)
    return positions - positions.gather(1, starts)
