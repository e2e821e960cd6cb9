"""Runs of two processes, against the same runs of one."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from i3lm.cli import main
from i3lm.data.sources import Source
from i3lm.tokenizers import train_character_tokenizer
from tests.conftest import TINY_MODEL

# 3 layers of all kinds; 8 steps of two batches of 8 rows, over all processes.
MODEL = {**TINY_MODEL, "layer_types": "linear_attention, hybrid, full_attention"}
OPTIONS = [
    "--model.config", json.dumps(MODEL),
    "--data.held_out_fraction", "0.1",
    "--training.max_steps", "8", "--training.gradient_accumulation_steps", "2",
    "--training.learning_rate", "0.01", "--training.warmup_steps", "2",
    "--training.precision", "fp32", "--training.device", "cpu",
    "--training.log_every", "1", "--training.evaluate_every", "4",
    "--training.save_every", "4", "--training.keep_checkpoints", "10",
    "--sample.every", "8", "--sample.max_new_tokens", "4",
]  # fmt: skip
STORIES = ["--data.source", "stories", "--data.size", "60", "--tokenizer.source", "character"]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}A:{% generation %}{{ m.content }}\n"
    "{% endgeneration %}{% else %}U:{{ m.content }}\n{% endif %}{% endfor %}"
)
# Sums of the same numbers in another order, in float32, over 8 steps of AdamW.
CLOSE = {"rtol": 0, "atol": 2e-5}
# The root of the mean square of the weights' differences, where AdamW has moved each by some 1e-2.
# Not each difference: AdamW divides a gradient by its size, so that one which is rounding errors
# and little else moves its weight by some share of a whole step.
WEIGHTS_DIFFER = 1e-6


def rows(batch_size: int) -> list[str]:
    return ["--training.batch_size", str(batch_size)]


def torchrun(arguments: list[object], environment: dict[str, str], processes: int = 2):
    """Starts processes as a person does, and waits for their end."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        "--nproc-per-node", str(processes), "-m", *map(str, arguments),
    ]  # fmt: skip
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(run: Path, reference: Path) -> None:
    """Losses, norms, held-out figures and the last weights agree, and the tokens exactly."""
    found, expected = records(run), records(reference)
    assert [r["step"] for r in found] == [r["step"] for r in expected]
    for name in ("loss", "grad_norm", "eval_loss"):
        values, wanted = (torch.tensor([r[name] for r in rs if name in r], dtype=torch.float64)
                          for rs in (found, expected))  # fmt: skip
        torch.testing.assert_close(values, wanted, **CLOSE)
    assert [r.get("tokens") for r in found] == [r.get("tokens") for r in expected]
    for name in ("best", "last", "checkpoints/checkpoint-8"):
        weights, wanted_weights = (
            load_file(folder / name / "model.safetensors") for folder in (run, reference)
        )
        forms, wanted_forms = (
            {key: (weight.shape, weight.dtype) for key, weight in each.items()}
            for each in (weights, wanted_weights)
        )
        assert forms == wanted_forms
        differences = [(weights[key] - wanted_weights[key]).flatten() for key in weights]
        assert torch.cat(differences).square().mean().sqrt() < WEIGHTS_DIFFER


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options for conversations, of which only the answers are learnt: few labels, and unevenly."""
    folder = tmp_path_factory.mktemp("chat")
    texts = [document for document, _ in Source("stories", size=150).read()]
    tokenizer = train_character_tokenizer(texts, lowercase=False)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "tokenizer")
    with (folder / "chat.jsonl").open("w") as file:
        for number, text in enumerate(texts):
            length = 5 + 37 * number % 200
            turns = [("user", text[:60]), ("assistant", text[60 : 60 + length])]
            messages = [{"role": role, "content": content} for role, content in turns]
            file.write(json.dumps({"messages": messages}) + "\n")
    return ["--data.source", str(folder / "chat.jsonl"), "--data.streaming", "true",
            "--data.rows", "packed", "--tokenizer.source", str(folder / "tokenizer")]  # fmt: skip


@pytest.fixture(scope="module")
def one(
    tmp_path_factory: pytest.TempPathFactory, chat: list[str], one_thread_here: None
) -> dict[str, Path]:
    """Runs of one process, by kind of rows."""
    folder = tmp_path_factory.mktemp("one")
    kinds = {
        "contiguous": STORIES,
        "packed": chat,
        "stream": [*STORIES, "--data.rows", "stream"],
    }
    for name, data in kinds.items():
        assert main(["train", "--output", str(folder / name), *OPTIONS, *data, *rows(8)]) == 0
    return {name: folder / name for name in kinds}


@pytest.fixture(scope="module")
def one_thread_here():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


STREAM = [*STORIES, "--data.rows", "stream"]
SHARDED = [*STREAM, "--training.sharding", "full"]


@pytest.fixture(scope="module")
def two(
    tmp_path_factory: pytest.TempPathFactory,
    one: dict[str, Path],
    chat: list[str],
    process_environment: dict[str, str],
) -> dict[str, Path]:
    """The same runs of two processes, and one that goes on where one process stopped."""
    folder = tmp_path_factory.mktemp("two")
    stopped(one["stream"], folder / "resumed")
    runs = {
        "contiguous": STORIES,
        "packed": chat,
        "stream": STREAM,
        "resumed": [*STREAM, "--resume"],
    }
    return train_two(folder, runs, process_environment)


@pytest.fixture(scope="module")
def shards(
    tmp_path_factory: pytest.TempPathFactory,
    one: dict[str, Path],
    process_environment: dict[str, str],
) -> dict[str, Path]:
    """Runs of two processes that share the weights."""
    folder = tmp_path_factory.mktemp("shards")
    stopped(one["stream"], folder / "resumed")
    runs = {"stream": SHARDED, "resumed": [*SHARDED, "--resume"]}
    return train_two(folder, runs, process_environment)


def train_two(
    folder: Path, runs: dict[str, list[str]], environment: dict[str, str]
) -> dict[str, Path]:
    """Trains in two processes, and gives the runs and files with what the processes said."""
    commands = [
        ["--output", str(folder / name), *OPTIONS, *more, *rows(4)] for name, more in runs.items()
    ]
    (folder / "commands.json").write_text(json.dumps(commands))
    finished = torchrun(["tests.training.several_runs", folder / "commands.json"], environment)
    assert finished.returncode == 0, finished.stderr
    (folder / "stderr").write_text(finished.stderr)
    (folder / "stdout").write_text(finished.stdout)
    return {name: folder / name for name in [*runs, "stderr", "stdout"]}


def stopped(run: Path, copy: Path) -> None:
    """A copy of a run as if it had ended after step 4."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints" / "checkpoint-8")
    for name in ("best", "last"):
        shutil.rmtree(copy / name)


