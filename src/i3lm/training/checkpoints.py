"""What a run keeps: its records, and its checkpoints found again."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from i3lm.files import write_file

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
EVALUATION_FILE = "evaluation.json"  # in the folder of a model: its figures on the held-out text


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
