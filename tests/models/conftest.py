from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="package")
def _one_thread_for_tiny_models() -> Iterator[None]:
    """Keeps PyTorch to one thread: tiny tensors gain nothing from more, and lose to waiting."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
