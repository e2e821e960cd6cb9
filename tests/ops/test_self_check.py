from __future__ import annotations

import pytest
import torch
from torch import Tensor

from i3lm.ops.decoding_step import reference
from i3lm.ops.dispatch import Implementation
from i3lm.ops.self_check import CHECKS, largest_difference

HERE = [
    (name, implementation.name)
    for name, check in CHECKS.items()
    for implementation in check.op.implementations
    if implementation.refuses(torch.device("cpu"), check.dtype) is None
]


@pytest.mark.parametrize(("op", "name"), HERE)
def test_every_implementation_here_agrees(op: str, name: str):
    assert largest_difference(op, name) <= CHECKS[op].tolerance


class _WrongKernels:
    """Stands for kernels of a decoding step that go slightly wrong."""

    @staticmethod
    def half(*inputs):
        return slightly_wrong(reference.half(*inputs), inputs)


def slightly_wrong(results, inputs):
    if results is None and not inputs:
        return _WrongKernels
    if results is None:  # what was given has changed
        return inputs[0][0].mul_(1.1)
    if isinstance(results, Tensor | float):
        return results * 1.1
    return (results[0] * 1.1, *results[1:])


@pytest.mark.parametrize("op", CHECKS)
def test_a_wrong_implementation_is_found(op: str, monkeypatch: pytest.MonkeyPatch):
    check = CHECKS[op]
    right = check.op.implementations[-1]
    wrong = Implementation("wrong", lambda *inputs: slightly_wrong(right.forward(*inputs), inputs))
    monkeypatch.setattr(check.op, "implementations", [wrong, *check.op.implementations])
    assert largest_difference(op, "wrong") > check.tolerance
