from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from i3lm.training.metrics import MetricsFile, PerplexityTracker, StepTimer


def test_perplexities_by_hand():
    tracker = PerplexityTracker(window=2, smoothing=0.5)
    assert tracker.update(2.0) == pytest.approx({
        "loss_smoothed": 2.0,
        "perplexity_current": math.e**2,
        "perplexity_smoothed": math.e**2,
        "perplexity_windowed": math.e**2,
        "perplexity_best": math.e**2,
    })  # fmt: skip
    tracker.update(1.0)
    assert tracker.update(3.0) == pytest.approx({
        "loss_smoothed": 2.25,  # 2, then 1.5, then 2.25
        "perplexity_current": math.e**3,
        "perplexity_smoothed": math.e**2.25,
        "perplexity_windowed": math.e**2,  # of 1 and 3
        "perplexity_best": math.e,
    })  # fmt: skip


def test_step_timer(monkeypatch: pytest.MonkeyPatch):
    clock = iter([10.0, 10.5, 100.0, 100.25, 200.0, 200.25])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    timer = StepTimer(tokens_per_step=64, window=2)
    assert math.isnan(timer.tokens_per_second)
    for _ in range(3):  # what lies between the steps does not count
        timer.begin()
        timer.end()
    assert timer.step_seconds == 0.25
    assert timer.tokens_per_second == 256


def test_resumed_file_drops_later_lines(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 3.0 - step}) for step in (0, 1, 2)]
    path.write_text("\n".join([*lines, '{"step": 3, "lo']))
    resumed = MetricsFile(path, StepTimer(1), resume_step=1)
    assert path.read_text() == "\n".join(lines[:2]) + "\n"
    assert resumed.tracker.best == 2.0
    MetricsFile(path, StepTimer(1))
    assert path.read_text() == ""
