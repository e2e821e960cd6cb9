"""One training run, from options to a folder with a model in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import TrainerCallback, TrainingArguments, default_data_collator

from i3lm.data.tokens import ContiguousRows
from i3lm.device import resolve_device, resolve_precision, seed_everything
from i3lm.errors import ConfigurationError
from i3lm.inference import SamplingOptions, TextGenerator
from i3lm.models.model_card import write_model_card
from i3lm.training.build import (
    choose_kernels,
    make_model,
    make_texts,
    make_tokenizer,
    resolve_start,
)
from i3lm.training.checkpoints import (
    METRICS_FILE,
    SAMPLES_FILE,
    as_output_error,
    write_folder,
)
from i3lm.training.console import RunConsole, SampleWriter
from i3lm.training.metrics import MetricsFile, StepTimer
from i3lm.training.options import RunOptions, TrainingOptions
from i3lm.training.run_folder import check_run_folder, checkpoint_step, prepare_run_folder
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

    Args:
        output: The folder.
        options: What to train on what, and how.
        console: Where progress goes.
        resume: Go on from the folder's newest checkpoint.
        overwrite: Replace a run that is already there.

    Raises:
        I3Error: Anything that the options, the data or the folder cannot give.
    """
    check_run_folder(output, options, resume=resume, overwrite=overwrite)
    training = options.training
    device = resolve_device(training.device)
    precision = resolve_precision(training.precision, device)
    draws = SamplingOptions(
        max_new_tokens=options.sample.max_new_tokens,
        temperature=options.sample.temperature,
        top_k=options.sample.top_k,
        seed=training.seed,
    )

    start = resolve_start(options.model)
    tokenizer = make_tokenizer(options.tokenizer, start, options.data)
    texts = make_texts(options.data, tokenizer)
    model = make_model(start, tokenizer, seed=training.seed)
    context = _context_length(training, model.config.max_position_embeddings)
    rows = ContiguousRows(texts.training, context)
    generator = TextGenerator(model, tokenizer, precision)
    for prompt in options.sample.prompts:
        generator.encode_prompt(prompt)
    kernels = choose_kernels(model, device, strict=training.strict_kernels)
    parameters = sum(p.numel() for p in model.parameters())
    console.print(
        f"{start.preset.name}: {parameters:,} parameters, vocabulary {len(tokenizer):,}, "
        f"context {context}, {precision} on {device}\n"
        + "".join(f"kernel: {op} runs as {name} ({why})\n" for op, name, why in kernels)
        + f"{options.data.source}: {len(texts.training.tokens):,} training tokens in "
        f"{texts.training.documents:,} documents, {len(texts.held_out.tokens):,} held out in "
        f"{texts.held_out.documents:,}",
        highlight=False,
        markup=False,
    )

    checkpoint = prepare_run_folder(output, options, resume=resume)
    step = checkpoint_step(checkpoint) if checkpoint else 0
    batch = min(training.batch_size, len(rows)) * training.gradient_accumulation_steps
    timer = StepTimer(batch * context)
    progress = RunConsole(console, timer)

    def save(folder: Path, facts: dict[str, str]) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_model_card(folder, model.config, parameters, facts)

    callbacks = [
        MetricsFile(output / METRICS_FILE, timer, resume_step=step),
        BestKeeper(output / "best", save),
        progress,
    ]
    if options.sample.prompts:
        callbacks.append(
            SampleWriter(
                console,
                output / SAMPLES_FILE,
                generator,
                options.sample.prompts[0],
                draws,
                options.sample.every,
                resume_step=step,
            )
        )
    seed_everything(training.seed)
    trainer = I3Trainer(
        model=model,
        args=_training_arguments(
            output, training, precision, device.type, len(rows), resumed=checkpoint is not None
        ),
        train_dataset=rows,
        held_out=texts.held_out,
        context_length=context,
        data_collator=default_data_collator,
        callbacks=callbacks,
    )
    _silence_stock_console(trainer)
    if checkpoint is not None:
        console.print(f"resuming from {checkpoint}", highlight=False, markup=False, soft_wrap=True)
    try:
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            progress.close()
        steps = trainer.state.global_step
        history = [record for record in trainer.state.log_history if "eval_loss" in record]
        before, after = history[0], history[-1]  # the Trainer evaluates after the last step
        write_folder(output / "last", lambda part: save(part, _facts(after, steps)))
        samples = [
            {"prompt": prompt, "text": generator.complete(prompt, draws).text}
            for prompt in options.sample.prompts
        ]
    except Exception as error:
        raise as_output_error(output, error) or error from error
    keys = ("eval_loss", "eval_perplexity", "eval_bits_per_byte")
    return RunResult(
        output=output,
        parameters=parameters,
        steps=steps,
        tokens=int(trainer.state.num_input_tokens_seen),
        before={key.removeprefix("eval_"): before[key] for key in keys},
        after={key.removeprefix("eval_"): after[key] for key in keys},
        samples=samples,
    )


