from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest

from i3lm.cli import main
from i3lm.errors import ConfigurationError
from i3lm.training.tracking import check_tracking, run_names
from tests.cli.test_train import read_records
from tests.conftest import TINY_TRAINING, Process

SHORT = [*TINY_TRAINING, "--training.max_steps", "4", "--training.evaluate_every", "2"]


def tracked(record: dict) -> dict[str, float]:
    """The figures of a line of the metrics file, under the names that trackers show."""
    return {
        f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}": value
        for name, value in record.items()
        if name != "step"
    }


def train(i3lm: Process, output: Path, tracker: str, **environment: str) -> list[dict]:
    import os

    settings = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    options = [*SHORT, "--training.tracking", tracker, "--json"]
    finished = i3lm("train", "--output", output, *options, env=settings)
    assert finished.returncode == 0, finished.stderr
    json.loads(finished.stdout)  # nothing else is printed there
    assert "Traceback" not in finished.stderr
    return read_records(output)


def test_tensorboard_gets_what_the_metrics_file_gets(i3lm: Process, tmp_path: Path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    records = train(i3lm, run, "tensorboard")
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    expected: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        for name, value in tracked(record).items():
            expected.setdefault(name, []).append((record["step"], value))
    assert {"train/loss", "train/perplexity_best", "train/tokens_per_second", "train/grad_norm",
            "train/learning_rate", "eval/loss", "eval/bits_per_byte"} <= set(expected)  # fmt: skip
    assert set(events.Tags()["scalars"]) == set(expected)
    for name, points in expected.items():
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(step, pytest.approx(value, rel=1e-6)) for step, value in points], name


def test_trackio_keeps_a_run_on_this_machine(i3lm: Process, tmp_path: Path):
    pytest.importorskip("trackio")
    run, folder = tmp_path / "project" / "run", tmp_path / "trackio"
    records = train(i3lm, run, "trackio", TRACKIO_DIR=str(folder))
    databases = list(folder.glob("project*.db"))
    assert len(databases) == 1
    with sqlite3.connect(databases[0]) as connection:
        rows = connection.execute("SELECT run_name, metrics FROM metrics").fetchall()
    assert {name for name, _ in rows} == {"run"}
    figures = [json.loads(text) for _, text in rows]
    losses = [row["train/loss"] for row in figures if "train/loss" in row]
    assert losses == [record["loss"] for record in records if "loss" in record]
    assert any("eval/bits_per_byte" in row for row in figures)


def test_wandb_offline(i3lm: Process, tmp_path: Path):
    pytest.importorskip("wandb")
    run = tmp_path / "project" / "run"
    train(i3lm, run, "wandb", WANDB_MODE="offline")
    files = list((run / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 1
    assert b"perplexity_best" in files[0].read_bytes()


def test_a_key_is_asked_for_before_anything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("i3lm.training.tracking._is_installed", lambda name: True)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    run = tmp_path / "run"
    assert main(["train", "--output", str(run), *SHORT, "--training.tracking", "wandb"]) == 2
    assert capsys.readouterr().err == (
        "i3lm train: error: training.tracking (wandb) needs a key: set WANDB_API_KEY in the "
        "environment, or WANDB_MODE=offline to keep the run on this machine\n"
    )
    assert not run.exists()
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_API_KEY", "x" * 40)):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            check_tracking("wandb")


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "wandb"])
def test_a_package_that_is_missing(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("i3lm.training.tracking._is_installed", lambda name: False)
    with pytest.raises(ConfigurationError, match=rf"pip install 'i3lm\[track\]' .*install {name}"):
        check_tracking(name)
    check_tracking("none")


def test_names_come_from_the_folders():
    assert run_names(Path("/models/stories/small")) == ("stories", "small")
    assert run_names(Path("/small")) == ("i3lm", "small")
