"""Folders that hold a model, written whole or not at all, and found again."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

from i3lm.errors import OutputError

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Makes `folder` hold what `write` puts into it, or leaves everything as it was.

    `write` gets a temporary folder beside the final one, which takes its place only when
    everything is there.

    Raises:
        OutputError: The folder cannot be written, or the disk is full.
    """
    temporary = folder.with_name(folder.name + ".part")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        write(temporary)
        previous = folder.with_name(folder.name + ".old")
        shutil.rmtree(previous, ignore_errors=True)
        if folder.exists():
            folder.rename(previous)
        temporary.rename(folder)
        shutil.rmtree(previous, ignore_errors=True)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise as_output_error(folder, error) or error from error


def as_output_error(path: Path, error: BaseException) -> OutputError | None:
    """The OutputError that says why `path` could not be written, or None for other errors.

    safetensors reports operating system errors as its own kind, with the number in the text.
    """
    number = getattr(error, "errno", None)
    if number is None and (match := re.search(r"\(os error (\d+)\)", str(error))):
        number = int(match[1])
    reasons = {
        28: "no space is left on the disk; free some or write elsewhere",
        27: "the file grew past the size limit set for this process",
        30: "the file system is read-only; write elsewhere",
        13: "permission denied; choose a folder that you may write to",
        20: "a part of the path is a file, not a folder; choose another path",
        17: "a file of that name is in the way; choose another path",
    }
    if number is None and not isinstance(error, OSError):
        return None
    reason = reasons.get(number or 0, " ".join(str(error).split()))
    return OutputError(f"{path}: cannot be written: {reason}")


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete ``checkpoint-N`` folder of a run, or None."""
    found = [
        (int(match[1]), path)
        for path in folder.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
        and (path / "trainer_state.json").exists()
    ]
    return max(found, default=(0, None))[1]
