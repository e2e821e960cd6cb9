from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from i3lm.cli import main
from i3lm.tokenizers import load_tokenizer
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


# Sessions


def say(
    run: Path, file: Path, lines: str, monkeypatch: pytest.MonkeyPatch, *options: str
) -> list[str]:
    """Holds a piece of a conversation; gives the lines of the saved text after it."""
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    arguments = ["--session", str(file), "--max_new_tokens", "3", *options]
    assert main(["chat", str(run), *arguments]) == 0
    with safe_open(file, "pt") as saved:
        return [turn["prompt"] for turn in json.loads(saved.metadata()["turns"])]


def test_a_chat_template_asks_and_the_line_is_not_repeated(
    tiny_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    model = tmp_path / "model"
    shutil.copytree(tiny_run / "best", model)
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['content'] }}? {% endfor %}"
        "{% if add_generation_prompt %}So: {% endif %}"
    )
    monkeypatch.setattr("sys.stdin", io.StringIO("Once\n" + 27 * "a" + "\n"))
    assert main(["chat", str(model), "--max_new_tokens", "4"]) == 0
    captured = capsys.readouterr()
    assert "i3: Once" not in captured.out
    assert re.search(r"i3: (.|\n)*\[4 tokens in ", captured.out)
    assert captured.err.startswith("the prompt has 33 tokens")  # the template's six among them


def test_a_session_goes_on_where_it_was_left(
    tiny_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    once, twice = tmp_path / "once", tmp_path / "twice"
    assert say(tiny_run, once, "Once\nMina\n", monkeypatch) == ["Once", "Mina"]
    out = capsys.readouterr().out
    assert out.startswith(
        f"{once}: 0 turns so far, 0 tokens said of a context of 32. Type /rewind, /fork FILE, or "
        "/exit to stop.\n\nUser: \ni3: Once"
    )
    assert len(re.findall(r"\[3 tokens in .* tokens/s, \d+ tokens said of a cont", out)) == 2
    assert say(tiny_run, twice, "Once\n/exit\nnot read", monkeypatch) == ["Once"]
    assert say(tiny_run, twice, "Mina\n", monkeypatch, "--seed", "1") == ["Once", "Mina"]
    assert f"{twice}: 1 turn so far, 7 tokens said of" in capsys.readouterr().out
    assert tokens_of(twice) == tokens_of(once)


@pytest.fixture
def chatty(tiny_run: Path, tmp_path: Path) -> Path:
    """The model of the tiny run, with a chat template that its characters can write."""
    model = tmp_path / "chatty"
    shutil.copytree(tiny_run / "best", model)
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['content'] }}{{ '?' if m['role'] == 'user' else '.' }}"
        "{% endfor %}{% if add_generation_prompt %} {% endif %}"
    )
    return model


def test_a_session_is_a_conversation_where_there_is_a_chat_template(
    i3lm: Process, chatty: Path, tmp_path: Path
):
    once, twice = tmp_path / "once", tmp_path / "twice"

    def chat(file: Path, lines: str, seed: int) -> str:
        options = ("--max-new-tokens", 3, "--seed", seed)
        finished = i3lm("chat", chatty, "--session", file, *options, input=lines)
        assert (finished.returncode, finished.stderr) == (0, "")
        return finished.stdout

    out = chat(once, "On\nBe\n", 0)
    assert not re.search("i3: (On|Be)", out)  # the model answers, and goes on from nothing
    chat(twice, "On\nMo\n/rewind\n", 0)
    assert len(tokens_of(twice)) == len("On? ") + 3
    out = chat(twice, f"Be\n/fork {tmp_path / 'copy'}\n", 1)
    assert ": 1 turn so far, 7 tokens said of a context of 32" in out
    assert len(tokens_of(once)) == 7 + len(".Be? ") + 3
    assert tokens_of(twice) == tokens_of(once) == tokens_of(tmp_path / "copy")
    with safe_open(once, "pt") as saved:
        replies = [turn["reply"] for turn in json.loads(saved.metadata()["turns"])]
    said = load_tokenizer(chatty).decode(tokens_of(once))
    assert said == f"On? {replies[0]}.Be? {replies[1]}"


def test_a_session_by_another_chat_template(
    chatty: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    file = tmp_path / "s"
    assert say(chatty, file, "On\n", monkeypatch) == ["On"]
    (chatty / "chat_template.jinja").unlink()
    before = file.read_bytes()
    capsys.readouterr()
    assert main(["chat", str(chatty), "--session", str(file)]) == 2
    assert capsys.readouterr().err == (
        f"i3lm chat: error: {file}: the session was held with another chat template (its "
        "fingerprint differs): give the checkpoint that it was held with, or another session "
        "file\n"
    )
    assert file.read_bytes() == before


def tokens_of(file: Path) -> list[int]:
    with safe_open(file, "pt") as saved:
        return saved.get_tensor("tokens").tolist()


def test_commands_in_a_session(
    tiny_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    file, copy = tmp_path / "talk", tmp_path / "copy"
    lines = f"Once\nMina\n/fork {copy}\n/rewind\nBen\n"
    assert say(tiny_run, file, lines, monkeypatch) == ["Once", "Ben"]
    captured = capsys.readouterr()
    assert f"[saved a copy: go on there with --session {copy}]" in captured.out
    assert "[1 turn left, 7 tokens said of a context of 32]" in captured.out
    assert captured.err == ""
    assert say(tiny_run, copy, "", monkeypatch) == ["Once", "Mina"]
    before = copy.read_bytes()
    wrong = f"/rewind 3\n/rewind x\n/fork {copy}\n/fork\n/fork {tmp_path}/no/s\n/help\n"
    assert say(tiny_run, file, wrong, monkeypatch) == ["Once", "Ben"]
    assert capsys.readouterr().err.splitlines() == [
        "cannot go back 3 turns: the session has 2; give a number from 1 to that",
        "/rewind x: give the number of turns to take back",
        f"/fork {copy}: this file exists; give another",
        "/fork needs the path of the file to write: /fork FILE",
        f"{tmp_path}/no/s: cannot be written: its folder does not exist; make it, or choose "
        "another path",
        "unknown command /help: there are /rewind, /fork and /exit",
    ]
    assert copy.read_bytes() == before


def test_sessions_that_cannot_be_taken_are_left_alone(
    tiny_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    file = tmp_path / "s"
    say(tiny_run, file, "Once\n", monkeypatch)
    whole = file.read_bytes()
    other = tmp_path / "other"
    shutil.copytree(tiny_run / "best", other)
    weights = load_file(other / "model.safetensors")
    weights["model.norm.bias"] += 1e-3
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    capsys.readouterr()
    for checkpoint, content, message in (
        (other, whole, f"{file}: the session was held with another model (its fingerprint"),
        (tiny_run, whole[:-5], f"{file}: not readable as a session ("),
        (tiny_run, b"some notes", f"{file}: not readable as a session ("),
        (tiny_run, whole[:-1] + bytes([whole[-1] ^ 1]), f"{file}: the session is damaged (its"),
    ):
        file.write_bytes(content)
        assert main(["chat", str(checkpoint), "--session", str(file)]) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith(f"i3lm chat: error: {message}")
        assert captured.err.count("\n") == 1
        assert captured.out == ""
        assert file.read_bytes() == content
    missing = tmp_path / "no" / "s"
    assert main(["chat", str(tiny_run), "--session", str(missing)]) == 2
    assert capsys.readouterr().err == (
        f"i3lm chat: error: {missing}: cannot be written: its folder does not exist; make "
        "it, or choose another path\n"
    )
