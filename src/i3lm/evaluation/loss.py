"""Loss, perplexity and bits per byte."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn
from torch.nn import functional as F

from i3lm.data.rows import NOT_LEARNT
from i3lm.data.tokens import TokenizedText
from i3lm.device import autocast
from i3lm.errors import ConfigurationError, DataError
from i3lm.models.i3 import CarriedState, I3ForCausalLM
from i3lm.models.i3.packing_i3 import document_starts
from i3lm.ops.dispatch import accumulation_dtype
from i3lm.processes import from_all, process_rank


@dataclass(frozen=True)
class Evaluation:
    """What a model scores on a text.

    Attributes:
        loss: Mean negative log-likelihood, nats per token.
        perplexity: ``e^loss``, per token: comparable only under one tokenizer.
        bits_per_byte: Bits to encode one UTF-8 byte of the text, ends of documents included:
            comparable across tokenizers.
        tokens: Number of tokens predicted.
        bytes: UTF-8 bytes of the text.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int

    def as_dict(self) -> dict[str, Any]:
        """The figures by name."""
        return asdict(self)


def figures_line(figures: Mapping[str, float]) -> str:
    """Loss (nats per token), perplexity and bits per byte as one line."""
    return (
        f"loss {figures['loss']:.4f}, perplexity {figures['perplexity']:,.2f}, "
        f"bits per byte {figures['bits_per_byte']:.4f}"
    )


@torch.no_grad()
def evaluate_text(
    model: nn.Module,
    text: TokenizedText,
    *,
    context_length: int,
    batch_size: int = 16,
    precision: str = "fp32",
    separate_documents: bool = False,
    shared: bool = False,
) -> Evaluation:
    """Gives the model's loss on every token of a text but the first (of those that are learnt).

    The stream is read in rows of `context_length` tokens that do not overlap, each from an empty
    state, so a token sees at most `context_length` tokens before it and the figure is an
    upper bound. The last row may be shorter.

    Args:
        model: A causal language model; it is put in evaluation mode and back.
        text: The text, tokenized with the model's tokenizer.
        context_length: Tokens per row, at most what the model has positions for.
        batch_size: Rows per forward pass; it does not change the result.
        precision: ``fp32``, ``bf16`` or ``fp16`` (autocast).
        separate_documents: Whether nothing passes from one document to the next, as in training
            on packed rows and streams.
        shared: Whether all processes of a run are here and share the batches. All of them get
            the same figures, from sums in the order in which one process alone adds them.

    Raises:
        DataError: The text has fewer than two tokens.
    """
    learnt = len(text.tokens) - 1 if text.learnt is None else int(text.learnt[1:].sum())
    if learnt < 1 or text.bytes == 0:
        raise DataError(
            f"the text has {text.bytes:,} bytes in {len(text.tokens):,} tokens, too few to "
            "evaluate on: give at least one document, two tokens with its separator"
        )
    device = next(model.parameters()).device
    in_pieces = isinstance(model, I3ForCausalLM)
    was_training = model.training
    model.eval()
    begins = text.begins() if separate_documents else None
    rank, world = process_rank() if shared else (0, 1)
    parts = _rows(len(text.tokens), context_length, batch_size)
    sums: list[tuple[float, int]] = []  # of this process: nats and labels of each batch
    try:
        while batches := list(islice(parts, world)):
            # A process that has none left goes along: together they may hold the weights.
            part = batches[min(rank, len(batches) - 1)]
            labels = _take(text.tokens, part + 1)
            if text.learnt is not None:
                labels.masked_fill_(~_take(text.learnt, part + 1), NOT_LEARNT)
            counted = int((labels != NOT_LEARNT).sum())
            with autocast(device, precision):
                mean = next_token_loss(
                    model,
                    _take(text.tokens, part).to(device),
                    labels.to(device),
                    in_pieces=in_pieces,
                    reset=None if begins is None else _take(begins, part).to(device),
                )
            sums.append((mean.item() * counted, counted) if rank < len(batches) else (0.0, 0))
    finally:
        model.train(was_training)
    in_order = zip(*(from_all(sums) if shared else [sums]), strict=True)
    nats, count = 0.0, 0
    for batch_nats, labels_of_batch in chain.from_iterable(in_order):
        nats += batch_nats
        count += labels_of_batch
    loss = nats / count
    return Evaluation(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        bits_per_byte=nats / math.log(2) / text.bytes,
        tokens=count,
        bytes=text.bytes,
    )


