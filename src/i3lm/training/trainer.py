"""transformers' Trainer with what it lacks for these models."""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments

from i3lm.data.mixing import Mixture
from i3lm.data.rows import NOT_LEARNT, RowBatches
from i3lm.data.tokens import TokenizedText
from i3lm.errors import CheckpointError, DataError, I3Error
from i3lm.evaluation import Evaluation, evaluate_text, next_token_loss
from i3lm.files import writing
from i3lm.models.i3 import CarriedState, I3ForCausalLM
from i3lm.processes import from_all, process_rank
from i3lm.training.checkpoints import (
    CONFIG_FILE,
    Skippable,
    Stateful,
    load_state,
    publish_checkpoint,
    rotate_checkpoints,
    save_states,
)
from i3lm.training.guards import ALL_FINITE, NonFiniteError, find_non_finite
from i3lm.training.metrics import StepTimer
from i3lm.training.optimizers import OnePassAdamW, leave_gradients_small, make_optimizer
from i3lm.training.sharding import shard_model, shard_optimizer, whole_weights


class I3Trainer(Trainer):
    """Trains on rows whose labels are one step ahead, and evaluates in bits per byte.

    Args:
        rows: The batches to train on.
        held_out: The text that evaluation uses.
        precision: ``fp32``, ``bf16`` or ``fp16``, of the evaluation.
        timer: Takes the time for which the loop waits for data.
        args: transformers' training arguments.
        configuration: The options of the run as YAML, kept with every checkpoint.
        stateful: By name, what else a checkpoint keeps and a resumed run is given back.
        kwargs: Everything else that `Trainer` takes.

    Attributes:
        data_ended: Whether the sources ended before the last step.
    """

    optimizer: Any
    control: Any

    def __init__(
        self,
        *,
        rows: RowBatches,
        held_out: TokenizedText,
        precision: str,
        timer: StepTimer,
        args: TrainingArguments,
        configuration: str = "",
        stateful: Mapping[str, Stateful] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(args=args, train_dataset=rows, eval_dataset=held_out, **kwargs)
        self.rows, self.configuration = rows, configuration
        self.stateful: dict[str, Stateful] = {"progress": self, "data": rows, **(stateful or {})}
        self.carried_state: CarriedState | None = None
        if rows.rows == "stream":
            self.carried_state = CarriedState(self.model.config).to(args.device)
            self.stateful["carried_state"] = CarriedRows(self.carried_state, args.device)
        self._resumed: dict[str, Any] | None = None
        self._written: Path | None = None
        self._batches: list[dict[str, Tensor]] = []
        # Steps whose data were passed over, and the step whose data are the last of those.
        self.skipped_steps = 0
        self._skip_to: int | None = None
        self.data_ended, self._saved_step = False, 0
        self.held_out, self.precision, self.timer = held_out, precision, timer
        # The Trainer counts the labels of a step, over all its batches and processes. Ours are
        # one step ahead already.
        self.model_accepts_loss_kwargs, self._loss_shifts_labels = True, False
        self.is_sharded = getattr(args, "sharded", False)
        if self.is_sharded:
            shard_model(self.model, args.device)
            # To the Trainer: the model moves its own weights and gradients between processes.
            self.is_distributed_loading_by_transformers = True

    def get_train_dataloader(self) -> Any:
        """The rows themselves: they are read here, each process its own."""
        return self.rows

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The batch's share of the step's mean negative log-likelihood, in nats per token.

        The shares of a step add up to its mean over all labels that count, however they are
        spread over batches; over processes, whose gradients are averaged, their mean does.
        """
        loss = next_token_loss(
            model,
            inputs["input_ids"],
            inputs["labels"],
            in_pieces=isinstance(self.model, I3ForCausalLM),
            reset=inputs.get("reset"),
            carried_state=self.carried_state,
        )
        if num_items_in_batch is not None:
            counted = (inputs["labels"] != NOT_LEARNT).sum()
            # No label of a step counts where it has nothing but prompts.
            every = torch.as_tensor(num_items_in_batch).clamp(min=1)
            loss = loss * counted / every * self.args.world_size
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
                state=getattr(self.args, "optimizer_state", "fp32"),
            )
            if self.is_sharded:
                shard_optimizer(self.optimizer)
            if self._sums_no_gradients():
                leave_gradients_small(self.model)
        return self.optimizer

    def _sums_no_gradients(self) -> bool:
        """Whether a step's gradients are those of one backward pass, and the optimizer's alone."""
        return (
            self._one_pass_optimizer() is not None
            and self.args.gradient_accumulation_steps == 1
            and self.args.world_size == 1
            and not self.args.torch_compile
        )

    def _one_pass_optimizer(self) -> OnePassAdamW | None:
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # in accelerate's wrapper
        usable = isinstance(optimizer, OnePassAdamW) and self.accelerator.scaler is None
        return optimizer if usable else None

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Scores the held-out text; the figures go to the log as ``eval_...``."""
        evaluation: Evaluation = evaluate_text(
            self.model,
            self.held_out,
            context_length=self.rows.context_length,
            batch_size=self.args.per_device_eval_batch_size,
            precision=self.precision,
            separate_documents=self.rows.rows != "contiguous",
            shared=self.args.world_size > 1,
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

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Collects the batches of a step, on the clock; a step that they do not fill is none."""
        began = time.perf_counter()
        batches, count = super().get_batch_samples(*args, **kwargs)
        if len(batches) < self.args.gradient_accumulation_steps:
            self.data_ended = self.control.should_training_stop = True
            return [], None
        self.timer.waited(time.perf_counter() - began)
        for batch in batches:
            del batch["cursor"]  # that of the last one is where `rows` stands
        return batches, count

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds how often the text was seen, and each source's share of it, to a line of the log."""
        self.state.epoch = self.rows.epochs
        if "loss" in logs and isinstance(documents := self.rows.documents, Mixture):
            logs |= {f"share/{name}": share for name, share in documents.shares().items()}
            logs |= {f"epochs/{name}": epochs for name, epochs in documents.epochs().items()}
        super().log(logs, start_time)

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """One forward and backward pass."""
        self._batches.append(inputs)
        loss = super().training_step(model, inputs, *args, **kwargs)
        if self.carried_state is not None:
            self.carried_state.advance()
        return loss

    def _defer_fsdp_gradient_reduction(self) -> AbstractContextManager[None]:
        """Sharded gradients are summed after every batch: kept whole, they would not fit."""
        return nullcontext()

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Clips the gradients, in the optimizer's own pass where it can; gives their norm."""
        optimizer = self._one_pass_optimizer()
        if optimizer is None:
            return super()._clip_grad_norm(model)
        return optimizer.clip_grad_norm(self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The norm of the gradients; a step whose norm is not finite is not taken.

        Reading it waits for the device, right after the Trainer itself did to count tokens.
        """
        if grad_norm is None and (optimizer := self._one_pass_optimizer()) is not None:
            grad_norm = optimizer.gradient_norm()
        grad_norm = super()._get_grad_norm(model, grad_norm)
        if isinstance(grad_norm, DTensor):
            grad_norm = grad_norm.full_tensor()
        batches, self._batches = self._batches, []
        if math.isfinite(grad_norm) or self._scaler_still_adapts():
            return grad_norm
        raise NonFiniteError(self.state.global_step + 1, self._find_non_finite(batches))

    def _find_non_finite(self, batches: list[dict[str, Tensor]]) -> str:
        """Where the first number that is not finite comes from, in any process."""
        if self.is_sharded:
            # Every pass needs all processes, and each would end the search at a place of its own.
            return "where it comes from is not looked for with training.sharding full"
        inputs = [self._prepare_inputs(batch) for batch in batches]
        where = find_non_finite(
            self.model, inputs, lambda batch: self.compute_loss(self.model, batch)
        )
        places = from_all(where)
        return next((place for place in places if place != ALL_FINITE), where)

    def _scaler_still_adapts(self) -> bool:
        """Whether the loss scaler handles overflows: it leaves such steps out and scales less."""
        scaler = self.accelerator.scaler
        return scaler is not None and scaler.get_scale() >= 1

    def skip_data(self, step: int) -> None:
        """Makes the next call of `train` resume behind the data that came up to a step."""
        self._skip_to = step + self.skipped_steps
        self.args.eval_on_start = False
        self.optimizer = None  # it is made anew, and takes the state of the checkpoint

    def state_dict(self) -> dict[str, Any]:
        """What the Trainer's own state leaves out.

        Losses since the last line of the log, and how much of the data was passed over.
        """
        losses = self.accelerator.gather(self._tr_loss.reshape(1))
        return {
            "losses_since_log": losses.tolist(),  # one per process
            "last_log_step": self._globalstep_last_logged,
            "skipped_steps": self.skipped_steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what `state_dict` gave; it takes effect when the loop has begun."""
        self._resumed = state
        self.skipped_steps = state["skipped_steps"]

    def set_initial_training_values(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer, but only the number of steps ends a run: data may be passed over."""
        _, *values = super().set_initial_training_values(*args, **kwargs)
        return (sys.maxsize, *values)

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        position = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        # A resumed state brings its old intervals; those of the arguments count.
        self.state.compute_steps(self.args, max_steps)
        if resume_from_checkpoint is not None:
            with _readable(resume_from_checkpoint):
                for name, stateful in self.stateful.items():
                    stateful.load_state_dict(load_state(Path(resume_from_checkpoint), name))
            self._saved_step = self.state.global_step
            self._skip()
        return position

    def _skip(self) -> None:
        """Passes over what `skip_data` asked for, from the data position of the checkpoint on."""
        if self._skip_to is None:
            return
        steps = self._skip_to - (self.state.global_step + self.skipped_steps)
        self.skipped_steps += steps
        self._skip_to = None
        for stateful in self.stateful.values():
            if isinstance(stateful, Skippable):
                stateful.skip_batches(steps * self.args.gradient_accumulation_steps)
        if self.carried_state is not None:
            self.carried_state.load_state_dict({})  # what it knows was left behind

    def _run_epoch(self, **kwargs: Any) -> None:
        if self._resumed is not None:
            losses = self._resumed["losses_since_log"]
            same = len(losses) == self.args.world_size
            self._tr_loss += losses[self.args.process_index] if same else sum(losses) / len(losses)
            self._globalstep_last_logged = self._resumed["last_log_step"]
            self._resumed = None
        # A resumed run that was at its end already would take one step more.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(**kwargs)
        if self.data_ended:
            self._end_with_the_data(kwargs["model"])

    def _end_with_the_data(self, model: nn.Module) -> None:
        """Does what else follows the last step, after which nobody knew that it was the last.

        Raises:
            DataError: There was no step.
        """
        step = self.state.global_step
        if step == 0:
            raise DataError(
                "the sources end before they fill one step of "
                f"{self.args.gradient_accumulation_steps} batches: give more text, or a smaller "
                "training.batch_size or training.gradient_accumulation_steps"
            )
        history = self.state.log_history
        evaluated = any("eval_loss" in line and line["step"] == step for line in history)
        self.control.should_log = True
        self.control.should_evaluate = not evaluated
        self.control.should_save = self._saved_step != step
        self._maybe_log_save_evaluate(self._tr_loss, None, model, None, 0, None, 0.0)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._written or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes what a resumed run needs, whole or not at all, and removes the oldest."""
        checkpoint = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        self._written = checkpoint.with_name("saving.part")
        written = self._written / checkpoint.name  # the Trainer adds this name
        try:
            with writing(checkpoint):
                if self.args.should_save:
                    shutil.rmtree(self._written, ignore_errors=True)
                self.accelerator.wait_for_everyone()
                super()._save_checkpoint(model, trial)
                states = {name: part.state_dict() for name, part in self.stateful.items()}
                if self.args.should_save:
                    save_states(written, states)
                    (written / CONFIG_FILE).write_text(self.configuration, encoding="utf-8")
                    # A pickle of the arguments, which nothing reads.
                    (written / "training_args.bin").unlink(missing_ok=True)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    publish_checkpoint(written, checkpoint)
                    rotate_checkpoints(checkpoint.parent, self.args.save_total_limit)
            self._saved_step = self.state.global_step
        finally:
            if self.args.should_save:
                shutil.rmtree(self._written, ignore_errors=True)
            self._written = None

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        if self.is_sharded:
            state_dict = whole_weights(self.model)
            if not self.args.should_save:
                return
        super()._save(output_dir, state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_sharded and not self.args.should_save:
            self.optimizer.state_dict()  # the first process asks for it, and all take part
        super()._save_optimizer_and_scheduler(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with _readable(resume_from_checkpoint):
            self._check_tokenizer(Path(resume_from_checkpoint))
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _check_tokenizer(self, checkpoint: Path) -> None:
        """Refuses weights that were trained on other tokens."""
        path = checkpoint / "config.json"
        if not path.exists():
            return  # of an adapter
        theirs = json.loads(path.read_text(encoding="utf-8")).get("tokenizer_fingerprint")
        ours = getattr(self.model.config, "tokenizer_fingerprint", None)
        if theirs != ours:
            raise CheckpointError(
                f"{checkpoint}: was trained with another tokenizer (fingerprint {theirs}, now "
                f"{ours}): the text or the tokenizer has changed since; begin another run"
            )

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Refuses weights that do not fill the model exactly, where the Trainer only warns."""
        tensors = self.model.state_dict()
        loaded = {t.data_ptr() for n, t in tensors.items() if n not in load_result.missing_keys}
        # A tied weight is saved once, under one of its names.
        missing = [
            name
            for name in load_result.missing_keys
            if tensors[name].data_ptr() not in loaded
            and name not in (self.model._keys_to_ignore_on_save or ())
        ]
        wrong = [*missing, *load_result.unexpected_keys]
        if wrong:
            raise ValueError(f"{len(wrong)} tensors are missing or unknown, such as {wrong[0]}")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _readable(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        with _readable(checkpoint):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _readable(checkpoint):
            super()._load_rng_state(checkpoint)


class CarriedRows:
    """The carried states of all processes, in the order of the rows of the whole batch.

    Row b of process r is row r + b * world of all, as `RowBatches` deals them out: a checkpoint
    of them suits any number of processes.

    Args:
        carried: The states of this process.
        device: Where they are.
    """

    def __init__(self, carried: CarriedState, device: torch.device) -> None:
        self.carried, self.device = carried, device

    def state_dict(self) -> dict[str, Tensor]:
        """The states of all rows; all processes ask for them together."""
        own = {name: state.cpu() for name, state in self.carried.state_dict().items()}
        parts = from_all(own)
        return {name: _interleave([part[name] for part in parts]) for name in own}

    def load_state_dict(self, states: Mapping[str, Tensor]) -> None:
        """Takes the rows of this process out of those of all."""
        rank, world = process_rank()
        self.carried.load_state_dict(
            {name: state[rank::world].contiguous() for name, state in states.items()}
        )
        self.carried.to(self.device)


def _interleave(parts: list[Tensor]) -> Tensor:
    """The rows of the parts in turns; the last parts may have one row less."""
    rows = sum(map(len, parts))
    return torch.stack([parts[row % len(parts)][row // len(parts)] for row in range(rows)])


@contextmanager
def _readable(checkpoint: str | None) -> Iterator[None]:
    """Turns what a library raises while a checkpoint is read into a CheckpointError."""
    try:
        yield
    except I3Error:
        raise
    except Exception as error:  # safetensors, torch, pickle and zip each raise their own
        reason = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
        raise CheckpointError(
            f"{checkpoint}: is of another model, or of another version of i3lm or its libraries "
            f"({reason}); begin another run, or remove this folder to resume from the checkpoint "
            "before it"
        ) from error
