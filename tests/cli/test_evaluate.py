from __future__ import annotations

import json
from pathlib import Path

import pytest

from i3lm.cli import main
from tests.conftest import TINY_TRAINING, Process

pytestmark = pytest.mark.usefixtures("one_thread")

STORIES = ["--data", "stories", "--size", "32"]


def evaluate(capsys: pytest.CaptureFixture[str], run: Path, *options: str) -> dict:
    assert main(["evaluate", str(run), "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


def test_figures_are_those_of_the_run(i3lm: Process, tiny_run: Path):
    finished = i3lm("evaluate", tiny_run, *STORIES, "--held_out_fraction", 0.1, "--json")
    assert (finished.returncode, finished.stderr) == (0, "")
    figures = json.loads(finished.stdout)
    records = [json.loads(line) for line in (tiny_run / "metrics.jsonl").read_text().splitlines()]
    best = min((r for r in records if "eval_loss" in r), key=lambda r: r["eval_loss"])
    # The batch size differs (16 here, 8 there), so sums of float32 may differ in the last bits.
    for name in ("loss", "perplexity", "bits_per_byte"):
        assert figures[name] == pytest.approx(best[f"eval_{name}"], rel=1e-6)
    assert figures["context_length"] == 32
    assert 0 < figures["documents"] < 32


def test_batch_size_does_not_change_the_result(tiny_run: Path, capsys: pytest.CaptureFixture[str]):
    first, *others = (
        evaluate(capsys, tiny_run, *STORIES, "--batch_size", size) for size in ("1", "7", "64")
    )
    for other in others:
        assert other["loss"] == pytest.approx(first["loss"], rel=1e-6)
        assert other["tokens"] == first["tokens"]


def test_shorter_context_scores_worse(tiny_run: Path, capsys: pytest.CaptureFixture[str]):
    long = evaluate(capsys, tiny_run, *STORIES)
    short = evaluate(capsys, tiny_run, *STORIES, "--context_length", "1")
    assert short["tokens"] == long["tokens"]
    assert short["loss"] > long["loss"]


def test_text(tiny_run: Path, capsys: pytest.CaptureFixture[str]):
    figures = evaluate(capsys, tiny_run, *STORIES)
    assert main(["evaluate", str(tiny_run), *STORIES]) == 0
    assert capsys.readouterr().out.startswith(
        f"loss {figures['loss']:.4f}, perplexity {figures['perplexity']:,.2f}, "
        f"bits per byte {figures['bits_per_byte']:.4f}\n"
        f"{figures['tokens']:,} tokens, {figures['bytes']:,} bytes in 32 documents, context 32; "
        "loss in nats per token\n"
    )
    assert not figures["lowercases"]


def test_it_says_what_bits_per_byte_leave_out(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "text.txt").write_text("Once 你好\n")
    data = ["--data", str(tmp_path / "text.txt")]
    assert evaluate(capsys, tiny_run, *data)["unknown_tokens"] == 2
    assert main(["evaluate", str(tiny_run), *data]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        "note: <UNK> stands 2 times for text that the tokenizer cannot write, so bits per byte "
        "leave that text out"
    )
    train = ["train", "--output", str(tmp_path / "run"), *TINY_TRAINING, "--sample.every", "0"]
    assert main([*train, "--tokenizer.lowercase", "true", "--training.max_steps", "1"]) == 0
    capsys.readouterr()
    assert evaluate(capsys, tmp_path / "run", *STORIES)["lowercases"]
    assert main(["evaluate", str(tmp_path / "run"), *STORIES]) == 0
    assert "note: the tokenizer lower-cases the text, so" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--held_out_fraction", "0"], "held_out_fraction (0.0) must be above 0 and at most 1"),
        (["--batch_size", "0"], "batch_size (0) must be at least 1"),
        (
            ["--context_length", "64"],
            "context_length (64) must be between 1 and the model's max_position_embeddings (32)",
        ),
        (
            ["--size", "2", "--held_out_fraction", "0.001"],
            "stories: no document falls into the held-out part with held_out_fraction 0.001: give "
            "more documents or a larger fraction",
        ),
    ],
)
def test_refusals(
    tiny_run: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
):
    assert main(["evaluate", str(tiny_run), *STORIES, *options]) == 2
    assert capsys.readouterr().err == f"i3lm evaluate: error: {message}\n"
