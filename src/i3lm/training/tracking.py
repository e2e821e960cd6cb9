"""Experiment trackers beside the metrics file: TensorBoard, trackio, Weights & Biases."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from i3lm.errors import ConfigurationError
from i3lm.training.metrics import MetricsFile

TENSORBOARD_FOLDER, WANDB_FOLDER = "tensorboard", "wandb"  # in the folder of a run
_WITHOUT_KEY = ("offline", "dryrun", "disabled")


def check_tracking(name: str) -> None:
    """Raises a ConfigurationError where a tracker cannot work; before anything is trained."""
    if name == "none":
        return
    if not _is_installed(name):
        raise ConfigurationError(
            f"training.tracking ({name}) needs a package that is not installed: pip install "
            f"'i3lm[track]' (or: pip install {name})"
        )
    needs_key = name == "wandb" and os.environ.get("WANDB_MODE") not in _WITHOUT_KEY
    if needs_key and not os.environ.get("WANDB_API_KEY"):
        raise ConfigurationError(
            "training.tracking (wandb) needs a key: set WANDB_API_KEY in the environment, or "
            "WANDB_MODE=offline to keep the run on this machine"
        )


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def run_names(output: Path) -> tuple[str, str]:
    """The project and the name of a run, after the folders that it lies in."""
    folder = output.resolve()
    return folder.parent.name or "i3lm", folder.name


class Tracker(TrainerCallback):
    """Hands to one of transformers' trackers what the metrics file gets, under the same names.

    It stands after the metrics file among the callbacks. Keys and places of the services come
    from their own environment variables; what they print goes to standard error.

    Args:
        name: ``tensorboard``, ``trackio`` or ``wandb``.
        output: The folder of the run.
        metrics: The metrics file.
    """

    def __init__(self, name: str, output: Path, metrics: MetricsFile) -> None:
        self.metrics = metrics
        self.tracker: Any
        if name == "tensorboard":
            self.tracker = TensorBoardCallback()
            self.tracker.logging_dir = self.tracker.logging_dir or str(output / TENSORBOARD_FOLDER)
        elif name == "trackio":
            self.tracker = TrackioCallback()
        else:
            os.environ.setdefault("WANDB_PROJECT", run_names(output)[0])
            os.environ.setdefault("WANDB_DIR", str(output))
            with contextlib.redirect_stdout(sys.stderr):
                self.tracker = WandbCallback()

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        """Begins a run of the tracker."""
        # The configuration is all that they are to know of the model.
        described: Any = SimpleNamespace(config=model.config, num_parameters=model.num_parameters)
        with contextlib.redirect_stdout(sys.stderr):
            self.tracker.on_train_begin(args, state, control, model=described)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        """Hands on one line of the metrics file."""
        if self.metrics.newest is not None:
            self.tracker.on_log(args, state, control, logs=dict(self.metrics.newest))

    def on_train_end(self, args, state, control, model=None, **kwargs) -> None:
        """Ends the run of the tracker."""
        with contextlib.redirect_stdout(sys.stderr):
            self.tracker.on_train_end(args, state, control, model=model)
            if isinstance(self.tracker, WandbCallback):
                self.tracker._wandb.finish()
