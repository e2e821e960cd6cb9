"""The figures of a run: perplexities over time, and the file they are kept in."""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from i3lm.device import peak_memory_bytes
from i3lm.errors import ConfigurationError
from i3lm.files import append_line
from i3lm.models.flops import training_flops_per_token
from i3lm.models.i3 import I3ForCausalLM
from i3lm.ops.speed import measure_matmul_flops
from i3lm.processes import from_all, process_rank
from i3lm.training.checkpoints import read_records, write_records


class PerplexityTracker:
    """Training perplexity in the four ways that the original reports.

    Args:
        window: How many recent losses the windowed figure averages.
        smoothing: Weight of the newest loss in the smoothed figure.
    """

    def __init__(self, window: int = 20, smoothing: float = 0.1) -> None:
        self.losses: deque[float] = deque(maxlen=window)
        self.smoothing = smoothing
        self.smoothed: float | None = None
        self.best = math.inf

    def update(self, loss: float) -> dict[str, float]:
        """Takes in a loss (nats per token) and gives the figures by name."""
        self.losses.append(loss)
        if self.smoothed is None:
            self.smoothed = loss
        self.smoothed += self.smoothing * (loss - self.smoothed)
        self.best = min(self.best, loss)
        return {
            "loss_smoothed": self.smoothed,
            "perplexity_current": _exp(loss),
            "perplexity_smoothed": _exp(self.smoothed),
            "perplexity_windowed": _exp(sum(self.losses) / len(self.losses)),
            "perplexity_best": _exp(self.best),
        }


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


class StepTimer:
    """Time per optimizer step over a recent window, evaluation and saving left out.

    A step begins with its first batch at hand; waiting for data is counted beside it.
    """

    def __init__(self, tokens_per_step: int, window: int = 20) -> None:
        self.tokens_per_step = tokens_per_step
        self._ends: deque[float] = deque(maxlen=window)
        self._waits: deque[float] = deque(maxlen=window)
        self._begin = 0.0

    def waited(self, seconds: float) -> None:
        """Notes for how long a step waited for its batches."""
        self._waits.append(seconds)

    def begin(self) -> None:
        """Notes that a step begins."""
        self._begin = time.perf_counter()

    def end(self) -> None:
        """Notes that the step has ended."""
        self._ends.append(time.perf_counter() - self._begin)

    @property
    def step_seconds(self) -> float:
        """Mean seconds per step over the window."""
        return sum(self._ends) / len(self._ends) if self._ends else math.nan

    @property
    def tokens_per_second(self) -> float:
        """Training tokens per second over the window."""
        return self.tokens_per_step / self.step_seconds if self._ends else math.nan

    @property
    def data_wait_fraction(self) -> float:
        """Share of the time, of waiting and steps together, that went into waiting for data."""
        waited = sum(self._waits)
        return waited / (waited + sum(self._ends)) if self._ends else math.nan


def most_memory_bytes(device: torch.device) -> int | None:
    """The most memory that any process has used so far, None where none knows; for all together.

    Args:
        device: The device of this process.
    """
    sizes = from_all(peak_memory_bytes(device))
    return max((size for size in sizes if size is not None), default=None)


def utilization_per_token(
    model: PreTrainedModel, context_length: int, device: torch.device, precision: str
) -> float | None:
    """The share of what the devices can multiply that one token a second takes; None for peers.

    Args:
        model: The model.
        context_length: Tokens T per row.
        device: The device of each process; what it can multiply is measured.
        precision: ``fp32``, ``bf16`` or ``fp16``.
    """
    if not isinstance(model, I3ForCausalLM):
        return None
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    needed = training_flops_per_token(model.config, context_length)
    return needed / (measure_matmul_flops(device, dtype) * process_rank()[1])


class MetricsFile(TrainerCallback):
    """Keeps every logged figure as one JSON object a line.

    A resumed run first drops the lines after the checkpoint it resumes from, so that a step
    never stands there twice. The callbacks after this one see its figures in the log as well.

    Args:
        path: The file.
        timer: Where times come from.
        memory: Gives the most memory used so far, in bytes, or None where that is not known.
        utilization: Model FLOPs utilisation per token a second: what a token costs over what
            the device can do; None where either is not known.
    """

    def __init__(
        self,
        path: Path,
        timer: StepTimer,
        memory: Callable[[], int | None] = lambda: None,
        utilization: float | None = None,
    ) -> None:
        self.path, self.timer, self.memory, self.utilization = path, timer, memory, utilization
        self.tracker = PerplexityTracker()
        self.newest: dict[str, Any] | None = None  # the figures of the last log, if it had any

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Goes back to the step at which the training begins."""
        self.tracker = PerplexityTracker()
        records = read_records(self.path, state.global_step) if state.global_step else []
        records = [record for record in records if _is_known(record, state)]
        for record in records:
            if "loss" in record:
                self.tracker.update(record["loss"])
        if state.is_world_process_zero:
            write_records(self.path, records)

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        """Starts the clock."""
        self.timer.begin()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Stops the clock."""
        self.timer.end()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Writes one line.

        Raises:
            ConfigurationError: The loss is no longer a number.
            OutputError: The file cannot be written.
        """
        logs, self.newest = {} if logs is None else logs, None
        # Its own counts and times are of this process alone, evaluation and saving included.
        for name in ("num_input_tokens_seen", "train_runtime", "train_tokens_per_second"):
            logs.pop(name, None)
        if "loss" in logs:
            if not math.isfinite(logs["loss"]):
                raise ConfigurationError(
                    f"the loss is {logs['loss']} at step {state.global_step}: the run has "
                    f"diverged; begin another with a training.learning_rate below "
                    f"{args.learning_rate:g}"
                )
            logs |= self.tracker.update(logs["loss"])
            logs |= self._speed(state)
        elif "eval_loss" not in logs:
            return  # the Trainer's own closing summary
        self.newest = logs
        if state.is_world_process_zero:
            append_line(self.path, json.dumps({"step": state.global_step, **_plain(logs)}))

    def _speed(self, state: TrainerState) -> dict[str, Any]:
        """How fast it goes, and what it takes."""
        timer = self.timer
        figures: dict[str, Any] = {
            "tokens": int(state.num_input_tokens_seen),
            "tokens_per_second": round(timer.tokens_per_second, 1),
            "step_seconds": round(timer.step_seconds, 5),
            "data_wait_fraction": round(timer.data_wait_fraction, 4),
        }
        if (memory := self.memory()) is not None:
            figures["memory_bytes"] = memory
        if self.utilization is not None:
            figures["mfu"] = round(timer.tokens_per_second * self.utilization, 4)
        return figures


def _is_known(record: dict[str, Any], state: TrainerState) -> bool:
    """Whether a line is older than the checkpoint: some steps are logged after they are saved."""
    if record["step"] < state.global_step:
        return True
    kinds = {"loss", "eval_loss"} & record.keys()
    return not kinds or any(
        line["step"] == record["step"] and kinds <= line.keys() for line in state.log_history
    )


def _plain(logs: dict[str, Any]) -> dict[str, Any]:
    """The figures as JSON knows them: null for what is not finite."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in logs.items()
    }
