"""One training run, from options to a folder with a model in it."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback

from i3lm.device import keep_freed_memory, seed_everything
from i3lm.processes import from_first, is_first, naming_lost_processes, process_rank
from i3lm.training.arguments import training_arguments
from i3lm.training.build import resolve_start
from i3lm.training.checkpoints import METRICS_FILE, SAMPLES_FILE
from i3lm.training.console import (
    RunConsole,
    SampleWriter,
    TokenizingBar,
    report_to,
    show_parts,
)
from i3lm.training.guards import SpectralRadiusWatch
from i3lm.training.keeping import BestKeeper, ModelWriter, held_out_figures
from i3lm.training.loop import train_guarded
from i3lm.training.metrics import MetricsFile, StepTimer, most_memory_bytes, utilization_per_token
from i3lm.training.options import RunOptions
from i3lm.training.parts import Parts, complete_options, prepare_parts
from i3lm.training.run_folder import as_yaml, check_run_folder, prepare_run_folder
from i3lm.training.stopping import TargetPerplexity
from i3lm.training.tracking import Tracker, check_tracking
from i3lm.training.trainer import I3Trainer


@dataclass(frozen=True)
class RunResult:
    """What a run ends with: its folder, and held-out figures before and after."""

    output: Path
    parameters: int
    steps: int
    tokens: int
    before: dict[str, float]
    after: dict[str, float]
    samples: list[dict[str, str]]
    target_reached: bool | None = None  # None without a target perplexity


@naming_lost_processes()
def run_training(
    output: Path,
    options: RunOptions,
    *,
    console: Console,
    resume: bool = False,
    overwrite: bool = False,
) -> RunResult:
    """Trains a model and leaves it, its figures and its settings in a folder.

    The folder gets ``best/`` and ``last/`` (models with tokenizer and card), ``checkpoints/``
    (to resume from), ``metrics.jsonl``, ``samples.jsonl`` and ``config.yaml``. Nothing is
    written before text, tokenizer and model are ready.

    Where a launcher started several processes, each of them calls this: they train together, the
    first one writes, and all must see the folder.

    Args:
        output: The folder.
        options: What to train on what, and how.
        console: Where progress goes.
        resume: Go on from the folder's newest checkpoint.
        overwrite: Replace a run that is already there.

    Raises:
        I3Error: Anything that the options, the data or the folder cannot give.
    """
    if not is_first():
        console = Console(quiet=True)
    report = report_to(console)
    start = resolve_start(options.model)
    options = complete_options(options, start)
    check_tracking(options.training.tracking)
    if is_first():
        check_run_folder(output, options, resume=resume, overwrite=overwrite)
    parts = prepare_parts(start, options, TokenizingBar(console))
    show_parts(console, parts)
    checkpoint = from_first(
        lambda: prepare_run_folder(output, options, resume=resume, report=report)
    )
    timer = StepTimer(parts.tokens_per_step)
    progress = RunConsole(console, timer)
    trainer, writer = _make_trainer(parts, output, checkpoint, timer, progress)
    if checkpoint is not None:
        report(f"resuming from {checkpoint}")
    with closing(progress):
        train_guarded(
            trainer,
            checkpoint,
            restore=options.training.on_nan == "restore",
            metrics=output / METRICS_FILE,
            report=report,
        )
    for line in parts.text.skipped():
        report(line)
    return _finish(parts, output, trainer, writer)


def _make_trainer(
    parts: Parts, output: Path, checkpoint: Path | None, timer: StepTimer, progress: RunConsole
) -> tuple[I3Trainer, ModelWriter]:
    """The trainer with its callbacks, and what writes the model that it trains."""
    training = parts.options.training
    arguments = training_arguments(
        output,
        training,
        parts.precision,
        parts.device,
        max_steps=parts.max_steps,
        resumed=checkpoint is not None,
    )
    writer = ModelWriter(
        parts.model,
        parts.tokenizer,
        base=parts.base,
        parameters=parts.parameters,
        target=training.target_perplexity,
        sharded=arguments.sharded,
    )
    callbacks = _make_callbacks(parts, output, timer, progress, writer)
    seed_everything(training.seed)
    if parts.device.type == "cpu":
        keep_freed_memory()
    trainer = I3Trainer(
        model=parts.model,
        args=arguments,
        rows=parts.rows,
        held_out=parts.text.held_out,
        precision=parts.precision,
        timer=timer,
        callbacks=callbacks,
        configuration=as_yaml(parts.options),
    )
    trainer.remove_callback(PrinterCallback)  # it prints every log line; ours shows them
    if not is_first():
        # The Trainer has seeded all processes alike; dropout is to differ from row to row.
        seed_everything(training.seed + process_rank()[0])
    return trainer, writer


def _make_callbacks(
    parts: Parts, output: Path, timer: StepTimer, progress: RunConsole, writer: ModelWriter
) -> list[TrainerCallback]:
    """What happens beside the steps, in this order: a tracker sees the figures of the file."""
    training, sample, console = parts.options.training, parts.options.sample, progress.console
    figures = MetricsFile(
        output / METRICS_FILE,
        timer,
        memory=lambda: most_memory_bytes(parts.device),
        utilization=utilization_per_token(
            parts.model, parts.rows.context_length, parts.device, parts.precision
        ),
    )
    callbacks: list[TrainerCallback] = [
        SpectralRadiusWatch(report_to(console)),
        figures,
        BestKeeper(output / "best", writer),
        progress,
    ]
    if training.tracking != "none" and is_first():
        callbacks.append(Tracker(training.tracking, output, figures))
    if training.target_perplexity is not None:
        callbacks.append(TargetPerplexity(training.target_perplexity, console))
    if sample.prompts:
        samples, prompt = output / SAMPLES_FILE, sample.prompts[0]
        callbacks.append(
            SampleWriter(console, samples, parts.generator, prompt, parts.draws, sample.every)
        )
    return callbacks


def _finish(parts: Parts, output: Path, trainer: I3Trainer, writer: ModelWriter) -> RunResult:
    """Keeps the model as it is at the end, and draws up what the run came to."""
    target, steps = parts.options.training.target_perplexity, trainer.state.global_step
    history = [record for record in trainer.state.log_history if "eval_loss" in record]
    before, after = history[0], history[-1]  # the Trainer evaluates after the last step
    writer.write(output / "last", after, steps)
    return RunResult(
        output=output,
        parameters=parts.parameters,
        steps=steps,
        tokens=int(trainer.state.num_input_tokens_seen),
        before=held_out_figures(before),
        after=held_out_figures(after),
        samples=[
            {"prompt": prompt, "text": parts.generator.complete(prompt, parts.draws).text}
            for prompt in parts.options.sample.prompts
        ],
        target_reached=None if target is None else after["eval_perplexity"] <= target,
    )
