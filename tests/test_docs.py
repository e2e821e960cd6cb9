"""What the documentation says is what the code does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from i3lm.planning import count_parameters
from i3lm.presets import list_presets, load_preset

ROOT = Path(__file__).parents[1]


def test_the_command_line_reference_is_what_the_parsers_say():
    code = "import generate_cli, sys; sys.stdout.write(generate_cli.reference())"
    made = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "docs", capture_output=True, check=True
    ).stdout.decode()
    kept = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert made == kept, "run: python docs/generate_cli.py"


def test_the_table_of_the_family_has_the_exact_counts():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = [line for line in readme.splitlines() if line.startswith("| i3-")]
    counts = {}
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        if cells[-1].replace(",", "").isdigit():
            counts[cells[0]] = int(cells[-1].replace(",", ""))
    assert counts == {name: count_parameters(load_preset(name).config()) for name in list_presets()}


def test_readme_and_notice_link_to_the_original():
    for name in ("README.md", "NOTICE"):
        assert "https://github.com/FlameF0X/open-i3" in (ROOT / name).read_text(encoding="utf-8")
