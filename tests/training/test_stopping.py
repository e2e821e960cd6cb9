from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from i3lm.cli import main
from i3lm.errors import ConfigurationError
from i3lm.training.options import TrainingOptions
from tests.cli.test_train import held_out_losses, losses
from tests.conftest import TINY_TRAINING

pytestmark = pytest.mark.usefixtures("one_thread")


def train(run: Path, *options: str) -> int:
    return main(["train", "--output", str(run), "--json", *TINY_TRAINING, *options])


def test_a_run_ends_where_held_out_text_reaches_the_target(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    kept = json.loads((tiny_run / "last" / "evaluation.json").read_text())
    by_step = dict(held_out_losses(tiny_run))
    target = math.exp((by_step[20] + by_step[40]) / 2)  # between the two evaluations
    assert kept["step"] == 60
    run = tmp_path / "run"
    assert train(run, "--training.target_perplexity", str(target)) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["target_reached"] is True
    assert json.loads(out)["steps"] == 40
    assert re.search(rf"step +40  held-out perplexity [\d.]+ has reached the target of "
                     rf"{target:g}: the run ends here\n", err)  # fmt: skip
    assert "not reached" not in err
    figures = json.loads((run / "last" / "evaluation.json").read_text())
    assert (figures["step"], figures["target_reached"]) == (40, True)
    assert figures["perplexity"] <= figures["target_perplexity"] == target
    # Stopping early changes nothing of what came before.
    assert losses(run) == {s: loss for s, loss in losses(tiny_run).items() if s <= 40}
    # A lower target may be asked for afterwards, and the run goes on.
    assert train(run, "--resume", "--training.target_perplexity", "1.01") == 0
    out, err = capsys.readouterr()
    assert (json.loads(out)["target_reached"], json.loads(out)["steps"]) == (False, 60)
    lowest = math.exp(min(held_out_losses(run), key=lambda pair: pair[1])[1])
    assert f"target perplexity 1.01: not reached; the lowest was {lowest:.2f}, at step" in err


def test_a_target_that_is_not_reached_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = tmp_path / "run"
    assert train(run, "--training.max_steps", "3", "--training.target_perplexity", "1.5") == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["target_reached"] is False
    assert re.search(
        r"target perplexity 1\.5: not reached; the lowest was [\d.]+, at step 3\n", err
    )
    assert json.loads((run / "last" / "evaluation.json").read_text())["target_reached"] is False


def test_a_target_below_what_there_is():
    with pytest.raises(ConfigurationError, match=r"target_perplexity \(1\) must be above 1"):
        TrainingOptions(target_perplexity=1)