@pytest.mark.parametrize("kind", ["contiguous", "packed", "stream"])
def test_two_processes_train_as_one(kind: str, one: dict[str, Path], two: dict[str, Path]):
    assert_same_run(two[kind], one[kind])


def test_two_processes_go_on_where_one_stopped(one: dict[str, Path], two: dict[str, Path]):
    assert_same_run(two["resumed"], one["stream"])
    assert "checkpoint-4 was saved by 1 processes, and now there are 2" in (
        two["stderr"].read_text()
    )


@pytest.mark.parametrize("kind", ["packed", "stream"])
def test_one_process_goes_on_where_two_stopped(
    kind: str, one: dict[str, Path], two: dict[str, Path], chat: list[str], tmp_path: Path, capfd
):
    stopped(two[kind], tmp_path / "run")
    data = chat if kind == "packed" else STREAM
    command = ["train", "--output", str(tmp_path / "run"), *OPTIONS, *data, "--resume"]
    assert main([*command, *rows(4)]) == 2
    assert "the run was begun with 8 rows per batch, and now 1 processes of " in (
        capfd.readouterr().err
    )
    assert main([*command, *rows(8)]) == 0
    assert_same_run(tmp_path / "run", one[kind])


def test_one_process_speaks_and_writes(two: dict[str, Path]):
    said = two["stderr"].read_text().splitlines()
    assert sum("step      8/8  loss" in line for line in said) == 4
    results = [line for line in two["stdout"].read_text().splitlines() if "model: " in line]
    assert len(results) == 4
    run = two["stream"]
    assert yaml.safe_load((run / "config.yaml").read_text())["training"]["batch_size"] == 4
    assert len((run / "samples.jsonl").read_text().splitlines()) == 1
    # The states of all 8 rows, in whatever number of processes they were.
    states = load_file(run / "checkpoints" / "checkpoint-4" / "carried_state.safetensors")
    assert {len(state) for state in states.values()} == {8}
    assert len(list((run / "checkpoints" / "checkpoint-4").glob("rng_state_*.pth"))) == 2


