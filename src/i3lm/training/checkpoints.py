"""Folders that hold a model, written whole or not at all, and found again."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from i3lm.errors import OutputError

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Makes `folder` hold what `write` puts into it, or leaves everything as it was.

    `write` gets a temporary folder beside the final one, which takes its place only when
    everything is there.

    Raises:
        OutputError: The folder cannot be written, or the disk is full.
    """
    temporary = folder.with_name(folder.name + ".part")
    previous = folder.with_name(folder.name + ".old")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        write(temporary)
        shutil.rmtree(previous, ignore_errors=True)
        if folder.exists():
            folder.rename(previous)
        temporary.rename(folder)
        shutil.rmtree(previous, ignore_errors=True)
    except BaseException as error:  # an interrupt, too, must leave nothing half-written
        shutil.rmtree(temporary, ignore_errors=True)
        if previous.exists() and not folder.exists():
            previous.rename(folder)
        raise as_output_error(folder, error) or error from error


def write_file(path: Path, text: str) -> None:
    """Makes `path` hold the text, or leaves it as it was.

    Raises:
        OutputError: The file cannot be written, or the disk is full.
    """
    temporary = path.with_name(path.name + ".part")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise as_output_error(path, error) or error from error


def read_records(path: Path, last_step: int) -> list[dict[str, Any]]:
    """The records of a JSON lines file up to a step.

    A line that a killed process left half-written ends the reading.
    """
    records: list[dict[str, Any]] = []
    if not path.exists():
        return records
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if record["step"] <= last_step:
            records.append(record)
    return records


def write_records(path: Path, records: list[dict[str, Any]]) -> None:
    """Makes a JSON lines file hold these records."""
    write_file(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))


def as_output_error(path: Path, error: BaseException) -> OutputError | None:
    """The OutputError that says why `path` could not be written, or None for other errors.

    safetensors reports operating system errors as its own kind, with the number in the text;
    PyTorch's writer of archives gives none: it names only the place in its own source.
    """
    if isinstance(error, BrokenPipeError):
        return None  # it is the reader of our output that went away
    number = getattr(error, "errno", None)
    if number is None and (match := re.search(r"\(os error (\d+)\)", str(error))):
        number = int(match[1])
    reasons = {
        28: "no space is left on the disk, or for this process; free some or write elsewhere",
        27: "the file grew past the size limit of this process; raise the limit (ulimit -f)",
        30: "the file system is read-only; write elsewhere",
        13: "permission denied; choose a folder that you may write to",
        20: "a part of the path is a file, not a folder; choose another path",
        17: "a file of that name is in the way; choose another path",
    }
    if number is None and "inline_container" in str(error):
        number = 28
    if number is None and not isinstance(error, OSError):
        return None
    reason = reasons.get(number or 0, " ".join(str(error).split()))
    return OutputError(f"{path}: cannot be written: {reason}")


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete ``checkpoint-N`` folder of a run, or None."""
    found = [
        (int(match[1]), path)
        for path in folder.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and _is_complete(path)
    ]
    return max(found, default=(0, None))[1]


def _is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end: the Trainer's state comes last."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
