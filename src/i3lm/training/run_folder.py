"""The folder of a run: refused before anything is lost, prepared, and found again."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from i3lm.errors import CheckpointError, ConfigurationError, OutputError
from i3lm.files import settle_folder, write_file, writing
from i3lm.processes import process_rank
from i3lm.training.checkpoints import (
    CONFIG_FILE,
    METRICS_FILE,
    SAMPLES_FILE,
    checkpoint_step,
    latest_checkpoint,
    list_checkpoints,
    load_state,
)
from i3lm.training.options import AdapterOptions, RunOptions, TrainingOptions
from i3lm.training.tracking import TENSORBOARD_FOLDER, WANDB_FOLDER


def check_run_folder(output: Path, options: RunOptions, *, resume: bool, overwrite: bool) -> None:
    """Refuses a folder that cannot be written, or whose content would be lost."""
    if resume and overwrite:
        raise ConfigurationError("--resume and --overwrite exclude each other: give one")
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output}: is a file; give a folder")
    existing = next((p for p in (output, *output.parents) if p.exists()), Path())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass  # only trying tells: permission bits say nothing of a read-only file system
    except OSError as error:
        raise OutputError(
            f"{output}: cannot be written: nothing can be created in {existing} "
            f"({error.strerror}); give another folder"
        ) from error
    # A process that was killed while it began leaves this much.
    begun = {output / f"{CONFIG_FILE}.part"}
    if output.is_dir() and set(output.iterdir()) - begun:
        if _saved_options(output) is None:
            raise OutputError(f"{output}: is not empty and holds no run of i3lm; give a new folder")
        if resume:
            _check_same_run(output, options)
        elif not overwrite:
            raise OutputError(
                f"{output}: already holds a run; replace it with --overwrite, give another "
                "--output, or go on with it: i3lm train --resume"
            )
    elif resume:
        raise OutputError(f"{output}: holds no run to resume; leave --resume out to begin one")


def _check_same_run(output: Path, options: RunOptions) -> None:
    """Refuses to resume with options that would make it another run."""
    saved, now = _saved_options(output) or {}, dataclasses.asdict(options)
    defaults = {"training": TrainingOptions(), "adapter": AdapterOptions()}
    for group in ("model", "tokenizer", "data", "training", "adapter"):
        for key, value in now[group].items():
            # An option that is not there is younger than the run, which had its default.
            default = getattr(defaults.get(group), key, None)
            before = saved.get(group, {}).get(key, default)
            if before != value and (group, key) not in _MAY_CHANGE:
                raise ConfigurationError(
                    f"{output}: the run was begun with {group}.{key} {before!r}, now it is "
                    f"{value!r}: resume with the same options, or begin another run"
                )
    _check_rows(output, options)


def _check_rows(output: Path, options: RunOptions) -> None:
    """Refuses another number of rows per batch, over all processes, than the run has."""
    own, processes = options.training.batch_size, process_rank()[1]
    for checkpoint in list_checkpoints(output / "checkpoints"):
        try:
            before = load_state(checkpoint, "data")["settings"]["rows_per_batch"]
        except (CheckpointError, OSError, ValueError, LookupError, TypeError):
            continue  # a damaged one, which is dealt with when it is verified
        if before != own * processes:
            raise ConfigurationError(
                f"{output}: the run was begun with {before} rows per batch, and now {processes} "
                f"processes of training.batch_size {own} give {own * processes}: resume with a "
                f"product of {before}, or begin another run"
            )
        return


def _saved_options(output: Path) -> dict[str, Any] | None:
    """The options of the run that a folder holds, or None if it holds no run."""
    try:
        saved = yaml.safe_load((output / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    # A group that has a default came later than some runs.
    groups = [
        field.name
        for field in dataclasses.fields(RunOptions)
        if field.default_factory is dataclasses.MISSING
    ]
    is_run = isinstance(saved, dict) and all(isinstance(saved.get(g), dict) for g in groups)
    return saved if is_run else None


_MAY_CHANGE = {("data", "workers"), ("data", "cache")} | {
    ("training", name)
    for name in (
        "device",
        "strict_kernels",
        "log_every",
        "evaluate_every",
        "save_every",
        "keep_checkpoints",
        "gradient_checkpointing",
        "compile",
        "sharding",
        "batch_size",  # of one process: `_check_rows` looks at the rows of all
        "on_nan",
        "target_perplexity",
        "tracking",
    )
}


def prepare_run_folder(
    output: Path, options: RunOptions, *, resume: bool, report: Callable[[str], None]
) -> Path | None:
    """Makes the run's folder and gives the checkpoint to resume from, if any.

    Args:
        output: The folder.
        options: What is written into it as ``config.yaml``.
        resume: Whether to go on with the run that it holds.
        report: Takes one line for every damaged checkpoint that is passed over.

    Raises:
        CheckpointError: There are checkpoints to resume from, and all of them are damaged.
    """
    checkpoints = output / "checkpoints"
    newest = latest_checkpoint(checkpoints, report) if resume else None
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
        if resume:
            _tidy(output, newest)
        else:
            _remove_run(output)
    write_file(output / CONFIG_FILE, as_yaml(options))  # first: it marks the folder as a run's
    checkpoints.mkdir(exist_ok=True)
    return newest


def _tidy(output: Path, newest: Path | None) -> None:
    """Ends what a killed process left half done, and removes what comes after a checkpoint."""
    for name in ("best", "last"):
        settle_folder(output / name)
    folder = output / "checkpoints"
    left = [*folder.glob("*.part"), *folder.glob("*.old")]
    # The damaged ones, which would count among those that are kept.
    for path in list_checkpoints(folder):
        if newest is None or checkpoint_step(path) > checkpoint_step(newest):
            left.append(path)
    for path in left:
        shutil.rmtree(path)


def as_yaml(options: RunOptions) -> str:
    """The options as the text of ``config.yaml``."""
    return yaml.safe_dump(dataclasses.asdict(options), sort_keys=False, allow_unicode=True)


def _remove_run(output: Path) -> None:
    """Removes what a run writes, and nothing else that lies in its folder."""
    for name in ("best", "last", "checkpoints", TENSORBOARD_FOLDER, WANDB_FOLDER):
        for folder in (output / name, output / f"{name}.part", output / f"{name}.old"):
            if folder.exists():
                shutil.rmtree(folder)
    for name in (CONFIG_FILE, METRICS_FILE, SAMPLES_FILE):
        (output / name).unlink(missing_ok=True)
