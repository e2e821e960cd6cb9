"""Whole runs on sources that end, break, or are mixed."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from i3lm.cli import main
from i3lm.data import token_store
from i3lm.data.split import is_held_out
from i3lm.tokenizers import load_tokenizer
from i3lm.training.checkpoints import latest_checkpoint
from i3lm.training.trainer import I3Trainer
from tests.conftest import TINY_MODEL

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = [
    "--model.config", json.dumps(TINY_MODEL), "--tokenizer.source", "character",
    "--data.held_out_fraction", "0.2", "--training.max_steps", "30", "--training.batch_size", "2",
    "--training.gradient_accumulation_steps", "2", "--training.precision", "fp32",
    "--training.device", "cpu", "--training.log_every", "1", "--training.evaluate_every", "100",
    "--training.save_every", "5", "--sample.prompts", "[]",
]  # fmt: skip


def documents_of(size: int, letter: str) -> list[str]:
    """Numbered documents of 3 to 9 words, all of one letter."""
    return [f"<{n}> " + " ".join([letter * (1 + n % 5)] * (3 + n % 7)) for n in range(size)]


def write_source(path: Path, size: int, letter: str = "a") -> Path:
    lines = (json.dumps({"text": text}) + "\n" for text in documents_of(size, letter))
    path.write_text("".join(lines))
    return path


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def trained_on(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The input ids of every batch that is trained on."""
    seen: list[torch.Tensor] = []
    step = I3Trainer.training_step

    def training_step(self, model, inputs, *args, **kwargs):
        seen.append(inputs["input_ids"].clone())
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(I3Trainer, "training_step", training_step)
    return seen


def train(run: Path, *options: object) -> int:
    return main(["train", "--output", str(run), *OPTIONS, *map(str, options)])


