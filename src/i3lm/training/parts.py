"""The parts of a run: what it trains on what, decided and made before anything is written."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from i3lm.data.rows import RowBatches
from i3lm.data.streams import Documents
from i3lm.device import resolve_device, resolve_precision, seed_everything
from i3lm.errors import ConfigurationError, GenerationError
from i3lm.inference import SamplingOptions, TextGenerator
from i3lm.inference.adapters import Base
from i3lm.inference.loading import check_room, choose_context_length
from i3lm.inference.sessions import model_fingerprint
from i3lm.models.i3 import I3ForCausalLM
from i3lm.processes import first_goes_first, join_processes, process_rank
from i3lm.training.adapters import add_adapter
from i3lm.training.build import Starting, choose_kernels, make_model, make_tokenizer
from i3lm.training.data import Reporting, TrainingText, open_training_text
from i3lm.training.gradient_checkpointing import checkpoint_gradients
from i3lm.training.options import RunOptions, TrainingOptions, resolve_defaults


@dataclass(frozen=True)
class Parts:
    """What a run trains, on what, and where.

    Attributes:
        name: The preset that the run starts from, or that it is a checkpoint.
        options: The options, complete.
        device: The device of this process.
        precision: ``fp32``, ``bf16`` or ``fp16``.
        tokenizer: The tokenizer.
        text: The documents.
        model: The model, with its adapter.
        base: What the adapter is trained on; None where the whole model is trained.
        parameters: Number of the model's own parameters, an adapter's left out.
        rows: The batches that this process trains on.
        max_steps: Optimizer steps.
        draws: How samples are drawn.
        kernels: As `choose_kernels` gives them.
    """

    name: str
    options: RunOptions
    device: torch.device
    precision: str
    tokenizer: PreTrainedTokenizerBase
    text: TrainingText
    model: PreTrainedModel
    base: Base | None
    parameters: int
    rows: RowBatches
    max_steps: int
    draws: SamplingOptions
    kernels: list[tuple[str, str, str]]

    @property
    def generator(self) -> TextGenerator:
        """What writes samples."""
        return TextGenerator(self.model, self.tokenizer, self.precision)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimizer step, of all processes."""
        rows = _rows_per_step(self.options.training, self.rows)
        return rows * self.rows.context_length


def complete_options(options: RunOptions, start: Starting) -> RunOptions:
    """The options with everything decided that depends on where the run starts.

    Raises:
        ConfigurationError: An adapter is asked for where there is no checkpoint.
    """
    rank, fine_tuning = options.adapter.rank, start.checkpoint is not None
    if rank and not fine_tuning:
        raise ConfigurationError(
            f"adapter.rank ({rank}) adapts a checkpoint, and {start.preset.name} is drawn anew: "
            "give the folder of one as model.source, or leave it out"
        )
    training = resolve_defaults(options.training, fine_tuning=fine_tuning, adapter=rank > 0)
    return replace(options, training=training)


def prepare_parts(start: Starting, options: RunOptions, progress: Reporting) -> Parts:
    """Makes text, tokenizer, model and rows; what contradicts itself is refused first.

    Args:
        start: Where the run starts.
        options: Its options, complete.
        progress: Shows how far the tokenizing of a source has come.

    Raises:
        I3Error: Anything that the options, the data or the machine cannot give.
    """
    training = options.training
    device = join_processes(resolve_device(training.device))
    precision = _trainable_precision(training.precision, device)
    _check_sharding(options, precision)
    _check_optimizer_state(options.training, device)
    draws = _sampling_options(options)
    with first_goes_first():
        tokenizer = make_tokenizer(options.tokenizer, start, options.data)
        text = open_training_text(options.data, tokenizer, seed=training.seed, progress=progress)
    model = make_model(start, tokenizer, seed=training.seed)
    rows = _make_rows(text.documents, options, model)
    max_steps = _count_steps(training, rows)
    _check_samples(TextGenerator(model, tokenizer, precision), options)
    checkpoint_gradients(model, training.gradient_checkpointing)
    kernels = choose_kernels(model, device, strict=training.strict_kernels)
    parameters = sum(p.numel() for p in model.parameters())
    return Parts(
        name=start.preset.name,
        options=options,
        device=device,
        precision=precision,
        tokenizer=tokenizer,
        text=text,
        model=model,
        base=_adapt(model, start, options),
        parameters=parameters,
        rows=rows,
        max_steps=max_steps,
        draws=draws,
        kernels=kernels,
    )


def _trainable_precision(name: str, device: torch.device) -> str:
    precision = resolve_precision(name, device)
    if precision == "fp16" and device.type != "cuda":
        raise ConfigurationError(
            f"training.precision (fp16): its loss scaling needs a CUDA GPU, and the device is "
            f"{device}: use bf16, fp32 or auto"
        )
    return precision


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


def _check_optimizer_state(training: TrainingOptions, device: torch.device) -> None:
    """Refuses narrow averages where no optimizer keeps them so."""
    where = f"on {device}"
    if training.sharding != "none":
        where = f"with training.sharding {training.sharding}"
    elif device.type == "cpu":
        return
    if training.optimizer_state != "fp32":
        raise ConfigurationError(
            f"training.optimizer_state ({training.optimizer_state}) is for a CPU and whole models, "
            f"not {where}: choose fp32"
        )


def _sampling_options(options: RunOptions) -> SamplingOptions:
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


def _make_rows(documents: Documents, options: RunOptions, model: PreTrainedModel) -> RowBatches:
    kind, training = options.data.rows, options.training
    context_length = choose_context_length(
        model, training.context_length, option="training.context_length"
    )
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
        batch_size=training.batch_size,
        rank=rank,
        world=world,
    )


def _rows_per_step(training: TrainingOptions, rows: RowBatches) -> int:
    return training.batch_size * training.gradient_accumulation_steps * rows.world


def _count_steps(training: TrainingOptions, rows: RowBatches) -> int:
    """Optimizer steps of the run; a last step that the rows do not fill is left out."""
    if training.max_steps is not None:
        return training.max_steps
    if rows.rows_per_epoch is None:
        raise ConfigurationError(
            "training.max_steps is missing: the length of a text that is read while training is "
            "not known; give the number of steps"
        )
    per_step = _rows_per_step(training, rows)
    return max(1, int((training.epochs or 1.0) * rows.rows_per_epoch / per_step))


def _check_samples(generator: TextGenerator, options: RunOptions) -> None:
    """Refuses a prompt that the model has no room for."""
    for prompt in options.sample.prompts:
        length = len(generator.encode_prompt(prompt))
        check_room(generator.model, length, options.sample.max_new_tokens)


def _adapt(model: PreTrainedModel, start: Starting, options: RunOptions) -> Base | None:
    """Adds the adapter, if there is to be one, and gives what it is trained on."""
    if not options.adapter.rank:
        return None
    assert start.checkpoint is not None  # `complete_options` has seen to it
    base = Base(start.checkpoint.resolve(), model_fingerprint(model))
    seed_everything(options.training.seed)
    add_adapter(model, options.adapter)
    return base
