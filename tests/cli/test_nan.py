"""Runs whose numbers go wrong."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import i3lm.training.trainer
from i3lm.cli import main
from tests.cli.test_train import losses, read_records
from tests.conftest import TINY_TRAINING

pytestmark = pytest.mark.usefixtures("one_thread")

QUIET = ["--sample.every", "0", "--training.evaluate_every", "1000"]


class BadData:
    """Makes the loss of some batches of the training NaN, whenever they come.

    Args:
        patch: How to reach the trainer's loss.
        steps: The steps whose batches are bad, counted without going back.
    """

    def __init__(self, patch: pytest.MonkeyPatch, steps: set[int]) -> None:
        self.steps, self.seen, self.bad = steps, [], []
        self.loss = i3lm.training.trainer.next_token_loss
        patch.setattr("i3lm.training.trainer.next_token_loss", self)

    def __call__(self, model, input_ids, labels, **options):
        loss = self.loss(model, input_ids, labels, **options)
        if not any(input_ids.equal(bad) for bad in self.bad):
            self.seen.append(input_ids.clone())
            if len(self.seen) not in self.steps:
                return loss
            self.bad.append(self.seen.pop())
            self.steps.discard(len(self.seen) + 1)
        return loss * float("nan")


def train(run: Path, *options: str) -> int:
    return main(["train", "--output", str(run), *TINY_TRAINING, *QUIET, *options])


def test_stopping_names_the_step_and_the_layer_and_restoring_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    data = BadData(monkeypatch, {25})
    run = tmp_path / "run"
    assert train(run) == 2
    checkpoint = run / "checkpoints" / "checkpoint-20"
    assert capsys.readouterr().err.splitlines()[-1] == (
        "i3lm train: error: step 25: the gradient is not finite: the gradient of lm_head.bias is "
        f"the first that is not finite; {checkpoint} is whole: resume from it with "
        "--training.on_nan restore, or begin another run with a training.learning_rate below 0.01"
    )
    assert list(losses(run)) == list(range(1, 25))

    first = data.seen[:]
    assert train(run, "--resume", "--training.on_nan", "restore") == 0
    error = capsys.readouterr().err
    (line,) = [line for line in error.splitlines() if line.startswith("warning:")]
    assert re.search(r"step 25: .*; back to checkpoint-20 and on without the data of its steps "
                     r"\(1 of 3 times\)$", line)  # fmt: skip
    assert list(losses(run)) == list(range(1, 61))
    (restored,) = [r for r in read_records(run) if "restored_from_step" in r]
    assert (restored["step"], restored["restored_from_step"]) == (20, 25)
    assert "lm_head.bias" in restored["reason"]
    # Steps 21 to 24 once more, then step 21 again, with the data that came after the bad.
    resumed = data.seen[len(first) :]
    assert all(a.equal(b) for a, b in zip(resumed[:4], first[20:24], strict=True))
    assert not any(resumed[4].equal(batch) for batch in first)
    assert len(resumed) == 4 + 40

    # What was passed over is passed over by a run that is resumed later, too.
    again = tmp_path / "again"
    shutil.copytree(run, again, ignore=shutil.ignore_patterns("checkpoint-[56]0", "last"))
    assert train(again, "--resume") == 0
    weights, expected = (load_file(f / "last" / "model.safetensors") for f in (again, run))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert losses(again) == losses(run)


def test_restoring_ends_after_three_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    BadData(monkeypatch, set(range(15, 1000)))
    run = tmp_path / "run"
    assert train(run, "--training.on_nan", "restore") == 2
    assert re.search(
        r"for all that the run went back 3 times; .*checkpoint-10 is whole: begin another run with "
        r"a training.learning_rate below 0.01\n$",
        capsys.readouterr().err,
    )
    assert len([r for r in read_records(run) if "restored_from_step" in r]) == 3


def test_before_the_first_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    BadData(monkeypatch, {3})
    assert train(tmp_path / "run", "--training.on_nan", "restore") == 2
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert "; no checkpoint was saved before: begin another run with" in last_line


def test_fp16_on_a_cpu_trains_not_but_reads(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert train(tmp_path / "run", "--training.precision", "fp16") == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "i3lm train: error: training.precision (fp16): its loss scaling needs a CUDA GPU, and the "
        "device is cpu: use bf16, fp32 or auto"
    )
    assert not (tmp_path / "run").exists()
    figures = []
    for precision in ("fp32", "fp16"):
        arguments = [
            "evaluate",
            str(tiny_run),
            "--data",
            "stories",
            "--precision",
            precision,
            "--json",
        ]
        assert main([*arguments, "--size", "20"]) == 0
        figures.append(json.loads(capsys.readouterr().out)["loss"])
    # 11 bits in every product.
    assert 0 < abs(figures[0] - figures[1]) < 2e-3
    assert main(["generate", str(tiny_run), "--prompt", "Once", "--precision", "fp16"]) == 0
