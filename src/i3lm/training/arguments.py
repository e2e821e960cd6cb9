"""From our options to the arguments of transformers' Trainer."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import TrainingArguments
from transformers.training_args import ParallelMode

from i3lm.processes import process_rank
from i3lm.training.options import TrainingOptions
from i3lm.training.tracking import run_names


@dataclass
class OneDeviceArguments(TrainingArguments):
    """Training arguments of a process that uses exactly one device.

    On its own, transformers trains one process on all visible GPUs at once (`nn.DataParallel`),
    beginning with the first.

    Args:
        asked_device: The device, such as ``cuda:1``. Where a launcher started several processes,
            each has a device of its own, and this is not read.
        optimizer: The name of the optimizer, one of `i3lm.training.options.OPTIMIZERS`.
        optimizer_state: What AdamW keeps its averages in, ``fp32``, ``bf16`` or ``fp8``.
        sharded: Whether the processes share weights, gradients and optimizer states.
    """

    asked_device: str = field(default="cpu", metadata={"help": "The one device to use."})
    optimizer: str = field(default="adamw", metadata={"help": "adamw or muon."})
    optimizer_state: str = field(default="fp32", metadata={"help": "fp32, bf16 or fp8."})
    sharded: bool = field(default=False, metadata={"help": "One shard per process (FSDP2)."})

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        given = super().device  # sets up accelerate's state, and all that hangs on it
        if self.parallel_mode is ParallelMode.DISTRIBUTED:
            return given
        device = torch.device(self.asked_device)
        if device.type == "cuda":
            device = torch.device("cuda", device.index or 0)
            torch.cuda.set_device(device)
        self.distributed_state.device = device  # where accelerate moves the batches
        return device

    @property
    def n_gpu(self) -> int:
        """The number of GPUs that this process uses, 0 or 1."""
        return min(super().n_gpu, 1)


def training_arguments(
    output: Path,
    training: TrainingOptions,
    precision: str,
    device: torch.device,
    *,
    max_steps: int,
    resumed: bool,
) -> OneDeviceArguments:
    """Gives the arguments of a run.

    Args:
        output: The folder of the run.
        training: How to train.
        precision: ``fp32``, ``bf16`` or ``fp16``.
        device: Where to train.
        max_steps: Optimizer steps of the run.
        resumed: Whether the run goes on from a checkpoint.
    """
    return OneDeviceArguments(
        asked_device=str(device),
        optimizer=training.optimizer,
        optimizer_state=training.optimizer_state,
        # One process has all of it in any case.
        sharded=training.sharding == "full" and process_rank()[1] > 1,
        output_dir=str(output / "checkpoints"),
        project=run_names(output)[0],
        run_name=run_names(output)[1],
        max_steps=max_steps,
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
        torch_compile=training.compile,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        use_cpu=device.type == "cpu",
        seed=training.seed,
        data_seed=training.seed,
        ignore_data_skip=True,  # rows have a position of their own
        dataloader_pin_memory=device.type == "cuda",
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
