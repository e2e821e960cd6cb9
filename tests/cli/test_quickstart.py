from __future__ import annotations

import dataclasses
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from i3lm.cli import main
from i3lm.training import run
from tests.conftest import TINY_MODEL

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def two_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the quickstart's run a tiny one."""

    def shorter(output: Path, options, **settings):
        small = dataclasses.replace(
            options,
            model=dataclasses.replace(options.model, config=TINY_MODEL),
            tokenizer=dataclasses.replace(options.tokenizer, vocab_size=300),
            data=dataclasses.replace(options.data, size=60),
            training=dataclasses.replace(options.training, max_steps=2, batch_size=2),
            sample=dataclasses.replace(options.sample, max_new_tokens=5, prompts=["Otto"]),
        )
        return original(output, small, **settings)

    original = run.run_training
    monkeypatch.setattr(run, "run_training", shorter)


@pytest.mark.parametrize("installed", [True, False])
def test_the_next_command_works(
    two_steps: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    installed: bool,
):
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}" if installed else None)
    folder = tmp_path / "quick"
    assert main(["quickstart", "--output", str(folder)]) == 0
    out = capsys.readouterr().out
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert f"loss plot: {folder / 'loss.png'}" in out
    following = out.splitlines()[-1].removeprefix("next: ").split("    or    ")
    assert following[1].endswith(f"i3lm chat {folder}")
    program, *arguments = shlex.split(following[0])
    assert program == ("i3lm" if installed else sys.executable)
    if not installed:
        command = [program, *arguments, "--max-new-tokens", "3"]
        finished = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert finished.stdout.startswith("One morning"), finished.stderr