def next_token_loss(
    model: nn.Module,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    *,
    in_pieces: bool,
    reset: torch.Tensor | None = None,
    carried_state: CarriedState | None = None,
) -> torch.Tensor:
    """Gives the mean negative log-likelihood of the labels, a scalar in nats per token.

    Args:
        model: A causal language model, perhaps wrapped (compiled, or for several processes).
        input_ids: Token ids, shape (B, T).
        labels: The ids one step ahead, shape (B, T). -100 does not count; where none counts, the
            loss is 0.
        in_pieces: The model, an i3 model, computes the loss piece by piece, so that logits of
            shape (B, T, V) never exist.
        reset: True at the first token of each document of a packed row, bool, shape (B, T).
            Nothing before it reaches the tokens from it on, in a model of any architecture.
        carried_state: What an i3 model carries from row to row of a stream.

    Raises:
        ConfigurationError: A model of another architecture that cannot keep documents apart, or
            a carried state for one.
    """
    if in_pieces:
        return model(
            input_ids=input_ids,
            shift_labels=labels,
            skip_logits=True,
            use_cache=False,
            reset=reset,
            carried_state=carried_state,
        ).loss
    if carried_state is not None:
        raise ConfigurationError(
            f"{_core(model).__class__.__name__} cannot go on from the row before, as i3 models "
            "do: take packed or contiguous rows"
        )
    packing = {} if reset is None else {"position_ids": _positions_in_documents(model, reset)}
    logits = model(input_ids=input_ids, use_cache=False, **packing).logits
    logits = logits.flatten(0, 1).to(accumulation_dtype(logits.dtype))
    total = F.cross_entropy(logits, labels.flatten(), reduction="sum")
    return total / (labels != NOT_LEARNT).sum().clamp_min(1)


def _positions_in_documents(model: nn.Module, reset: torch.Tensor) -> torch.Tensor:
    """Positions (B, T) that restart at every document.

    From them, transformers' attention models make the mask that keeps documents apart, where
    they are given neither an attention mask nor a cache. Recurrent layers do not look at them.
    """
    core = _core(model)
    takes_positions = "position_ids" in inspect.signature(type(core).forward).parameters
    if not takes_positions or getattr(core, "_is_stateful", False):
        raise ConfigurationError(
            f"{core.__class__.__name__} cannot keep the documents of a packed row apart: it has "
            f"{'recurrent layers' if takes_positions else 'no position_ids'}; take contiguous rows"
        )
    starts = document_starts(reset)
    return torch.arange(reset.shape[1], device=reset.device) - starts


def _core(model: nn.Module) -> nn.Module:
    """The model inside wrappers for compiling, several processes and adapters."""
    core = extract_model_from_parallel(model, keep_torch_compile=False)
    return core.get_base_model() if hasattr(core, "get_base_model") else core


def _rows(tokens: int, context_length: int, batch_size: int) -> Iterator[np.ndarray]:
    """Yields places in the text, (rows, T) each: full rows, then the shorter last row."""
    full = (tokens - 1) // context_length * context_length
    per_batch = batch_size * context_length
    for start in range(0, full, per_batch):
        yield np.arange(start, min(start + per_batch, full)).reshape(-1, context_length)
    if full < tokens - 1:
        yield np.arange(full, tokens - 1)[None]


def _take(values: np.ndarray, places: np.ndarray) -> torch.Tensor:
    taken = values[places]
    return torch.from_numpy(taken if taken.dtype == bool else taken.astype(np.int64))
