from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from transformers import TrainerState

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


def test_waiting_for_data_is_counted_beside_the_steps(monkeypatch: pytest.MonkeyPatch):
    clock = iter([10.0, 10.5, 100.0, 100.25])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    timer = StepTimer(tokens_per_step=1)
    assert math.isnan(timer.data_wait_fraction)
    for seconds in (0.2, 0.05):
        timer.waited(seconds)
        timer.begin()
        timer.end()
    assert timer.data_wait_fraction == pytest.approx(0.25)


def begin(callback: MetricsFile, step: int) -> None:
    history = [{"step": n, "loss": 3.0 - n} for n in range(step + 1)]
    callback.on_train_begin(None, TrainerState(global_step=step, log_history=history), None)


def test_a_run_that_goes_back_drops_later_lines(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 3.0 - step}) for step in (0, 1, 2)]
    path.write_text("\n".join([*lines, '{"step": 3, "lo']))
    resumed = MetricsFile(path, StepTimer(1))
    begin(resumed, step=1)
    assert path.read_text() == "\n".join(lines[:2]) + "\n"
    assert resumed.tracker.best == 2.0
    # The checkpoint of a step may be older than a line of it.
    restored = json.dumps({"step": 1, "restored_from_step": 2})
    evaluated = json.dumps({"step": 1, "eval_loss": 2.0})
    path.write_text("\n".join([*lines[:2], restored, evaluated]) + "\n")
    begin(resumed, step=1)
    assert path.read_text() == "\n".join([*lines[:2], restored]) + "\n"
    begin(resumed, step=0)
    assert path.read_text() == ""
    assert resumed.tracker.best == math.inf


def test_what_a_line_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    clock = iter([10.0, 10.5])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    path = tmp_path / "metrics.jsonl"
    timer = StepTimer(tokens_per_step=64)
    callback = MetricsFile(path, timer, memory=lambda: 4096, utilization=0.001)
    state = TrainerState(global_step=1, num_input_tokens_seen=64)
    timer.waited(0.5)
    callback.on_step_begin(None, state, None)
    callback.on_step_end(None, state, None)
    logs = {"loss": 1.0, "grad_norm": math.inf, "learning_rate": 0.1}
    callback.on_log(None, state, None, logs)
    record = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert record == {
        "step": 1, "loss": 1.0, "grad_norm": None, "learning_rate": 0.1, "loss_smoothed": 1.0,
        "perplexity_current": math.e, "perplexity_smoothed": math.e,
        "perplexity_windowed": math.e, "perplexity_best": math.e,
        "tokens": 64, "tokens_per_second": 128.0, "step_seconds": 0.5,
        "data_wait_fraction": 0.5, "memory_bytes": 4096, "mfu": 0.128,
    }  # fmt: skip
    assert logs["mfu"] == 0.128  # what comes after sees it too
