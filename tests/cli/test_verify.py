from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from i3lm.cli import main
from i3lm.models.i3 import modeling_i3
from tests.conftest import Process

pytestmark = pytest.mark.usefixtures("one_thread")

FIXTURES = Path(__file__).parents[1] / "fixtures" / "open_i3"


def test_the_table(i3lm: Process, tiny_run: Path):
    finished = i3lm("verify", tiny_run, "--device", "cpu")
    assert (finished.returncode, finished.stderr) == (0, "")
    lines = finished.stdout.splitlines()
    for name in ("batch = single", "decode = parallel forward", "wkv numba = reference"):
        row = next(line for line in lines if line.strip().startswith(name))
        assert re.fullmatch(r".*\d\.\de-?\+?\d\d +1e-04 +holds *", row), row
    assert any("does not apply: " in line for line in lines)
    assert lines[-1] == "all 9 hold on cpu in fp32"


def test_a_converted_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "converted"
    assert main(["convert", str(FIXTURES / "open-i3-80m-artifacts"), str(out)]) == 0
    capsys.readouterr()
    assert main(["verify", str(out), "--device", "cpu", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["passed"] is True
    assert {check["passed"] for check in result["checks"]} == {True, None}
    kernel = next(c for c in result["checks"] if c["name"] == "state_space numba = reference")
    assert 0 < kernel["difference"] <= kernel["tolerance"] == 1e-4


def test_a_broken_model_ends_in_status_1(
    tiny_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(modeling_i3, "padding_mask", lambda *arguments: None)
    assert main(["verify", str(tiny_run), "--device", "cpu"]) == 1
    captured = capsys.readouterr()
    assert re.search(r"left pad = none +\d.* FAILS", captured.out)
    assert captured.out.endswith("1 of 9 FAILED: left pad = none\n")
    assert main(["verify", str(tiny_run), "--device", "cpu", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["passed"] is False


def test_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["verify", str(tmp_path)]) == 2
    assert f"{tmp_path}: holds no model" in capsys.readouterr().err
