from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from i3lm.ops.decoding_step import reference
from i3lm.ops.dispatch import Implementation
from i3lm.ops.self_check import CHECKS, largest_difference
from i3lm.ops.wkv import WKV

HERE = [
    (name, implementation.name)
    for name, check in CHECKS.items()
    for implementation in check.op.implementations
    if implementation.refuses(torch.device("cpu"), check.dtype) is None
]


@pytest.mark.parametrize(("op", "name"), HERE)
def test_every_implementation_here_agrees(op: str, name: str):
    assert largest_difference(op, name) <= CHECKS[op].tolerance


def spoilt(factor: float, results, inputs):
    """What an implementation gives, times a factor."""
    if results is None and not inputs:  # kernels of a decoding step

        class SpoiltKernels:
            @staticmethod
            def half(*inputs):
                return spoilt(factor, reference.half(*inputs), inputs)

        return SpoiltKernels
    if results is None:  # what was given has changed
        return inputs[0][0].mul_(factor)
    if isinstance(results, Tensor | float):
        return results * factor
    return (results[0] * factor, *results[1:])


@pytest.mark.parametrize("factor", [1.1, math.nan])
@pytest.mark.parametrize("op", CHECKS)
def test_a_wrong_implementation_is_found(op: str, factor: float, monkeypatch: pytest.MonkeyPatch):
    check = CHECKS[op]
    right = check.op.implementations[-1]
    wrong = Implementation("wrong", lambda *inputs: spoilt(factor, right.forward(*inputs), inputs))
    monkeypatch.setattr(check.op, "implementations", [wrong, *check.op.implementations])
    assert largest_difference(op, "wrong") > check.tolerance


@pytest.mark.parametrize("place", range(4))  # the state is none of the inputs
def test_gradients_of_nan_are_found(place: int, monkeypatch: pytest.MonkeyPatch):
    right = WKV.named("scan")

    def backward(*inputs):
        gradients = list(right.backward(*inputs))
        gradients[place] = gradients[place] * math.nan
        return tuple(gradients)

    wrong = Implementation("wrong", right.forward, backward)
    monkeypatch.setattr(WKV, "implementations", [wrong, *WKV.implementations])
    assert largest_difference("wkv", "wrong") == math.inf
