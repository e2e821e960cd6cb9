"""The kernels as a step of decoding calls them: with a table that says where everything lies.

It has one record for each kernel that is to run. Handing numba the hundreds of arrays of a model
anew for every token would take as long as a small model computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from i3lm.ops.decoding_step import numba as halves
from i3lm.ops.decoding_step.reference import EPSILON
from i3lm.ops.linear.numba import multiplication
from i3lm.ops.numba_bridge import address_of, match_threads
from i3lm.ops.numba_team import make_team, work_together

__all__ = ["Table", "half", "record_of"]


def record_of(
    name: str,
    epsilon: float,
    width: int,
    norm: Sequence[Tensor] = (),
    vectors: Sequence[Tensor] = (),
    weights: Sequence[Tensor] = (),
    scales: Sequence[Tensor | None] = (),
    biases: Sequence[Tensor | None] = (),
) -> Any:
    """Gives a kernel's record, but for its states.

    Args:
        name: The kernel's name.
        epsilon: Of the LayerNorm.
        width: The width of the middle or the state, or the number of heads.
        norm: Weight and bias of the LayerNorm.
        vectors: The kernel's vectors or tables, in its order; as all tensors here contiguous, and
            where they are as long as the record is used.
        weights: Its matrices, in its order, of one dtype.
        scales: For each matrix a factor per output or None; or nothing.
        biases: For each matrix a summand per output or None; or nothing.
    """
    record = np.zeros((), halves.STEP)
    record["epsilon"], record["width"] = epsilon, width
    record["kernel"] = address_of(halves.KERNELS[name])
    if name == "attention":
        record["attend"] = address_of(halves.attend)
    if weights:
        record["multiply"] = multiplication(weights[0].dtype)
    for field, tensors in (("norm", norm), ("vectors", vectors)):
        record[field][: len(tensors)] = _addresses(tensors)
    for m, weight in enumerate(weights):
        parts = weight, scales[m] if scales else None, biases[m] if biases else None
        record["products"][m, :5] = *_addresses(parts), *weight.shape
    return record


class Table:
    """The records of kernels that follow each other, with their states, and memory to work in.

    It runs in one thread of Python at a time.

    Attributes:
        records: The records.
        places: The four ``states`` of each, its ``room`` and its ``count``, to be written at once.

    Args:
        records: The records, which are copied.
        R: Rows of the inputs.
        C: Channels.
    """

    def __init__(self, records: Sequence[Any], R: int, C: int) -> None:
        self.records = np.array(records, halves.STEP)
        self.places = self.records.view(np.int64).reshape(len(records), -1)[:, -6:]
        self.R, self.C = R, C
        widths = self.records["width"]
        self.work = torch.empty(halves.floats_needed(R, C, int(widths.max(initial=0))))
        self._arguments = np.array([R, C, 0, 0, 0, self.work.data_ptr()], np.int64)
        self._team = make_team()
        arrays = self.records, self._arguments, self._team
        self._arrays_at = [array.__array_interface__["data"][0] for array in arrays]

    def run(self, x: Tensor, first: int, count: int) -> None:
        """Replaces x by what kernels make of it, and their states by those after it.

        Args:
            x: Inputs, float32, shape (R, C) or (R, 1, C), contiguous.
            first: The number of the first record.
            count: How many of them.

        Raises:
            RuntimeError: A kernel failed.
        """
        records, arguments, team = self._arrays_at
        self._arguments[2:5] = x.data_ptr(), records + first * halves.STEP.itemsize, count
        done = work_together(address_of(halves.run), arguments, team, match_threads())
        if done < count:
            raise RuntimeError(
                f"kernel {first + done} of a decoding step failed; its error stands above."
                " i3lm.ops.dispatch.use_implementation(decoding_step='modules') does without"
            )


def half(
    name: str,
    x: Tensor,
    norm: list[Tensor],
    vectors: list[Tensor],
    weights: list[Tensor],
    states: list[Tensor],
) -> list[Tensor]:
    """What `reference.half` gives, by a kernel; for checks."""
    output, *states = [tensor.clone() for tensor in (x, *states)]
    attends = name == "attention"
    width = states[0].shape[1] if attends else (*weights, *vectors[1:])[0].shape[0]
    table = Table([record_of(name, EPSILON, width, norm, vectors, weights)], *output.shape)
    table.records["states"][0, : len(states)] = _addresses(states)
    if attends:
        table.records["room"] = table.records["count"] = states[0].shape[2]
    table.run(output, 0, 1)
    return [output, *states]


def _addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
