"""transformers' Trainer with what it lacks for these models."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from i3lm.data.tokens import TokenizedText
from i3lm.errors import CheckpointError
from i3lm.evaluation import Evaluation, evaluate_text, next_token_loss
from i3lm.files import writing
from i3lm.models.i3 import I3ForCausalLM
from i3lm.training.optimizers import make_optimizer


class I3Trainer(Trainer):
    """Trains on rows whose labels are one step ahead, and evaluates in bits per byte.

    Args:
        held_out: The text that evaluation uses.
        context_length: Tokens per row of the evaluation.
        args: transformers' training arguments.
        kwargs: Everything else that `Trainer` takes.
    """

    optimizer: Any
    control: Any

    def __init__(
        self,
        *,
        held_out: TokenizedText,
        context_length: int,
        args: TrainingArguments,
        **kwargs: Any,
    ) -> None:
        super().__init__(args=args, eval_dataset=held_out, **kwargs)
        self.held_out, self.context_length = held_out, context_length
        # Every row is full, so the mean over a batch is the mean over its tokens.
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Mean negative log-likelihood of the labels, in nats per token."""
        loss = next_token_loss(
            model,
            inputs["input_ids"],
            inputs["labels"],
            in_pieces=isinstance(self.model, I3ForCausalLM),
        )
        return (loss, {"loss": loss}) if return_outputs else loss

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer that the arguments name, over the model's own parameter groups."""
        if self.optimizer is None:
            self.optimizer = make_optimizer(
                getattr(self.args, "optimizer", "adamw"),
                model or self.model,
                learning_rate=self.args.learning_rate,
                weight_decay=self.args.weight_decay,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                eps=self.args.adam_epsilon,
                fused=self.args.device.type in ("cpu", "cuda"),
            )
        return self.optimizer

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Scores the held-out text; the figures go to the log as ``eval_...``."""
        evaluation: Evaluation = evaluate_text(
            self.model,
            self.held_out,
            context_length=self.context_length,
            batch_size=self.args.per_device_eval_batch_size,
            precision="bf16" if self.args.bf16 else "fp32",
        )
        metrics = {
            "eval_loss": evaluation.loss,
            "eval_perplexity": evaluation.perplexity,
            "eval_bits_per_byte": evaluation.bits_per_byte,
        }
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> tuple[int, int]:
        position = super()._init_training_state(max_steps, *args, **kwargs)
        # A resumed state brings its old intervals; those of the arguments count.
        self.state.compute_steps(self.args, max_steps)
        return position

    def _run_epoch(self, **kwargs: Any) -> None:
        # A resumed run that was at its end already would take one step more.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(**kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Saves what a resumed run needs; what could not be finished is removed."""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            with writing(folder):
                super()._save_checkpoint(*args, **kwargs)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with _readable(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _readable(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _readable(checkpoint):
            super()._load_rng_state(checkpoint)


@contextmanager
def _readable(checkpoint: str | None) -> Iterator[None]:
    """Turns whatever goes wrong while a checkpoint is read into a CheckpointError."""
    try:
        yield
    except Exception as error:  # safetensors, torch, pickle and zip each raise their own
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"{checkpoint}: the checkpoint cannot be resumed from; it is damaged or of another "
            f"model ({reason[0][:200].rstrip('.')}); remove this folder to resume from the one "
            "before it"
        ) from error
