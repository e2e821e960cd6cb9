from __future__ import annotations

import io
import re
from pathlib import Path

import pytest

from i3lm.cli import main
from tests.conftest import Process

pytestmark = pytest.mark.usefixtures("one_thread")

STATISTICS = r"\[5 tokens in \d+\.\d\d s, \d+\.\d tokens/s\]"


def test_talk_through_a_pipe(i3lm: Process, tiny_run: Path):
    talk = b"Once\n\n   \n" + b"x" * 33 + b"\ncaf\xe9\nOnce\nQUIT\nnever read\n"
    finished = i3lm("chat", tiny_run, "--max_new_tokens", 5, input=talk, text=False)
    out, error = finished.stdout.decode(), finished.stderr.decode()
    assert finished.returncode == 0
    assert out.startswith("Type quit or exit to stop.\n\nUser: \ni3: Once")
    assert len(re.findall(STATISTICS, out)) == 2
    assert "never read" not in out
    long, encoding = error.splitlines()
    assert long == ("the prompt has 33 tokens, and this model's context is 32: shorten the prompt")
    assert encoding.startswith("the prompt is not UTF-8 text (character 4 cannot be encoded)")


@pytest.mark.parametrize("last", ["", "exit\n", "Once"])
def test_end(
    tiny_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], last: str
):
    monkeypatch.setattr("sys.stdin", io.StringIO(last))
    assert main(["chat", str(tiny_run), "--max_new_tokens", "5"]) == 0
    out = capsys.readouterr().out
    assert len(re.findall(STATISTICS, out)) == (last == "Once")


def test_each_turn_has_draws_of_its_own(
    tiny_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def replies(seed: str) -> list[str]:
        monkeypatch.setattr("sys.stdin", io.StringIO("Once\nOnce\n"))
        options = ["--max_new_tokens", "5", "--temperature", "2", "--seed", seed]
        assert main(["chat", str(tiny_run), *options]) == 0
        return re.findall(r"i3: Once((?:.|\n)*?)\n?\[5 tokens", capsys.readouterr().out)

    first, second = replies("0")
    assert first != second
    assert replies("0") == [first, second]
    assert replies("1")[0] == second
