"""Ways of computing the same thing, held against each other on one model.

Every difference is the largest one in absolute value, divided by the largest absolute value of
what it is compared with where that is above 1.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from i3lm.device import autocast
from i3lm.errors import OutputError
from i3lm.inference.quantization import is_quantized
from i3lm.inference.sessions import cache_states
from i3lm.ops.dispatch import use_implementation
from i3lm.ops.self_check import RECURRENCES

# Sums in another order differ by the rounding of the type, 6e-8 or 4e-3 of a term; through the
# layers that grows to some 1e-6 or 1e-2 of the largest logit. A state that is lost, doubled or
# mixed up shows as 1e-1 or more in random or trained models.
TOLERANCES = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 4e-3}

_LENGTH, _ROWS = 48, 3
_OP_OF = {"rwkv4": "wkv", "state_space": "state_space"}


@dataclass(frozen=True)
class Check:
    """The outcome of one comparison.

    Attributes:
        name: What was compared.
        difference: The largest difference, or None where it could not be computed.
        tolerance: What the difference may be.
        reason: Why the comparison does not apply, or how computing it failed.
        passed: Whether it holds; None where it does not apply.
    """

    name: str
    difference: float | None
    tolerance: float
    passed: bool | None
    reason: str | None = None


class _DoesNotApplyError(Exception):
    """A comparison that means nothing for this model, or cannot be made here."""


def verify_model(model: PreTrainedModel, precision: str = "fp32") -> Iterator[Check]:
    """Yields the outcome of every comparison, as it is made.

    Args:
        model: A causal language model on its device, in evaluation mode.
        precision: ``fp32``, ``bf16`` or ``fp16`` (autocast).

    Raises:
        OutputError: The copy of the model that one comparison reads back cannot be written.
    """
    bench = _Bench(model, precision)
    comparisons: dict[str, Callable[[], float]] = {
        "batch = single": bench.batch,
        "left pad = none": bench.left_pad,
        "chunked prefill = full forward": bench.chunked_prefill,
        "decode = parallel forward": bench.decode,
        "split state = whole": bench.split_state,
        "saved and read back = native": bench.read_back,
        "torch.export = native": bench.exported,
    }
    op = _OP_OF.get(getattr(model.config, "recurrence", ""))
    if op is None or set(model.config.layer_types) == {"full_attention"}:
        comparisons["kernels = reference"] = _no_recurrence
    else:
        for name in RECURRENCES[op].names:
            if name != "reference":
                comparisons[f"{op} {name} = reference"] = partial(bench.kernel, op, name)
    for title, compare in comparisons.items():
        yield _outcome(title, compare, TOLERANCES[precision])


def _outcome(name: str, compare: Callable[[], float], tolerance: float) -> Check:
    try:
        difference = compare()
    except _DoesNotApplyError as reason:
        return Check(name, None, tolerance, None, str(reason))
    except OutputError:
        raise
    except Exception as error:  # whatever a broken part raises is the finding
        return Check(name, None, tolerance, False, f"{type(error).__name__}: {_first_line(error)}")
    return Check(name, difference, tolerance, difference <= tolerance)  # false for NaN


def _no_recurrence() -> float:
    raise _DoesNotApplyError("the model has no recurrent layers")


class _Bench:
    """A model, some seeded token ids, and what one plain pass over them gives."""

    def __init__(self, model: PreTrainedModel, precision: str) -> None:
        self.model, self.precision = model, precision
        limit = getattr(model.config, "max_position_embeddings", None)
        self.length = _LENGTH if limit is None else min(_LENGTH, limit)
        draw = torch.Generator().manual_seed(0)
        shape = (_ROWS, self.length)
        ids = torch.randint(0, model.config.vocab_size, shape, generator=draw)
        self.ids = ids.to(model.device)
        self.whole = self.run(self.ids, use_cache=False).logits

    @torch.no_grad()
    def run(self, ids: Tensor, **options: Any) -> Any:
        """The model's output for ids."""
        with self._autocast():
            return self.model(input_ids=ids, **options)

    def _autocast(self) -> AbstractContextManager[None]:
        return autocast(self.ids.device, self.precision)

    def batch(self) -> float:
        """Rows together against each row alone."""
        alone = [self.run(row.unsqueeze(0), use_cache=False).logits for row in self.ids]
        return _difference(self.whole, torch.cat(alone))

    def left_pad(self) -> float:
        """Rows that are padded on the left, read and then continued, against each row alone."""
        T = self.length
        if T < 3:
            raise _DoesNotApplyError(f"the context of {T} leaves no room for padding")
        # Full, half empty, and a single token; the last column continues all of them.
        starts = torch.tensor([[0], [T // 2], [T - 2]], device=self.ids.device)
        mask = (torch.arange(T, device=self.ids.device) >= starts).long()
        ids = torch.where(mask.bool(), self.ids, 0)
        places = (mask.cumsum(dim=1) - 1).clamp_min(0)
        first = self.run(
            ids[:, :-1], attention_mask=mask[:, :-1], position_ids=places[:, :-1], use_cache=True
        )
        last = self.run(
            ids[:, -1:],
            attention_mask=mask,
            position_ids=places[:, -1:],
            cache=first.cache,
            use_cache=True,
        )
        logits = torch.cat([first.logits, last.logits], dim=1)
        worst = 0.0
        for row, start in enumerate(starts.flatten().tolist()):
            alone = self.run(self.ids[row : row + 1, start:], use_cache=False).logits
            worst = _worse(worst, _difference(logits[row : row + 1, start:], alone))
        return worst

    def chunked_prefill(self) -> float:
        """Pieces of unequal length through the cache against one pass."""
        return _difference(self._in_pieces([1, 2, 7, 16])[0], self.whole)

    def decode(self) -> float:
        """One token at a time through the cache against one pass."""
        return _difference(self._in_pieces([1])[0], self.whole)

    def split_state(self) -> float:
        """States, keys and values after two halves and after single tokens, against one pass."""
        expected = cache_states(self.run(self.ids, use_cache=True).cache)
        if not expected:
            raise _DoesNotApplyError("the model keeps no state")
        worst = 0.0
        for sizes in ([self.length // 2 or 1], [1]):
            states = cache_states(self._in_pieces(sizes)[1])
            if states.keys() != expected.keys():
                raise ValueError(f"states {sorted(states)} in place of {sorted(expected)}")
            for name, state in expected.items():
                worst = _worse(worst, _difference(states[name], state))
        return worst

    def read_back(self) -> float:
        """What `from_pretrained` makes of what `save_pretrained` wrote, against the model."""
        if is_quantized(self.model.config):
            raise _DoesNotApplyError("transformers cannot save a model that it read quantised")
        with tempfile.TemporaryDirectory() as folder:
            try:
                self.model.save_pretrained(folder)
            except (OSError, SafetensorError) as error:
                raise OutputError(
                    f"{folder}: a copy of the model cannot be written ({_first_line(error)}): set "
                    "TMPDIR to a place with room for it"
                ) from error
            copy = AutoModelForCausalLM.from_pretrained(folder).to(self.model.device).eval()
        return _difference(_Bench(copy, self.precision).whole, self.whole)

    def exported(self) -> float:
        """The program that torch.export makes of the forward pass, against the model."""
        try:
            with torch.no_grad(), self._autocast():
                program = torch.export.export(_LogitsOnly(self.model), (self.ids,), strict=False)
        except Exception as error:  # it refuses models in many ways
            raise _DoesNotApplyError(f"torch.export refuses: {_first_line(error)}") from error
        with torch.no_grad(), self._autocast():
            return _difference(program.module()(self.ids), self.whole)

    def kernel(self, op: str, name: str) -> float:
        """The model with one implementation of its recurrence, against the reference."""
        dtype = torch.float32
        refusal = RECURRENCES[op].named(name).refuses(self.ids.device, dtype)
        if refusal is not None:
            raise _DoesNotApplyError(refusal)
        results = []
        for implementation in (name, "reference"):
            with use_implementation(**{op: implementation}):
                results.append(self.run(self.ids, use_cache=False).logits)
        return _difference(*results)

    def _in_pieces(self, sizes: list[int]) -> tuple[Tensor, Any]:
        """Logits and cache after reading the ids in pieces; the last size is repeated."""
        logits: list[Tensor] = []
        cache, start = None, 0
        while start < self.length:
            size = sizes[min(len(logits), len(sizes) - 1)]
            piece = self.ids[:, start : start + size]
            output = self.run(piece, cache=cache, use_cache=True)
            logits.append(output.logits)
            cache, start = output.cache, start + size
        return torch.cat(logits, dim=1), cache


class _LogitsOnly(torch.nn.Module):
    """A model as a function from ids to logits."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False).logits


def _difference(got: Tensor, expected: Tensor) -> float:
    """The largest difference, relative where the expected values are large."""
    if got.shape != expected.shape:
        raise ValueError(f"shape {tuple(got.shape)} in place of {tuple(expected.shape)}")
    got, expected = got.double(), expected.double()
    return float((got - expected).abs().max() / expected.abs().max().clamp_min(1))


def _worse(one: float, other: float) -> float:
    """The larger of two differences; NaN is the largest."""
    return other if not one >= other else one


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return " ".join(lines[0].split())[:200] if lines else type(error).__name__
