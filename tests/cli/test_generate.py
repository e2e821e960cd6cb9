from __future__ import annotations

import json
from pathlib import Path

import pytest

from i3lm.cli import main
from tests.conftest import TINY_MODEL, TINY_TRAINING, Process

pytestmark = pytest.mark.usefixtures("one_thread")


def generate(capsys: pytest.CaptureFixture[str], run: Path, *options: str) -> dict:
    assert main(["generate", str(run), "--prompt", "Once", "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


def test_json(i3lm: Process, tiny_run: Path):
    finished = i3lm("generate", tiny_run, "--prompt", "Once", "--max_new_tokens", 7, "--json")
    assert (finished.returncode, finished.stderr) == (0, "")
    result = json.loads(finished.stdout)
    assert result["prompt"] == "Once"
    assert len(result["text"]) == 7
    assert (result["prompt_tokens"], result["new_tokens"]) == (4, 7)
    assert result["tokens_per_second"] == pytest.approx(7 / result["seconds"], rel=0.01)


def test_text(tiny_run: Path, capsys: pytest.CaptureFixture[str]):
    text = generate(capsys, tiny_run)["text"]
    assert main(["generate", str(tiny_run), "--prompt", "Once"]) == 0
    assert capsys.readouterr().out == f"Once{text}\n"


def test_best_model_of_a_run_is_used(tiny_run: Path, capsys: pytest.CaptureFixture[str]):
    assert generate(capsys, tiny_run)["text"] == generate(capsys, tiny_run / "best")["text"]


def test_seed_decides_the_draws(tiny_run: Path, capsys: pytest.CaptureFixture[str]):
    texts = [generate(capsys, tiny_run, "--seed", seed)["text"] for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("option", ["--top_k=1", "--top_p=0.000001", "--temperature=0.0001"])
def test_narrow_draws_are_greedy(tiny_run: Path, capsys: pytest.CaptureFixture[str], option: str):
    greedy = generate(capsys, tiny_run, "--temperature", "0", "--seed", "5")["text"]
    assert generate(capsys, tiny_run, option, "--seed", "6")["text"] == greedy


def test_longer_than_the_context(tiny_run: Path, capsys: pytest.CaptureFixture[str]):
    assert generate(capsys, tiny_run, "--max_new_tokens", "80")["new_tokens"] == 80


def test_policies_past_the_context(tiny_run: Path, capsys: pytest.CaptureFixture[str]):
    texts = {
        overflow: generate(
            capsys, tiny_run, "--max-new-tokens", "80", "--temperature", "0",
            "--context-overflow", overflow,
        )["text"]
        for overflow in ("window", "shift")
    }  # fmt: skip
    fits = generate(capsys, tiny_run, "--max-new-tokens", "28", "--temperature", "0")["text"]
    assert {len(text) for text in texts.values()} == {80}
    assert all(text.startswith(fits) for text in texts.values())
    assert (
        generate(capsys, tiny_run, "--max-new-tokens", "80", "--temperature", "0")["text"]
        == texts["window"]
    )


def test_a_model_without_an_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = {
        **TINY_MODEL,
        "layer_types": "linear_attention, sliding_attention",
        "sliding_window": 8,
        "position_embedding_type": "rope",
    }
    training = [*TINY_TRAINING, "--model.config", json.dumps(model), "--training.max_steps", "5"]
    assert main(["train", "--output", str(tmp_path / "run"), *training]) == 0
    capsys.readouterr()
    options = ["--prompt", "x" * 40, "--max_new_tokens", "60", "--context_overflow", "error"]
    result = generate(capsys, tmp_path / "run", *options)
    assert (result["prompt_tokens"], result["new_tokens"]) == (40, 60)  # it is made for 32


def test_bf16(tiny_run: Path, capsys: pytest.CaptureFixture[str]):
    assert generate(capsys, tiny_run, "--precision", "bf16")["new_tokens"] == 100
