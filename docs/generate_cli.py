"""Writes docs/cli.md from the parsers themselves: ``python docs/generate_cli.py``."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

PAGE = Path(__file__).with_name("cli.md")


def reference() -> str:
    """The whole page."""
    os.environ["COLUMNS"] = "100"
    from i3lm.cli import COMMANDS, main
    from i3lm.cli.running import build_parser

    parts = [
        "# The command line",
        "Made from the parsers by `python docs/generate_cli.py`; a test keeps it up to date.",
        f"```text\n{_printed(main, ['--help'])}```",
    ]
    for name in COMMANDS:
        function = getattr(importlib.import_module(f"i3lm.cli.{name}"), name)
        parts.append(f"## i3lm {name}\n\n```text\n{build_parser(name, function).format_help()}```")
    return "\n\n".join(parts) + "\n"


def _printed(function, arguments: list[str]) -> str:
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as captured:
        function(arguments)
    return captured.getvalue()


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
