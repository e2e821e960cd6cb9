"""What a run keeps: its records, and its checkpoints, written whole and verified when read."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from safetensors.torch import load_file, save_file
from torch import Tensor

from i3lm.errors import CheckpointError
from i3lm.files import sync_entries, sync_folder, write_file

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
EVALUATION_FILE = "evaluation.json"  # in the folder of a model: its figures on the held-out text
MANIFEST_FILE = "manifest.json"  # in a checkpoint: its files, their sizes and checksums


class Stateful(Protocol):
    """Something whose position a checkpoint keeps, such as a reader of data."""

    def state_dict(self) -> dict[str, Any]:
        """The position. At the top, each value is a tensor or goes through JSON unchanged."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a position that `state_dict` gave."""


@runtime_checkable
class Skippable(Stateful, Protocol):
    """A reader of data that can pass over some of it."""

    def skip_batches(self, batches: int) -> None:
        """Goes as many batches further as one process reads, without giving them."""


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


def checkpoint_step(checkpoint: Path) -> int:
    """The step at which a ``checkpoint-N`` folder was saved."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def list_checkpoints(folder: Path) -> list[Path]:
    """The ``checkpoint-N`` folders of a run, the newest first, whole or not."""
    found = [p for p in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(found, key=checkpoint_step, reverse=True)


def publish_checkpoint(written: Path, checkpoint: Path) -> None:
    """Gives a folder that holds all of a checkpoint its manifest and then its name.

    The manifest reads every file once more: about 0.9 seconds for a checkpoint of 1 GB, and as
    much again when it is verified.

    Args:
        written: A folder on the same file system, below one of its own.
        checkpoint: The ``checkpoint-N`` folder that it becomes.
    """
    files = {
        path.relative_to(written).as_posix(): {
            "bytes": path.stat().st_size,
            "blake2b": _checksum(path),
        }
        for path in sorted(written.rglob("*"))
        if path.is_file()
    }
    manifest = {"step": checkpoint_step(checkpoint), "files": files}
    (written / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    sync_folder(written)
    if checkpoint.exists():
        checkpoint.rename(written.with_name("replaced"))
    written.rename(checkpoint)
    sync_entries(checkpoint.parent)


def rotate_checkpoints(folder: Path, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints of a run."""
    for path in list_checkpoints(folder)[keep:]:
        # Renamed first, so that one that is removed by half does not count as a checkpoint.
        doomed = path.with_name(path.name + ".old")
        path.rename(doomed)
        shutil.rmtree(doomed)


def verify_checkpoint(checkpoint: Path) -> None:
    """Reads every file of a checkpoint and holds it against the manifest.

    Raises:
        CheckpointError: Something is missing, or is not what was written.
    """
    try:
        manifest = json.loads((checkpoint / MANIFEST_FILE).read_text(encoding="utf-8"))
        for name, expected in manifest["files"].items():
            path = checkpoint / name
            size = path.stat().st_size
            if size != expected["bytes"]:
                wrong = f"{name} has {size:,} bytes instead of {expected['bytes']:,}"
                raise CheckpointError(f"{checkpoint}: is damaged: {wrong}")
            if _checksum(path) != expected["blake2b"]:
                raise CheckpointError(f"{checkpoint}: is damaged: the checksum of {name} differs")
    except FileNotFoundError as error:
        missing = Path(error.filename).name
        raise CheckpointError(f"{checkpoint}: is not whole: {missing} is missing") from error
    except OSError as error:
        raise CheckpointError(f"{checkpoint}: cannot be read: {error.strerror}") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{checkpoint}: is damaged: {MANIFEST_FILE} is not ours") from error


def latest_checkpoint(folder: Path, report: Callable[[str], None]) -> Path | None:
    """The newest checkpoint of a run that is whole and undamaged; None if there is no checkpoint.

    Args:
        folder: The folder of the run's checkpoints.
        report: Takes one line for every newer checkpoint that is passed over.

    Raises:
        CheckpointError: There are checkpoints, and all of them are damaged.
    """
    found = list_checkpoints(folder)
    for path in found:
        try:
            verify_checkpoint(path)
        except CheckpointError as error:
            if path == found[-1]:
                raise CheckpointError(
                    f"{error}; no checkpoint before it is left: begin again with --overwrite"
                ) from error
            report(f"{error}; going back to the checkpoint before it")
        else:
            return path
    return None


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).hexdigest()


def save_states(folder: Path, states: Mapping[str, dict[str, Any]]) -> None:
    """Writes each state as ``NAME.json``, its tensors as ``NAME.safetensors``."""
    for name, state in states.items():
        tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
        rest = {key: value for key, value in state.items() if key not in tensors}
        (folder / f"{name}.json").write_text(json.dumps(rest) + "\n", encoding="utf-8")
        if tensors:
            contiguous = {key: value.detach().contiguous() for key, value in tensors.items()}
            save_file(contiguous, folder / f"{name}.safetensors")


def load_state(folder: Path, name: str) -> dict[str, Any]:
    """Reads what `save_states` wrote under a name; tensors are on the CPU.

    Raises:
        CheckpointError: The checkpoint has no such state.
    """
    path = folder / f"{name}.json"
    if not path.exists():
        raise CheckpointError(f"{folder}: holds no {path.name}: it is of another kind of run")
    state = json.loads(path.read_text(encoding="utf-8"))
    tensors = folder / f"{name}.safetensors"
    return state | load_file(tensors) if tensors.exists() else state
