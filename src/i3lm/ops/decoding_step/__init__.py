"""A step of decoding on a CPU: the halves of a layer for one new token, each as one kernel.

What a kernel computes is defined by the modules it stands for; `reference` has the same as short
equations, for checks by `i3lm.ops.self_check`. The implementations of this op differ in who
computes a step, not in what it is: ``numba`` gives the kernels, ``modules`` gives None, and the
caller runs its modules.
"""

from __future__ import annotations

from types import ModuleType

import torch

from i3lm.ops.dispatch import Implementation, Op, numba_refuses
from i3lm.ops.linear import FEW_ROWS, LINEAR_OF_FEW_ROWS
from i3lm.ops.state_space import STATE_SPACE
from i3lm.ops.wkv import WKV

__all__ = ["DECODING_STEP", "FEW_ROWS", "decoding_kernels"]


def _numba() -> ModuleType:
    from i3lm.ops.decoding_step import numba_table

    return numba_table


def _modules() -> None:
    return None


def _numba_refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype != torch.float32:
        return f"computes in float32, not in {dtype}"
    refusal = numba_refuses(device, dtype)
    if refusal is not None:
        return refusal
    # Whoever asks for another kernel of what is computed here shall get it.
    for op in (LINEAR_OF_FEW_ROWS, WKV, STATE_SPACE):
        if op.override not in (None, "numba"):
            return f"{op.name} is asked to run as {op.override}"
    return None


DECODING_STEP = Op(
    "decoding_step",
    [
        Implementation("numba", _numba, refuses=_numba_refuses),
        Implementation("modules", _modules),
    ],
)


def decoding_kernels(x: torch.Tensor, dtype: torch.dtype) -> ModuleType | None:
    """Gives the kernels for a step, or None where the modules are to be called one by one.

    Args:
        x: Ids or inputs of the first layer, shape (B, T, ...).
        dtype: Of these inputs.

    Returns:
        The kernels, for one new token of each of at most `FEW_ROWS` sequences on a CPU, outside
        gradients, compilers and autocast; or None.
    """
    if (
        x.device.type != "cpu"
        or x.shape[1] != 1
        or not 1 <= x.shape[0] <= FEW_ROWS
        or type(x) is not torch.Tensor
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch.is_autocast_enabled("cpu")
    ):
        return None
    kernels: ModuleType | None = DECODING_STEP.choose(x.device, dtype).implementation.forward()
    return kernels
