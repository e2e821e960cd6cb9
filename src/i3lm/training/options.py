"""What a person can set about a run, checked when it is read."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

from i3lm.errors import ConfigurationError

OPTIMIZERS = ("adamw", "muon")
OPTIMIZER_STATES = ("fp32", "bf16", "fp8")
SHARDINGS = ("none", "full")
TRACKERS = ("none", "tensorboard", "trackio", "wandb")
# As in `i3lm.data.mixing` and `i3lm.data.rows`, which this file does not import: the command line
# reads it before anything heavy is loaded.
WhenExhausted = Literal["repeat", "drop", "stop"]
WHEN_EXHAUSTED = get_args(WhenExhausted)
RowKind = Literal["contiguous", "packed", "stream"]
ROW_KINDS = get_args(RowKind)


def _require(rules: tuple[tuple[str, Any, bool, str], ...]) -> None:
    for name, value, holds, rule in rules:
        if not holds:
            raise ConfigurationError(f"{name} ({value}) {rule}")


@dataclass
class ModelOptions:
    """Which model to train.

    Args:
        source: A preset (see `i3lm models`), the path of a preset in YAML, or the folder of a
            checkpoint, which is then fine-tuned. Without it, `config` describes a new model.
        config: Configuration fields that override the preset's, or describe a model of their
            own, for example --model.config.hidden_size 256.
    """

    source: str | None = None
    config: dict[str, Any] = field(default_factory=dict)


@dataclass
class TokenizerOptions:
    """Which tokenizer to use.

    Args:
        source: bpe, chunk or character to train one on the data; or the path or Hub name of one
            that exists. By default the preset's kind, or the checkpoint's own tokenizer.
        vocab_size: Size of a BPE vocabulary, by default the model's vocab_size; or the most
            chunks, by default all. The model's vocabulary always follows the tokenizer that came
            out.
        lowercase: Whether a character tokenizer lower-cases its text; by default as the preset
            says.
        documents: Most documents of each source to train one on; by default all, or the first
            100,000 of a set that is streamed.
    """

    source: str | None = None
    vocab_size: int | None = None
    lowercase: bool | None = None
    documents: int | None = None


@dataclass
class TextOptions:
    """Where a text comes from.

    Args:
        source: A built-in corpus (stories, pydocs); the path of a .txt, .jsonl or .parquet file
            (the first two also as .gz, .bz2, .xz or .zst), of a folder of them, or a pattern such
            as "data/*.jsonl.gz"; or a data set on the Hub (owner/name, or owner/name:config).
        text_column: Where a record holds its text, or its conversation (a list of messages); by
            default the known column of a known set, else text, messages or conversations.
        split: Which split of a Hub data set to read.
        size: Most documents to read; for stories, how many to write.
        downloaded: Download a Hub data set before it is read, instead of streaming it.
        revision: Branch, tag or commit of a Hub data set; by default the newest.
    """

    source: str = "stories"
    text_column: str | None = None
    split: str = "train"
    size: int | None = None
    downloaded: bool = False
    revision: str | None = None

    def __post_init__(self) -> None:
        size = self.size
        _require((("data.size", size, size is None or size > 0, "must be at least 1"),))


@dataclass
class SourceOptions(TextOptions):
    """One of the texts to train on.

    Args:
        weight: The share of the training tokens, relative to the other sources'.
        name: What the log calls it; by default the source.
    """

    weight: float = 1.0
    name: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.name = self.name or self.source


@dataclass
class DataOptions(TextOptions):
    """Which text to train on.

    Args:
        mixture: Several sources, in place of the one above: a list of mappings with the fields
            above, each with a weight (its share of the tokens, 1 by default) and, where two are
            called the same, a name.
        when_exhausted: What a mixture does where a source ends: repeat reads it again, drop goes
            on with the others, stop ends the run.
        held_out_fraction: Share of documents, picked by their text, that training never sees
            and that evaluation uses.
        rows: How documents become rows. contiguous: one after the other, with nothing between
            but a separator. packed: likewise, but no state or attention passes from one document
            to the next. stream: packed, and recurrent layers carry their state to the next row,
            so that a document goes on in them past the end of a row.
        shuffle: Draw a new order of documents for every epoch.
        streaming: Tokenize while training, instead of once before it, for sets too large to keep.
        shuffle_buffer: With streaming, how many documents are shuffled among themselves.
        workers: Processes that tokenize; 0 for none but the main one. The result is the same.
        cache: Folder for tokenized text; by default i3lm/tokens in the cache of the user.
    """

    mixture: list[SourceOptions] = field(default_factory=list)
    when_exhausted: WhenExhausted = "repeat"
    held_out_fraction: float = 0.05
    rows: RowKind = "contiguous"
    shuffle: bool = True
    streaming: bool = False
    shuffle_buffer: int = 2_000
    workers: int = 0
    cache: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        share = self.held_out_fraction
        _require((
            ("data.held_out_fraction", share, 0 < share < 1, "must be above 0 and below 1"),
            ("data.rows", self.rows, self.rows in ROW_KINDS,
             f"must be one of {', '.join(ROW_KINDS)}"),
            ("data.when_exhausted", self.when_exhausted, self.when_exhausted in WHEN_EXHAUSTED,
             f"must be one of {', '.join(WHEN_EXHAUSTED)}"),
            ("data.shuffle_buffer", self.shuffle_buffer, self.shuffle_buffer >= 1,
             "must be at least 1; turn shuffling off with data.shuffle false"),
            ("data.workers", self.workers, self.workers >= 0, "must be 0 or above"),
        ))  # fmt: skip

    def all_sources(self) -> list[SourceOptions]:
        """Every source: those of the mixture, or the one."""
        if self.mixture:
            return self.mixture
        shared = {one.name: getattr(self, one.name) for one in fields(TextOptions)}
        return [SourceOptions(**shared)]


@dataclass
class TrainingOptions:
    """How to train.

    Args:
        max_steps: Optimizer steps. Give this or epochs.
        target_perplexity: End the run at the first evaluation whose held-out perplexity, per
            token, is at or below this.
        epochs: Passes over the training text, in place of max_steps; one pass if neither is given.
        batch_size: Rows per forward pass of each process.
        gradient_accumulation_steps: Forward passes per optimizer step.
        context_length: Tokens per row; by default the model's context.
        optimizer: adamw, or muon: Muon for the matrices of the layers, AdamW for embeddings, head,
            vectors and decay rates. One learning rate serves both.
        optimizer_state: What AdamW keeps its averages in: fp32; or, on a CPU, bf16 or fp8, which
            save 4 and 6 of the 16 bytes a parameter that training takes without activations.
        learning_rate: Peak rate, reached after the warm-up; by default 1e-3 for a new model and
            for adapters, and 1e-4 for a whole checkpoint.
        min_learning_rate_ratio: What is left of the rate at the end of the cosine.
        warmup_steps: Steps of linear warm-up; by default 20 for a new model, and for a checkpoint
            50, or a tenth of max_steps if that is less.
        weight_decay: Decay of matrices; norms, biases, embeddings and decay rates have
            none.
        adam_beta1: AdamW's decay of the mean gradient.
        adam_beta2: AdamW's decay of the mean squared gradient.
        max_grad_norm: Gradients are scaled down to this norm; 0 turns it off.
        precision: fp32, bf16, fp16 (with loss scaling, on a CUDA GPU), or auto for bf16 where the
            processor multiplies it in hardware, fp16 on GPUs that do not, and fp32 elsewhere.
        device: cpu, cuda (or one GPU by its number, such as cuda:1), mps, or auto for the fastest
            there is.
        strict_kernels: Refuse to train where a recurrence has no compiled kernel, instead of
            running its slower form.
        gradient_checkpointing: Keep only what enters each layer, and compute the rest again for
            the gradients: much less memory, about a third more time. true for all layers;
            attention or recurrent for the layers of that kind (a hybrid layer is of both).
        compile: Compile the model with torch.compile; the first step then takes a minute or
            more. On a CPU it needs a C++ compiler.
        sharding: Where a launcher started several processes: none gives each of them the whole
            model; full gives each a shard of weights, gradients and optimizer states (FSDP2).
        on_nan: What to do when a gradient is not finite: stop names the step and the layer;
            restore goes back to the newest checkpoint, passes over the data that led there, and
            goes on, three times at most. The rate is not changed.
        seed: Seed of weights, order of documents, and draws.
        log_every: Steps between lines of the metrics file.
        tracking: none, tensorboard, trackio or wandb, to show the figures of the metrics file as
            they come; keys come from the environment alone.
        evaluate_every: Steps between evaluations on the held-out text.
        save_every: Steps between checkpoints to resume from.
        keep_checkpoints: How many of those to keep, beside best and last.
    """

    max_steps: int | None = None
    target_perplexity: float | None = None
    epochs: float | None = None
    batch_size: int = 16
    gradient_accumulation_steps: int = 1
    context_length: int | None = None
    optimizer: str = "adamw"
    optimizer_state: str = "fp32"
    learning_rate: float | None = None
    min_learning_rate_ratio: float = 0.1
    warmup_steps: int | None = None
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    max_grad_norm: float = 1.0
    precision: str = "auto"
    device: str = "auto"
    strict_kernels: bool = False
    gradient_checkpointing: bool | str = False
    compile: bool = False
    sharding: str = "none"
    on_nan: str = "stop"
    seed: int = 0
    log_every: int = 10
    tracking: str = "none"
    evaluate_every: int = 100
    save_every: int = 500
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        if self.max_steps is not None and self.epochs is not None:
            raise ConfigurationError(
                f"training.max_steps ({self.max_steps}) and training.epochs ({self.epochs}) "
                "exclude each other: give one, or set the other to null"
            )
        counts = (
            "batch_size", "gradient_accumulation_steps", "log_every", "evaluate_every",
            "save_every", "keep_checkpoints",
        )  # fmt: skip
        _require((
            *((f"training.{name}", getattr(self, name), getattr(self, name) >= 1,
               "must be at least 1") for name in counts),
            ("training.gradient_checkpointing", self.gradient_checkpointing,
             self.gradient_checkpointing in (True, False, "attention", "recurrent"),
             "must be true, false, attention or recurrent"),
            ("training.sharding", self.sharding, self.sharding in SHARDINGS,
             f"must be one of {', '.join(SHARDINGS)}"),
            ("training.on_nan", self.on_nan, self.on_nan in ("stop", "restore"),
             "must be stop or restore"),
            ("training.max_steps", self.max_steps, self.max_steps is None or self.max_steps >= 1,
             "must be at least 1"),
            ("training.target_perplexity", self.target_perplexity,
             self.target_perplexity is None or self.target_perplexity > 1, "must be above 1"),
            ("training.epochs", self.epochs, self.epochs is None or self.epochs > 0,
             "must be above 0"),
            ("training.context_length", self.context_length,
             self.context_length is None or self.context_length >= 1, "must be at least 1"),
            ("training.seed", self.seed, 0 <= self.seed < 2**32, "must be between 0 and 2^32 - 1"),
            ("training.tracking", self.tracking, self.tracking in TRACKERS,
             f"must be one of {', '.join(TRACKERS)}"),
            ("training.optimizer", self.optimizer, self.optimizer in OPTIMIZERS,
             f"must be one of {', '.join(OPTIMIZERS)}"),
            ("training.optimizer_state", self.optimizer_state,
             self.optimizer_state in OPTIMIZER_STATES,
             f"must be one of {', '.join(OPTIMIZER_STATES)}"),
            ("training.optimizer_state", self.optimizer_state,
             self.optimizer_state == "fp32" or self.optimizer == "adamw",
             "goes with training.optimizer adamw"),
            ("training.learning_rate", self.learning_rate,
             self.learning_rate is None or self.learning_rate > 0,
             "must be above 0"),
            ("training.min_learning_rate_ratio", self.min_learning_rate_ratio,
             0 <= self.min_learning_rate_ratio <= 1, "must be between 0 and 1"),
            ("training.warmup_steps", self.warmup_steps,
             self.warmup_steps is None or self.warmup_steps >= 0,
             "must be 0 or above"),
            ("training.weight_decay", self.weight_decay, self.weight_decay >= 0,
             "must be 0 or above"),
            ("training.adam_beta1", self.adam_beta1, 0 <= self.adam_beta1 < 1,
             "must be at least 0 and below 1"),
            ("training.adam_beta2", self.adam_beta2, 0 <= self.adam_beta2 < 1,
             "must be at least 0 and below 1"),
            ("training.max_grad_norm", self.max_grad_norm, self.max_grad_norm >= 0,
             "must be 0 (off) or above"),
        ))  # fmt: skip


@dataclass
class AdapterOptions:
    """Low-rank adapters for a checkpoint, in place of training all of its weights.

    Args:
        rank: Rank of what is added to each matrix; 0 trains all weights and adds nothing.
        alpha: Scale: what is added counts alpha / rank times; by default twice the rank.
        dropout: Share of what enters the adapters that is dropped; for linear layers only.
        targets: all, attention, recurrent, feed_forward, or ends of names of modules, such as
            [mixer.key, mixer.value].
        vectors: Whether to train the model's vectors too: token shifts, decay rates, bonuses,
            norms, biases.
    """

    rank: int = 0
    alpha: int | None = None
    dropout: float = 0.0
    targets: str | list[str] = "all"
    vectors: bool = False

    def __post_init__(self) -> None:
        _require((
            ("adapter.rank", self.rank, self.rank >= 0, "must be 0 (none) or above"),
            ("adapter.alpha", self.alpha, self.alpha is None or self.alpha > 0, "must be above 0"),
            ("adapter.dropout", self.dropout, 0 <= self.dropout < 1,
             "must be at least 0 and below 1"),
            ("adapter.targets", self.targets, bool(self.targets), "must name something"),
        ))  # fmt: skip


@dataclass
class SampleOptions:
    """Which texts to write while training, to see it learn.

    Args:
        prompts: Beginnings to continue after training; the first also while training.
        every: Steps between samples while training; 0 means only at the end.
        max_new_tokens: Tokens per sample.
        temperature: Temperature of the draws.
        top_k: Draw among this many likeliest tokens; 0 means all.
    """

    prompts: list[str] = field(default_factory=lambda: ["Once upon a time"])
    every: int = 0
    max_new_tokens: int = 80
    temperature: float = 0.8
    top_k: int = 50

    def __post_init__(self) -> None:
        # The draws themselves are checked where they are used, by `SamplingOptions`.
        every = self.every
        _require((("sample.every", every, every >= 0, "must be 0 (only at the end) or above"),))


def resolve_defaults(
    training: TrainingOptions, *, fine_tuning: bool, adapter: bool
) -> TrainingOptions:
    """Fills in what depends on where a run starts: learning rate and warm-up.

    A checkpoint lies in a minimum that large steps would leave; an adapter begins at zero, and
    its factors are small, so it takes about ten times the rate of the whole.

    Args:
        training: The options as they were given.
        fine_tuning: Whether the run starts from a checkpoint.
        adapter: Whether it trains adapters alone.
    """
    rate, warmup = training.learning_rate, training.warmup_steps
    if rate is None:
        rate = 1e-4 if fine_tuning and not adapter else 1e-3
    if warmup is None:
        warmup = min(50, (training.max_steps or 500) // 10) if fine_tuning else 20
    return replace(training, learning_rate=rate, warmup_steps=warmup)


@dataclass(frozen=True)
class RunOptions:
    """Everything that defines a run; kept as ``config.yaml`` in its folder."""

    model: ModelOptions
    tokenizer: TokenizerOptions
    data: DataOptions
    training: TrainingOptions
    sample: SampleOptions
    adapter: AdapterOptions = field(default_factory=AdapterOptions)