class BestKeeper(TrainerCallback):
    """Keeps the model with the lowest held-out loss in a folder of its own."""

    def __init__(self, folder: Path, save: Any) -> None:
        self.folder, self.save = folder, save
        self.best = float("inf")

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Takes the best so far from the record of a resumed run."""
        losses = [r["eval_loss"] for r in state.log_history if "eval_loss" in r and r["step"]]
        self.best = min(losses, default=self.best)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs) -> None:
        """Saves the model if it is the best yet, the untrained one left out."""
        if state.global_step and metrics and metrics["eval_loss"] < self.best:
            self.best = metrics["eval_loss"]
            facts = _facts(metrics, state.global_step)
            write_folder(self.folder, lambda part: self.save(part, facts))


def _facts(metrics: dict[str, float], steps: int) -> dict[str, str]:
    return {
        "Training steps": f"{steps:,}",
        "Held-out loss": f"{metrics['eval_loss']:.4f} nats per token",
        "Held-out bits per byte": f"{metrics['eval_bits_per_byte']:.4f}",
    }


def _context_length(training: TrainingOptions, limit: int) -> int:
    context = training.context_length or limit
    if context > limit:
        raise ConfigurationError(
            f"training.context_length ({context}) is more than the model's "
            f"max_position_embeddings ({limit}): lower the one or raise the other"
        )
    return context


def _training_arguments(
    output: Path,
    training: TrainingOptions,
    precision: str,
    device: str,
    rows: int,
    *,
    resumed: bool,
) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(output / "checkpoints"),
        max_steps=training.max_steps or -1,
        num_train_epochs=training.epochs or 1.0,
        per_device_train_batch_size=training.batch_size,
        per_device_eval_batch_size=training.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        learning_rate=training.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": training.min_learning_rate_ratio},
        warmup_steps=training.warmup_steps,
        weight_decay=training.weight_decay,
        adam_beta1=training.adam_beta1,
        adam_beta2=training.adam_beta2,
        max_grad_norm=training.max_grad_norm,
        bf16=precision == "bf16",
        use_cpu=device == "cpu",
        seed=training.seed,
        data_seed=training.seed,
        dataloader_drop_last=rows >= training.batch_size,
        dataloader_pin_memory=device == "cuda",
        logging_steps=training.log_every,
        logging_first_step=True,
        eval_strategy="steps",
        eval_steps=training.evaluate_every,
        eval_on_start=not resumed,
        # It would put an old loss in the place of one that is not a number.
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="all",
        save_strategy="steps",
        save_steps=training.save_every,
        save_total_limit=training.keep_checkpoints,
        report_to="none",
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
    )


def _silence_stock_console(trainer: I3Trainer) -> None:
    """Removes transformers' own printing of every log line; ours shows them."""
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
