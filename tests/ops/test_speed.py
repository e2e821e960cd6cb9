from __future__ import annotations

from itertools import accumulate, chain

import pytest
import torch

from i3lm.ops import speed


def test_the_ceiling_is_the_best_repeat_after_the_first(monkeypatch: pytest.MonkeyPatch):
    seconds = [0.25, 4.0, 8.0, 0.5, 2.0, 8.0, 8.0, 8.0]
    assert len(seconds) == speed.REPEATS + 1
    # The clock is asked before and after every product, and nothing passes in between.
    clock = accumulate(chain.from_iterable((0.0, second) for second in seconds))
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    flops = speed.measure_matmul_flops(torch.device("cpu"), torch.float32)
    assert flops == 2 * 1024**3 / 0.5
