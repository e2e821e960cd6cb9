"""What `make` takes for made."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_a_venv_that_failed_half_way_is_made_again(tmp_path: Path):
    venv, python = tmp_path / "venv", tmp_path / "python"

    def make(ending: str) -> int:
        # Like `python3 -m venv` where ensurepip is missing: the interpreter is there, pip is not.
        python.write_text(
            f"#!/bin/sh\nmkdir -p {venv}/bin\nln -sf /bin/sh {venv}/bin/python\n{ending}"
        )
        python.chmod(0o755)
        command = [
            "make",
            "-C",
            str(ROOT),
            f"{venv}/bin/python",
            f"VENV={venv}",
            f"PYTHON={python}",
        ]
        return subprocess.run(command, capture_output=True, timeout=60).returncode

    assert make("exit 1\n") == 2
    assert make("exit 1\n") == 2
    assert make("exit 0\n") == 0
    assert make("exit 1\n") == 0  # it is whole now, and not made again
