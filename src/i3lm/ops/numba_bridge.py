"""What the numba implementations share: arrays and threads."""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

_LAUNCHED = numba.get_num_threads()


def match_threads() -> None:
    """Makes numba use as many threads as PyTorch does (at most as many as it was started with)."""
    threads = min(torch.get_num_threads(), _LAUNCHED)
    if threads != numba.get_num_threads():
        numba.set_num_threads(threads)


def as_arrays(*tensors: Tensor | None) -> list[np.ndarray]:
    """The tensors as contiguous arrays; None becomes an empty (0, 0) mark."""
    nothing = np.zeros((0, 0), np.bool_)
    return [nothing if x is None else x.detach().contiguous().numpy() for x in tensors]
