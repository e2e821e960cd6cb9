"""What a person sees while a model trains."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from i3lm.evaluation import figures_line
from i3lm.files import append_line
from i3lm.inference import SamplingOptions, TextGenerator
from i3lm.processes import process_rank
from i3lm.training.checkpoints import read_records, write_records
from i3lm.training.metrics import StepTimer
from i3lm.training.parts import Parts


def report_to(console: Console) -> Callable[[str], None]:
    """Gives what prints a line as it is, however long it is."""
    return partial(console.print, highlight=False, markup=False, soft_wrap=True)


def show_parts(console: Console, parts: Parts) -> None:
    """Prints what is trained on what, and how."""
    training, rank = parts.options.training, parts.options.adapter.rank
    world = process_rank()[1]
    shared = f", {world} processes" if world > 1 else ""
    if shared and training.sharding == "full":
        shared += " with a shard each"
    lines = [
        f"{parts.name}: {parts.parameters:,} parameters, vocabulary {len(parts.tokenizer):,}, "
        f"context {parts.rows.context_length}, {parts.precision} on {parts.device}{shared}"
    ]
    if parts.base is not None:
        trained = sum(p.numel() for p in parts.model.parameters() if p.requires_grad)
        lines.append(f"adapter: {trained:,} trained parameters of rank {rank}")
    lines.append(
        f"{training.optimizer}, learning rate {training.learning_rate:g}, "
        f"{training.warmup_steps} steps of warm-up"
    )
    lines += [f"kernel: {op} runs as {name} ({why})" for op, name, why in parts.kernels]
    lines += parts.text.summary
    console.print("\n".join(lines), highlight=False, markup=False)


class RunConsole(TrainerCallback):
    """A progress bar with loss, tokens per second and time left; plain lines off a terminal.

    Args:
        console: Where to write.
        timer: Where tokens per second come from.
    """

    def __init__(self, console: Console, timer: StepTimer) -> None:
        self.console, self.timer = console, timer
        self.bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[speed]} tokens/s"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            disable=not console.is_terminal,
        )
        self.loss = float("nan")

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Shows the bar, from the step at which the training begins."""
        for task in self.bar.task_ids:
            self.bar.remove_task(task)
        self.task = self.bar.add_task(
            "training", total=state.max_steps, completed=state.global_step, loss="-", speed="-"
        )
        self.bar.start()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Moves the bar."""
        self.bar.update(
            self.task,
            completed=state.global_step,
            loss="-" if self.loss != self.loss else f"{self.loss:.3f}",
            speed=f"{self.timer.tokens_per_second:,.0f}",
        )

    def on_log(self, args, state, control, logs: dict[str, Any] | None = None, **kwargs) -> None:
        """Takes the newest loss; off a terminal, prints it now and then."""
        logs = logs or {}
        self.loss = logs.get("loss", self.loss)
        if "loss" in logs and not self.console.is_terminal:
            every = max(args.logging_steps, -(-state.max_steps // 20))
            if state.global_step % every < args.logging_steps:
                left = (state.max_steps - state.global_step) * self.timer.step_seconds
                self.console.print(
                    f"step {state.global_step:>6}/{state.max_steps}  loss {self.loss:.3f}  "
                    f"{self.timer.tokens_per_second:,.0f} tokens/s  {_clock(left)} left",
                    highlight=False,
                )

    def on_evaluate(self, args, state, control, metrics=None, **kwargs) -> None:
        """Prints the held-out figures."""
        if metrics:
            figures = {key.removeprefix("eval_"): value for key, value in metrics.items()}
            self.console.print(
                f"step {state.global_step:>6}  held out: {figures_line(figures)}", highlight=False
            )

    def close(self) -> None:
        """Stops the bar and gives the cursor back, also after an error or an interrupt."""
        self.bar.stop()


class TokenizingBar:
    """A progress bar for each source that is tokenized, gone when it is done; none off a terminal.

    Args:
        console: Where to write.
    """

    def __init__(self, console: Console) -> None:
        self.console = console

    @contextmanager
    def __call__(self, name: str) -> Iterator[Callable[[int, int | None], None]]:
        """Gives what to tell how much of the source is done, and of how much."""
        columns = (TextColumn("tokenizing {task.description}"), BarColumn(), TimeRemainingColumn())
        bar = Progress(
            *columns, console=self.console, transient=True, disable=not self.console.is_terminal
        )
        with bar:
            task = bar.add_task(name, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


class SampleWriter(TrainerCallback):
    """Continues a prompt every so many steps, on the console and in a JSON lines file.

    Where several processes share a model, each of them takes part, and the first one writes.

    Args:
        console: Where to print.
        path: The file.
        generator: The model in training and its tokenizer.
        prompt: The text to continue.
        options: How to draw.
        every: Steps between samples; 0 means never.
    """

    def __init__(
        self,
        console: Console,
        path: Path,
        generator: TextGenerator,
        prompt: str,
        options: SamplingOptions,
        every: int,
    ) -> None:
        self.console, self.path, self.generator = console, path, generator
        self.prompt, self.options, self.every = prompt, options, every

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Drops samples of steps after the one at which the training begins."""
        if self.path.exists() and state.is_world_process_zero:
            write_records(self.path, read_records(self.path, state.global_step))

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Writes a sample where one is due."""
        if not self.every or state.global_step % self.every:
            return
        completion = self.generator.complete(self.prompt, self.options)
        record = {"step": state.global_step, "prompt": self.prompt, "text": completion.text}
        if state.is_world_process_zero:
            append_line(self.path, json.dumps(record, ensure_ascii=False))
        text = " ".join((self.prompt + completion.text).split())
        self.console.print(
            f"step {state.global_step:>6}  sample: {text}", highlight=False, markup=False
        )
