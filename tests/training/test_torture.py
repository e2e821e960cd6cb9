"""Runs that are killed, in processes of their own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import TINY_MODEL

# The smaller source begins its second epoch after about 20 steps.
TRAIN = [
    "--model.config", json.dumps(TINY_MODEL), "--tokenizer.source", "character",
    "--data.held_out_fraction", "0.1", "--data.shuffle_buffer", "7",
    "--training.max_steps", "60", "--training.batch_size", "4",
    "--training.gradient_accumulation_steps", "2", "--training.learning_rate", "0.01",
    "--training.warmup_steps", "5", "--training.precision", "fp32", "--training.device", "cpu",
    "--training.log_every", "3", "--training.evaluate_every", "10", "--training.save_every", "7",
    "--sample.max_new_tokens", "10", "--sample.every", "11",
]  # fmt: skip
STREAM = ["--data.rows", "stream", "--data.streaming", "true"]
FORMS = {
    "stream": [*STREAM, "--data.workers", "2"],
    "packed": ["--data.rows", "packed"],
    "contiguous": ["--data.rows", "contiguous"],
}


def torture(
    folder: Path, environment: dict[str, str], kills: int, options: list[str], *workers: str
) -> None:
    (folder / "small.jsonl").write_text(
        "".join(json.dumps({"text": f"Record {n}: {'sun and moon ' * 15}"}) + "\n"
                for n in range(14))
    )  # fmt: skip
    mixture = [
        {"source": "stories", "size": 60, "weight": 2},
        {"source": str(folder / "small.jsonl"), "name": "small"},
    ]
    command = [
        sys.executable, "-m", "tests.training.torture", "--kills", str(kills),
        "--seed", str(kills), "--folder", str(folder), *workers, "--", *TRAIN,
        "--data.mixture", json.dumps(mixture), *options,
    ]  # fmt: skip
    finished = subprocess.run(
        command, capture_output=True, text=True, timeout=900, env=environment,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert len(re.findall(r"^killed ", finished.stdout, re.MULTILINE)) == kills
    lines = (folder / "killed" / "metrics.jsonl").read_text().splitlines()
    last = next(r for r in map(json.loads, reversed(lines)) if "loss" in r)
    assert last["epochs/small"] >= 1


@pytest.mark.timeout(900)
@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_killed_at_20_random_instants(
    tmp_path: Path, process_environment: dict[str, str], form: str
):
    """Batches, losses, samples and weights are bit for bit those of a run that nobody killed."""
    torture(tmp_path, process_environment, 20, FORMS[form])


def test_killed_and_resumed_with_another_number_of_workers(
    tmp_path: Path, process_environment: dict[str, str]
):
    torture(tmp_path, process_environment, 3, STREAM, "--workers", "0", "2", "0", "0")


def test_killed_with_packed_rows(tmp_path: Path, process_environment: dict[str, str]):
    torture(tmp_path, process_environment, 3, FORMS["packed"])
