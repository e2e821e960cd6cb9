"""One training run, from options to a folder with a model in it."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel, TrainerCallback

from i3lm.data.rows import RowBatches
from i3lm.data.streams import Documents
from i3lm.device import (
    keep_freed_memory,
    peak_memory_bytes,
    resolve_device,
    resolve_precision,
    seed_everything,
)
from i3lm.errors import CheckpointError, ConfigurationError, GenerationError
from i3lm.files import write_folder
from i3lm.inference import SamplingOptions, TextGenerator
from i3lm.inference.adapters import Base, write_adapter
from i3lm.inference.loading import check_room, choose_context_length
from i3lm.inference.sessions import model_fingerprint
from i3lm.models.flops import training_flops_per_token
from i3lm.models.i3 import I3ForCausalLM
from i3lm.models.model_card import write_model_card
from i3lm.ops.speed import measure_matmul_flops
from i3lm.processes import (
    first_goes_first,
    from_all,
    from_first,
    is_first,
    join_processes,
    naming_lost_processes,
    process_rank,
)
from i3lm.training.adapters import add_adapter
from i3lm.training.arguments import training_arguments
from i3lm.training.build import (
    Starting,
    choose_kernels,
    make_model,
    make_tokenizer,
    resolve_start,
)
from i3lm.training.checkpoints import EVALUATION_FILE, METRICS_FILE, SAMPLES_FILE
from i3lm.training.console import RunConsole, SampleWriter, TokenizingBar
from i3lm.training.data import open_training_text
from i3lm.training.gradient_checkpointing import checkpoint_gradients
from i3lm.training.guards import SpectralRadiusWatch
from i3lm.training.loop import train_guarded
from i3lm.training.metrics import MetricsFile, StepTimer
from i3lm.training.options import RunOptions, TrainingOptions, resolve_defaults
from i3lm.training.run_folder import as_yaml, check_run_folder, prepare_run_folder
from i3lm.training.sharding import whole_weights
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
    start = resolve_start(options.model)
    options = _complete(options, start)
    training, adapter = options.training, options.adapter
    check_tracking(training.tracking)
    if is_first():
        check_run_folder(output, options, resume=resume, overwrite=overwrite)
    device = join_processes(resolve_device(training.device))
    precision = _trainable_precision(training.precision, device)
    _check_sharding(options, precision)
    draws = _draws(options)

    with first_goes_first():
        tokenizer = make_tokenizer(options.tokenizer, start, options.data)
        text = open_training_text(
            options.data, tokenizer, seed=training.seed, progress=TokenizingBar(console)
        )
    model = make_model(start, tokenizer, seed=training.seed)
    context = choose_context_length(
        model, training.context_length, option="training.context_length"
    )
    rows = _rows(text.documents, options, context, model)
    max_steps = _count_steps(training, rows)
    generator = TextGenerator(model, tokenizer, precision)
    for prompt in options.sample.prompts:
        check_room(model, len(generator.encode_prompt(prompt)), options.sample.max_new_tokens)
    checkpoint_gradients(model, training.gradient_checkpointing)
    kernels = choose_kernels(model, device, strict=training.strict_kernels)
    parameters = sum(p.numel() for p in model.parameters())
    base: Base | None = None
    if adapter.rank:
        assert start.checkpoint is not None  # `_complete` has seen to it
        base = Base(start.checkpoint.resolve(), model_fingerprint(model))
        seed_everything(training.seed)
        add_adapter(model, adapter)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    console.print(
        f"{start.preset.name}: {parameters:,} parameters, vocabulary {len(tokenizer):,}, "
        f"context {context}, {precision} on {device}{_shared_by(training)}\n"
        + (f"adapter: {trained:,} trained parameters of rank {adapter.rank}\n" if base else "")
        + f"{training.optimizer}, learning rate {training.learning_rate:g}, "
        f"{training.warmup_steps} steps of warm-up\n"
        + "".join(f"kernel: {op} runs as {name} ({why})\n" for op, name, why in kernels)
        + "\n".join(text.summary),
        highlight=False,
        markup=False,
    )

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    checkpoint = from_first(lambda: prepare_run_folder(output, options, resume=resume, report=say))
    rows_per_step = training.batch_size * training.gradient_accumulation_steps * rows.world
    timer = StepTimer(rows_per_step * context)
    progress = RunConsole(console, timer)
    target = training.target_perplexity

    def save(folder: Path, metrics: dict[str, float], steps: int) -> None:
        weights = whole_weights(model) if trainer.is_sharded else None
        if not is_first():
            return

        def write(part: Path) -> None:
            if base is None:
                model.save_pretrained(part, state_dict=weights)
            else:
                write_adapter(part, model, base)
            tokenizer.save_pretrained(part)
            write_model_card(part, model.config, parameters, _facts(metrics, steps))
            record: dict[str, Any] = {"step": steps, **_figures(metrics)}
            if target is not None:
                record["target_perplexity"] = target
                record["target_reached"] = record["perplexity"] <= target
            (part / EVALUATION_FILE).write_text(json.dumps(record) + "\n", encoding="utf-8")

        write_folder(folder, write)

    figures = MetricsFile(
        output / METRICS_FILE,
        timer,
        memory=lambda: _most(from_all(peak_memory_bytes(device))),
        utilization=_utilization(model, context, device, precision),
    )
    callbacks: list[TrainerCallback] = [
        SpectralRadiusWatch(say),
        figures,
        BestKeeper(output / "best", save),
        progress,
    ]
    if training.tracking != "none" and is_first():
        callbacks.append(Tracker(training.tracking, output, figures))
    if target is not None:
        callbacks.append(TargetPerplexity(target, console))
    if options.sample.prompts:
        callbacks.append(
            SampleWriter(
                console,
                output / SAMPLES_FILE,
                generator,
                options.sample.prompts[0],
                draws,
                options.sample.every,
            )
        )
    seed_everything(training.seed)
    if device.type == "cpu":
        keep_freed_memory()
    trainer = I3Trainer(
        model=model,
        args=training_arguments(
            output,
            training,
            precision,
            device,
            max_steps=max_steps,
            resumed=checkpoint is not None,
        ),
        rows=rows,
        held_out=text.held_out,
        precision=precision,
        timer=timer,
        callbacks=callbacks,
        configuration=as_yaml(options),
    )
    _silence_stock_console(trainer)
    if not is_first():
        # The Trainer has seeded all processes alike; dropout is to differ from row to row.
        seed_everything(training.seed + process_rank()[0])
    if checkpoint is not None:
        say(f"resuming from {checkpoint}")
    try:
        train_guarded(
            trainer,
            checkpoint,
            restore=training.on_nan == "restore",
            metrics=output / METRICS_FILE,
            report=say,
        )
    finally:
        progress.close()
    for line in text.skipped():
        say(line)
    steps = trainer.state.global_step
    history = [record for record in trainer.state.log_history if "eval_loss" in record]
    before, after = history[0], history[-1]  # the Trainer evaluates after the last step
    save(output / "last", after, steps)
    samples = [
        {"prompt": prompt, "text": generator.complete(prompt, draws).text}
        for prompt in options.sample.prompts
    ]
    return RunResult(
        output=output,
        parameters=parameters,
        steps=steps,
        tokens=int(trainer.state.num_input_tokens_seen),
        before=_figures(before),
        after=_figures(after),
        samples=samples,
        target_reached=None if target is None else after["eval_perplexity"] <= target,
    )


def _rows(
    documents: Documents, options: RunOptions, context_length: int, model: PreTrainedModel
) -> RowBatches:
    kind = options.data.rows
    if kind == "stream" and not isinstance(model, I3ForCausalLM):
        raise ConfigurationError(
            f"data.rows (stream): a model of type {model.config.model_type} carries no state from "
            "row to row: use packed or contiguous"
        )
    rank, world = process_rank()
    return RowBatches(
        documents,
        kind,
        context_length=context_length,
        batch_size=options.training.batch_size,
        rank=rank,
        world=world,
    )


def _count_steps(training: TrainingOptions, rows: RowBatches) -> int:
    """Optimizer steps of the run; a last step that the rows do not fill is left out."""
    if training.max_steps is not None:
        return training.max_steps
    if rows.rows_per_epoch is None:
        raise ConfigurationError(
            "training.max_steps is missing: the length of a text that is read while training is "
            "not known; give the number of steps"
        )
    per_step = training.batch_size * rows.world * training.gradient_accumulation_steps
    return max(1, int((training.epochs or 1.0) * rows.rows_per_epoch / per_step))


def _trainable_precision(name: str, device: torch.device) -> str:
    precision = resolve_precision(name, device)
    if precision == "fp16" and device.type != "cuda":
        raise ConfigurationError(
            f"training.precision (fp16): its loss scaling needs a CUDA GPU, and the device is "
            f"{device}: use bf16, fp32 or auto"
        )
    return precision


def _utilization(
    model: PreTrainedModel, context_length: int, device: torch.device, precision: str
) -> float | None:
    """The share of what the devices can multiply that one token a second takes; None for peers."""
    if not isinstance(model, I3ForCausalLM):
        return None
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    needed = training_flops_per_token(model.config, context_length)
    return needed / (measure_matmul_flops(device, dtype) * process_rank()[1])


def _check_sharding(options: RunOptions, precision: str) -> None:
    """Refuses what is not known to be right on shards."""
    training = options.training
    if training.sharding == "none":
        return
    refused = {
        "training.optimizer (muon)": training.optimizer == "muon",  # it needs whole matrices
        f"adapter.rank ({options.adapter.rank})": options.adapter.rank > 0,
        f"training.precision ({precision})": precision == "fp16",
        "training.compile (true)": training.compile,
    }
    for name, given in refused.items():
        if given:
            raise ConfigurationError(
                f"{name} does not go with training.sharding {training.sharding}: leave one of "
                "them out"
            )


def _shared_by(training: TrainingOptions) -> str:
    world = process_rank()[1]
    if world == 1:
        return ""
    return f", {world} processes" + (" with a shard each" if training.sharding == "full" else "")


def _most(sizes: list[int | None]) -> int | None:
    """The largest of the sizes that are known."""
    return max((size for size in sizes if size is not None), default=None)


def _complete(options: RunOptions, start: Starting) -> RunOptions:
    """The options with everything decided that depends on where the run starts."""
    rank, fine_tuning = options.adapter.rank, start.checkpoint is not None
    if rank and not fine_tuning:
        raise ConfigurationError(
            f"adapter.rank ({rank}) adapts a checkpoint, and {start.preset.name} is drawn anew: "
            "give the folder of one as model.source, or leave it out"
        )
    training = resolve_defaults(options.training, fine_tuning=fine_tuning, adapter=rank > 0)
    return replace(options, training=training)


def _draws(options: RunOptions) -> SamplingOptions:
    """How samples are drawn."""
    sample = options.sample
    try:
        return SamplingOptions(
            max_new_tokens=sample.max_new_tokens,
            temperature=sample.temperature,
            top_k=sample.top_k,
            seed=options.training.seed,
        )
    except GenerationError as error:  # its message begins with the name of the field
        raise ConfigurationError(f"sample.{error}") from error


class BestKeeper(TrainerCallback):
    """Keeps the model with the lowest held-out loss in a folder of its own."""

    def __init__(self, folder: Path, save: Any) -> None:
        self.folder, self.save = folder, save
        self.best = float("inf")

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Takes the best so far of a resumed run.

        The model that is kept tells its own loss: it may be of a later step than the checkpoint,
        and a resumed run that evaluates at other steps would not meet that loss again.

        Raises:
            CheckpointError: The kept model's figures cannot be read.
        """
        figures = self.folder / EVALUATION_FILE
        if figures.exists():
            try:
                self.best = json.loads(figures.read_text(encoding="utf-8"))["loss"]
            except (OSError, ValueError, LookupError, TypeError) as error:
                raise CheckpointError(
                    f"{figures}: is damaged, so the best loss of the run is unknown; remove "
                    f"{self.folder} to keep the next best model"
                ) from error

    def on_evaluate(self, args, state, control, metrics=None, **kwargs) -> None:
        """Saves the model if it is the best yet, the untrained one left out."""
        if state.global_step and metrics and metrics["eval_loss"] < self.best:
            self.best = metrics["eval_loss"]
            self.save(self.folder, metrics, state.global_step)


def _figures(metrics: dict[str, float]) -> dict[str, float]:
    names = ("loss", "perplexity", "bits_per_byte")
    return {name: metrics[f"eval_{name}"] for name in names}


def _facts(metrics: dict[str, float], steps: int) -> dict[str, str]:
    return {
        "Training steps": f"{steps:,}",
        "Held-out loss": f"{metrics['eval_loss']:.4f} nats per token",
        "Held-out bits per byte": f"{metrics['eval_bits_per_byte']:.4f}",
    }


def _silence_stock_console(trainer: I3Trainer) -> None:
    """Removes transformers' own printing of every log line; ours shows them."""
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
