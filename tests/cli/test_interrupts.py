"""Signals and kills, sent to real processes."""

from __future__ import annotations

import os
import pty
import re
import shutil
import signal
from pathlib import Path

import pytest

from i3lm.cli import main
from tests.cli.test_train import assert_same_run, read_records, start, wait_for
from tests.conftest import TINY_TRAINING, Process

pytestmark = pytest.mark.usefixtures("one_thread")


def default_signals() -> None:
    """What a shell that starts the tests in the background has ignored, and children inherit."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def checkpoints(run: Path) -> list[int]:
    return sorted(int(p.name.split("-")[1]) for p in (run / "checkpoints").iterdir())


def test_the_first_signal_saves_and_the_resumed_run_is_the_same(
    i3lm: Process, process_environment: dict[str, str], tiny_run: Path, tmp_path: Path
):
    run = tmp_path / "run"
    # Steps and lines of the log at which nothing else is due.
    options = [*TINY_TRAINING, "--training.log_every", "4"]
    straight = tmp_path / "straight"
    assert main(["train", "--output", str(straight), *options]) == 0
    for number, status in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        resume = ["--resume"] if run.exists() else []
        process = start(
            ["train", "--output", run, *options, *resume],
            process_environment,
            preexec_fn=default_signals,
        )
        seen = len(read_records(run)) if resume else 0
        wait_for(run / "metrics.jsonl", process)
        while len(read_records_of_a_running(run)) < seen + 3:
            assert process.poll() is None, "the process ended first"
        process.send_signal(number)
        out, error = process.communicate(timeout=60)
        assert (process.returncode, out) == (status, ""), error
        assert f"{number.name}: saving after this step; once more stops at once\n" in error
        (step,) = re.findall(
            rf"\ni3lm train: stopped by {number.name} at step (\d+) of 60, which is saved; give "
            r"the same command with --resume to go on\n$",
            error,
        )
        assert "Traceback" not in error
        assert checkpoints(run)[-1] == int(step) < 60
        assert not [path for path in run.rglob("*") if path.suffix in (".part", ".old")]
    resumed = i3lm("train", "--output", run, "--resume", *options)
    assert resumed.returncode == 0, resumed.stderr
    assert f"resuming from {run}/checkpoints/checkpoint-{step}\n" in resumed.stderr
    assert_same_run(run, straight)


def read_records_of_a_running(run: Path) -> list[str]:
    return (run / "metrics.jsonl").read_text().splitlines()


@pytest.mark.parametrize(
    ("number", "status", "last"),
    [(signal.SIGINT, 130, "i3lm train: interrupted\r\n"), (signal.SIGTERM, 143, "")],
)
def test_the_second_signal_stops_at_once_and_the_terminal_stays_sane(
    process_environment: dict[str, str],
    tmp_path: Path,
    number: signal.Signals,
    status: int,
    last: str,
):
    run = tmp_path / "run"
    master, slave = pty.openpty()
    # A step of an hour.
    endless = ["--data.size", "3000", "--training.gradient_accumulation_steps", "100000"]
    process = start(
        ["train", "--output", run, *TINY_TRAINING, *endless],
        {**process_environment, "TERM": "xterm", "COLUMNS": "120", "LINES": "40"},
        stderr=slave,
        preexec_fn=default_signals,
    )
    os.close(slave)
    shown, sent = "", 0
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:  # Linux's way to say that the other side has closed
            break
        shown += part.decode(errors="replace")
        # The first once the untrained model is scored, the second once the first is confirmed.
        if sent == 0 and "held out:" in shown:
            process.send_signal(number)
            sent = 1
        elif sent == 1 and "once more stops at once" in shown:
            process.send_signal(number)
            sent = 2
        if not part:
            break
    os.close(master)
    process.communicate(timeout=60)
    assert process.returncode == status, shown
    assert "Traceback" not in shown
    assert shown.endswith(last)
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")  # the cursor comes back
    assert checkpoints(run) == []
    assert not [path for path in run.rglob("*") if path.suffix in (".part", ".old")]


def test_a_folder_of_a_process_that_was_killed_while_it_began(tiny_run: Path, tmp_path: Path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml.part").write_text("model:")
    options = ["--training.max_steps", "1", "--sample.every", "0"]
    assert main(["train", "--output", str(run), *TINY_TRAINING, *options]) == 0
    shutil.rmtree(run)