@pytest.mark.parametrize("streaming", ["false", "true"], ids=["store", "stream"])
def test_every_document_once_per_epoch(
    tmp_path: Path, trained_on: list[torch.Tensor], streaming: str
):
    source = write_source(tmp_path / "text.jsonl", 60)
    run = tmp_path / "run"
    assert train(run, "--data.source", source, "--data.streaming", streaming) == 0
    text = load_tokenizer(run / "last").decode(torch.cat([*trained_on]).flatten())
    begun = re.findall(r"<\d+>", text)
    documents = set(begun)
    N = len(documents)
    assert 35 < N < 60
    assert len(begun) > 2 * N
    for epoch in range(len(begun) // N):
        assert set(begun[epoch * N : (epoch + 1) * N]) == documents
    epochs = [r.get("epoch") for r in records(run) if "loss" in r]
    if streaming == "true":
        assert epochs == [None] * 30
    else:
        assert epochs[-1] == pytest.approx(len(begun) / N, abs=0.1)
        assert epochs == pytest.approx([epochs[-1] * step / 30 for step in range(1, 31)])


@pytest.mark.parametrize("streaming", ["false", "true"], ids=["store", "stream"])
def test_the_shares_of_a_mixture(tmp_path: Path, trained_on: list[torch.Tensor], streaming: str):
    mixture = [
        {"source": str(write_source(tmp_path / f"{letter}.jsonl", size, letter)), "name": letter,
         "weight": weight}
        for letter, size, weight in (("a", 120, 1), ("b", 30, 2))
    ]  # fmt: skip
    run = tmp_path / "run"
    data = ["--data.mixture", json.dumps(mixture), "--data.streaming", streaming]
    assert train(run, *data) == 0
    text = load_tokenizer(run / "last").decode(torch.cat([*trained_on]).flatten())
    # Of 3,840 tokens; no document has more than 50.
    counts = Counter(re.findall(r"[ab]", text))
    last = next(r for r in reversed(records(run)) if "loss" in r)
    assert last["share/b"] + last["share/a"] == pytest.approx(1)
    assert last["share/b"] == pytest.approx(2 / 3, abs=50 / 3840)
    assert counts["b"] / counts.total() == pytest.approx(2 / 3, abs=0.03)
    for letter, size in (("a", 120), ("b", 30)):
        kept = [text for text in documents_of(size, letter) if not is_held_out(text, 0.2)]
        begun = Counter(re.findall(rf"<\d+> (?={letter})", text))
        times = [begun[document.split(letter)[0]] for document in kept]
        assert max(times) - min(times) <= 1
        epochs = sum(times) / len(kept)
        if streaming == "true":
            assert last[f"epochs/{letter}"] == int(epochs)
        else:  # in tokens
            assert last[f"epochs/{letter}"] == pytest.approx(epochs, abs=2 / len(kept))


@pytest.mark.parametrize("streaming", ["false", "true"], ids=["store", "stream"])
def test_sources_that_end_first(tmp_path: Path, capsys: pytest.CaptureFixture[str], streaming: str):
    source = write_source(tmp_path / "text.jsonl", 60)
    run = tmp_path / "run"
    data = ["--data.source", source, "--data.streaming", streaming, "--data.when_exhausted", "stop"]
    assert train(run, *data, "--training.save_every", 4) == 0
    lines = capsys.readouterr().err.splitlines()
    (said,) = [line for line in lines if "sources ended" in line]
    last = max(r["step"] for r in records(run))
    assert said == f"the sources ended at step {last} of 30: the run ends here"
    assert 5 < last < 30
    assert last % 4  # or nothing is shown of the checkpoint
    assert [r["step"] for r in records(run) if "eval_loss" in r] == [0, last]
    assert latest_checkpoint(run / "checkpoints", pytest.fail).name == f"checkpoint-{last}"
    for name in ("best", "last"):
        assert json.loads((run / name / "evaluation.json").read_text())["step"] == last

    # Killed before that was known, and resumed.
    again = tmp_path / "again"
    before = (run / "metrics.jsonl").read_text()
    weights = load_file(run / "last" / "model.safetensors")
    run.rename(again)
    for path in (again / "last", again / "best", again / "checkpoints" / f"checkpoint-{last}"):
        path.rename(tmp_path / path.name)
    assert train(again, *data, "--training.save_every", 4, "--resume") == 0
    assert all(
        weights[name].equal(tensor)
        for name, tensor in load_file(again / "last" / "model.safetensors").items()
    )
    lines = (again / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [
        json.loads(line)["step"] for line in before.splitlines()
    ]
    # Resumed at its end: nothing is trained or logged a second time.
    assert train(again, *data, "--training.save_every", 4, "--resume") == 0
    assert (again / "metrics.jsonl").read_text().splitlines() == lines


def test_sources_that_end_before_the_first_step(tmp_path: Path, capsys):
    source = write_source(tmp_path / "text.jsonl", 12)
    data = ["--data.source", source, "--data.when_exhausted", "stop"]
    assert train(tmp_path / "run", *data, "--training.gradient_accumulation_steps", 50) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "i3lm train: error: the sources end before they fill one step of 50 batches: give more "
        "text, or a smaller training.batch_size or training.gradient_accumulation_steps"
    )


# Trains as the command does, but dies of SIGKILL at a document of the text that it tokenizes.
DYING = """
import os, signal, sys
from i3lm.cli import main
from i3lm.data import encoding, token_store
from i3lm.training import data

encoding.BATCH_DOCUMENTS, token_store.SAFE_TOKENS = 20, 500
prepare = data.prepare_stores

def prepare_and_die(source, *arguments, **options):
    read = source.read
    def dying(cursor=None):
        for number, document in enumerate(read(cursor)):
            if number == 110:
                os.kill(os.getpid(), signal.SIGKILL)
            yield document
    source.read = dying
    return prepare(source, *arguments, **options)

data.prepare_stores = prepare_and_die
main(sys.argv[1:])
"""


def test_killed_while_tokenizing(tmp_path: Path, process_environment: dict[str, str]):
    source = write_source(tmp_path / "text.jsonl", 200)
    caches = [tmp_path / "cache", tmp_path / "killed cache"]
    runs = [tmp_path / "run", tmp_path / "killed"]
    options = [
        ["--data.source", source, "--data.rows", "packed", "--data.cache", cache]
        for cache in caches
    ]
    assert train(runs[0], *options[0]) == 0
    command = ["train", "--output", runs[1], *OPTIONS, *options[1]]
    died = subprocess.run(
        [sys.executable, "-c", DYING, *map(str, command)], env=process_environment, timeout=60
    )
    assert died.returncode == -signal.SIGKILL
    (store,) = caches[1].iterdir()
    assert (store / "progress.json").exists()  # something to go on with
    assert not runs[1].exists()
    assert train(runs[1], *options[1]) == 0
    weights = [(run / "last" / "model.safetensors").read_bytes() for run in runs]
    assert weights[0] == weights[1]
    contents = [
        {path.name: path.read_bytes() for path in cache.glob("*/training/*")} for cache in caches
    ]
    assert contents[0] == contents[1]


def test_a_shard_that_is_damaged_in_the_middle_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("i3lm.data.encoding.BATCH_DOCUMENTS", 20)
    monkeypatch.setattr(token_store, "SHARD_TOKENS", 1000)
    source = write_source(tmp_path / "text.jsonl", 200)
    data = ["--data.source", source, "--data.cache", tmp_path / "cache", "--data.shuffle", "false"]
    assert train(tmp_path / "straight", *data) == 0
    (shard,) = tmp_path.glob("cache/*/training/00002.tokens")
    content = shard.read_bytes()
    shard.write_bytes(bytes([content[0] ^ 1]) + content[1:])

    run = tmp_path / "run"
    capsys.readouterr()
    assert train(run, *data) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"i3lm train: error: {shard}: cannot be used (its content has changed); remove the folder "
        f"{shard.parents[1]} to tokenise the text again"
    )
    saved = latest_checkpoint(run / "checkpoints", pytest.fail)
    assert saved.name == "checkpoint-20"
    # Mended, the run goes on as if nothing had happened.
    shard.write_bytes(content)
    assert train(run, *data, "--resume") == 0
    for name in ("last", "best"):
        ours, expected = (r / name / "model.safetensors" for r in (run, tmp_path / "straight"))
        assert ours.read_bytes() == expected.read_bytes()


def test_a_text_that_has_changed_is_not_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = write_source(tmp_path / "text.jsonl", 60)
    run = tmp_path / "run"
    assert train(run, "--data.source", source) == 0
    write_source(source, 61)
    capsys.readouterr()
    assert train(run, "--data.source", source, "--resume") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(
        r"i3lm train: error: the position to resume from is one in other data: "
        r"documents.fingerprint was \w+-training and is \w+-training; resume with the settings of "
        r"that run, or start a new run",
        line,
    )
