from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from i3lm.cli import main
from tests.cli.test_errors import snapshot
from tests.conftest import Process

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def small_run(i3lm: Process, tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny run's best model with int8 weights."""
    pytest.importorskip("torchao")
    output = tmp_path_factory.mktemp("quantized") / "int8"
    finished = i3lm("quantize", tiny_run, "--output", output, "--size", 8, "--json")
    assert (finished.returncode, finished.stderr) == (0, "")
    (output.parent / "figures.json").write_text(finished.stdout)
    return output


def test_the_figures(small_run: Path):
    figures = json.loads((small_run.parent / "figures.json").read_text())
    assert figures["output"] == str(small_run)
    assert figures["documents"] == 8
    before, after = figures["bits_per_byte_before"], figures["bits_per_byte_after"]
    assert before != after
    assert after == pytest.approx(before, rel=0.02)
    assert 0.5 < figures["quantized_parameters"] / figures["parameters"] < 1
    assert figures["bytes_after"] < figures["bytes_before"]


def test_the_result_is_a_checkpoint_like_any_other(
    small_run: Path, capsys: pytest.CaptureFixture[str]
):
    figures = json.loads((small_run.parent / "figures.json").read_text())
    assert main(["evaluate", str(small_run), "--data", "stories", "--size", "8", "--json"]) == 0
    evaluated = json.loads(capsys.readouterr().out)
    assert evaluated["bits_per_byte"] == pytest.approx(figures["bits_per_byte_after"], abs=1e-6)
    options = ["--prompt", "Once", "--max_new_tokens", "5", "--temperature", "0", "--json"]
    assert main(["generate", str(small_run), *options]) == 0
    assert json.loads(capsys.readouterr().out)["new_tokens"] == 5
    assert main(["verify", str(small_run), "--device", "cpu", "--json"]) == 0
    checks = {c["name"]: c for c in json.loads(capsys.readouterr().out)["checks"]}
    assert checks["decode = parallel forward"]["passed"] is True
    assert checks["saved and read back = native"]["reason"] == (
        "transformers cannot save a model that it read quantised"
    )
    assert "int8 weights (torchao)" in (small_run / "README.md").read_text()


def test_what_is_printed(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], small_run: Path
):
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time\n\nMina had a dog.\n")
    out = tmp_path / "out"
    assert main(["quantize", str(tiny_run), "--output", str(out), "--data", str(text)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        r"[\d,]+ of [\d,]+ parameters \(\d\d%\) are int8 now; weights 0\.\d MB before, 0\.\d MB "
        r"after",
        lines[0],
    )
    assert re.fullmatch(
        rf"bits per byte on \d documents of {text}: \d\.\d{{4}} before, \d\.\d{{4}} after "
        r"\([+-]\d\.\d{5}\)",
        lines[1],
    )
    assert lines[2:] == [f"wrote {out}"]


def refused(capsys: pytest.CaptureFixture[str], source: Path, output: Path, *more: str) -> str:
    """The line that a command in vain ends with; nothing may have changed."""
    before = snapshot(output.parent)
    assert main(["quantize", str(source), "--output", str(output), *more]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert snapshot(output.parent) == before
    return captured.err.removeprefix("i3lm quantize: error: ").rstrip()


def test_quantising_twice(small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert refused(capsys, small_run, tmp_path / "again") == (
        f"{small_run}: is quantised already (by torchao): quantise the checkpoint that it was "
        "made from"
    )
    assert refused(capsys, small_run, small_run) == f"{small_run}: is not empty; give a new folder"


def test_places_that_cannot_be_taken(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "file"
    file.write_text("mine")
    assert refused(capsys, tiny_run, file) == f"{file}: is a file; give the path of a folder"
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "mine").write_text("mine")
    assert refused(capsys, tiny_run, folder) == f"{folder}: is not empty; give a new folder"


def test_a_text_that_cannot_be_read_leaves_nothing(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], small_run: Path
):
    message = refused(capsys, tiny_run, tmp_path / "out", "--data", str(tmp_path / "no.txt"))
    assert message.startswith(f"{tmp_path}/no.txt: no such file")


def test_torchao_missing(
    tiny_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr("i3lm.inference.quantization.has_torchao", lambda: False)
    assert refused(capsys, tiny_run, tmp_path / "out") == (
        "quantising needs torchao, which is not installed: pip install 'i3lm[quant]' (or: pip "
        "install torchao)"
    )


def test_reading_without_torchao(
    small_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("i3lm.inference.quantization.has_torchao", lambda: False)
    assert main(["generate", str(small_run), "--prompt", "Once"]) == 2
    assert capsys.readouterr().err == (
        f"i3lm generate: error: {small_run}: is quantised, and reading it needs torchao, which is "
        "not installed: pip install 'i3lm[quant]' (or: pip install torchao)\n"
    )