@pytest.mark.parametrize("run", ["stream", "resumed"])
def test_shards_train_as_one(run: str, one: dict[str, Path], shards: dict[str, Path]):
    assert_same_run(shards[run], one["stream"])


def test_one_process_goes_on_where_shards_stopped(
    one: dict[str, Path], shards: dict[str, Path], tmp_path: Path
):
    stopped(shards["stream"], tmp_path / "run")
    assert main(["train", "--output", str(tmp_path / "run"), *OPTIONS, *SHARDED, "--resume",
                 *rows(8)]) == 0  # fmt: skip
    assert_same_run(tmp_path / "run", one["stream"])


def test_a_checkpoint_of_shards_is_whole(two: dict[str, Path], shards: dict[str, Path]):
    whole, gathered = (runs["stream"] / "checkpoints" / "checkpoint-8" for runs in (two, shards))
    assert {path.name for path in gathered.iterdir()} == {path.name for path in whole.iterdir()}
    states = [torch.load(folder / "optimizer.pt")["state"] for folder in (gathered, whole)]
    torch.testing.assert_close(*states, rtol=0, atol=1e-5)


def test_an_error_is_one_line(process_environment: dict[str, str], tmp_path: Path):
    finished = torchrun(
        ["i3lm", "train", "--output", tmp_path / "run", *OPTIONS, *STORIES,
         "--training.sharding", "full", "--training.optimizer", "muon"],
        process_environment,
    )  # fmt: skip
    assert finished.returncode != 0
    said = [line for line in finished.stderr.splitlines() if line.startswith("i3lm")]
    assert [line for line in said if "error" in line] == [
        "i3lm train: error: training.optimizer (muon) does not go with training.sharding full: "
        "leave one of them out"
    ]
    assert "exitcode  : 2" in finished.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_signal_stops_all_processes_at_one_step(
    process_environment: dict[str, str], tmp_path: Path
):
    finished = end_by(signal.SIGTERM, "launcher", tmp_path / "run", process_environment)
    stopped_at = re.findall(r"i3lm train: stopped by SIGTERM at step (\d+) of 100000", finished)
    assert len(stopped_at) == 1
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert checkpoint.name == f"checkpoint-{stopped_at[0]}"
    assert "[rank" not in finished  # tracebacks of ours; the launcher's own begin otherwise


@pytest.mark.slow
def test_a_lost_process_is_one_line(process_environment: dict[str, str], tmp_path: Path):
    finished = end_by(signal.SIGKILL, "process", tmp_path / "run", process_environment)
    said = [line for line in finished.splitlines() if line.startswith("i3lm train: error")]
    # The launcher may end the others before they notice.
    assert len(said) <= 1
    assert all("another process of this run has ended" in line for line in said)
    assert "[rank" not in finished


def end_by(number: signal.Signals, whom: str, run: Path, environment: dict[str, str]) -> str:
    """Sends a signal to a long run of two processes; gives what they said."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "i3lm", "train", "--output", str(run), *OPTIONS, *STORIES, *rows(4),
        "--training.max_steps", "100000", "--training.save_every", "100000",
        "--training.evaluate_every", "100000", "--sample.every", "0",
    ]  # fmt: skip
    launcher = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        metrics = run / "metrics.jsonl"
        while not metrics.exists() or len(metrics.read_text().splitlines()) < 4:
            assert launcher.poll() is None, "the run ended first"
            time.sleep(0.05)
        pid = launcher.pid
        if whom == "process":
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            pid = int(children[-1])
        os.kill(pid, number)
        _, said = launcher.communicate(timeout=90)
    finally:
        launcher.kill()
    assert launcher.returncode != 0
    return said
