from __future__ import annotations

import json

import pytest

from i3lm.cli import COMMANDS, main
from i3lm.planning import count_parameters
from i3lm.presets import list_presets, load_preset
from tests.conftest import Process


def test_json(i3lm: Process):
    finished = i3lm("models", "--json")
    assert (finished.returncode, finished.stderr) == (0, "")
    rows = json.loads(finished.stdout)
    assert [row["name"] for row in rows] == list_presets()
    for row in rows:
        config = load_preset(row["name"]).config()
        assert row["parameters"] == count_parameters(config)
        assert sum(row["layers"].values()) == config.num_hidden_layers


def test_table(capsys: pytest.CaptureFixture[str]):
    assert main(["models"]) == 0
    out = capsys.readouterr().out
    assert "…" not in out
    for name in list_presets():
        assert f"{count_parameters(load_preset(name).config()):,}" in out


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in COMMANDS)
    assert main([]) == 2
    assert main(["--version"]) == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command(capsys: pytest.CaptureFixture[str], command: str):
    assert main([command, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: i3lm {command}")
