"""The norm of a model's gradients, and a step of AdamW, over all tensors at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from i3lm.ops.adamw.float8 import records_of
from i3lm.ops.adamw.reference import adamw_step_reference, gradient_norm_reference
from i3lm.ops.dispatch import Implementation, Op, numba_refuses


class AdamWSettings(NamedTuple):
    """What a step of AdamW does with one tensor.

    Attributes:
        learning_rate: The learning rate of this step.
        betas: Decay rates of the averages of gradient and squared gradient.
        eps: What keeps the quotient finite.
        weight_decay: The decay, in units of the learning rate.
        step: The number of this step, from 1.
    """

    learning_rate: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    step: int


def _refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype != torch.float32:
        return f"serves float32, not {dtype}"
    return numba_refuses(device, dtype)


def _norm_numba(gradients: Sequence[Tensor]) -> float:
    from i3lm.ops.adamw.numba import gradient_norm_numba

    return gradient_norm_numba(gradients)


def _step_numba(*inputs: Any) -> None:
    from i3lm.ops.adamw.numba import adamw_step_numba

    adamw_step_numba(*inputs)


GRADIENT_NORM = Op(
    "gradient_norm",
    [
        Implementation("numba", _norm_numba, refuses=_refuses),
        Implementation("reference", gradient_norm_reference),
    ],
)
ADAMW_STEP = Op(
    "adamw_step",
    [
        Implementation("numba", _step_numba, refuses=_refuses),
        Implementation("reference", adamw_step_reference),
    ],
)


def gradient_norm(gradients: Sequence[Tensor]) -> float:
    """Gives the 2-norm of all gradients together, summed in float64.

    Args:
        gradients: Tensors of any shapes on one device, float32 and bfloat16 mixed, or float64;
            sparse ones are those that `adamw_step` takes.
    """
    if not gradients:
        return 0.0
    gradients = [add_up_rows(x).values() if x.is_sparse else x for x in gradients]
    return _implementation(GRADIENT_NORM, gradients[0]).forward(gradients)


def add_up_rows(gradient: Tensor) -> Tensor:
    """Gives a sparse gradient in which no row comes twice, summed as the dense one would be.

    `Tensor.coalesce` adds up the rows of an id in any order; the dense gradient of an embedding
    has them in the order of the batch, and here its own kernel adds them.

    Args:
        gradient: A matrix that is sparse in its rows, as `torch.nn.Embedding` gives it.
    """
    if gradient.is_coalesced():
        return gradient
    ids, places = gradient._indices()[0].unique(return_inverse=True)
    rows = torch.ops.aten.embedding_dense_backward(gradient._values(), places, len(ids), -1, False)
    return torch.sparse_coo_tensor(
        ids[None], rows, gradient.shape, is_coalesced=True, check_invariants=True
    )


def adamw_step(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    averages: Sequence[Tensor],
    squares: Sequence[Tensor],
    settings: Sequence[AdamWSettings],
    *,
    scale: float = 1.0,
) -> None:
    """Takes a step of AdamW (arXiv:1711.05101, algorithm 2) in place.

    With ``g = scale * gradient``::

        m = m + (1 - beta1) (g - m)
        v = beta2 v + (1 - beta2) g^2
        p = (1 - lr decay) p - lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)

    which is what `torch.optim.AdamW` computes. On a CPU, all tensors are one launch and memory is
    passed over once.

    Averages in bfloat16 take half the memory. Rounded to the nearest, v would stand still where a
    step changes it by less than half of its last bit, so each number is rounded up or down at
    random, by as much as it is nearer to either (arXiv:1502.02551, section 3): right on average.
    The random bits are a hash of place and step: the same step gives the same bits anywhere. In
    uint8 they are records of `i3lm.ops.adamw.float8`, a quarter of the memory.

    Args:
        parameters: The tensors p, contiguous, float32 or float64.
        gradients: Their gradients, of the same shapes, in the parameter's dtype or bfloat16. A
            sparse one, as `torch.nn.Embedding` gives it, is zero in the rows that it leaves out.
        averages: The averages m, of the same shapes, in the parameter's dtype or all in bfloat16;
            or all in uint8, of the shapes that `average_shape` gives.
        squares: The averages v, likewise.
        settings: Rates and number of the step, one for each parameter.
        scale: What the gradients are multiplied by, as to clip their norm.

    Raises:
        ValueError: Tensors that do not fit together.
    """
    if not parameters:
        return
    _check(parameters, gradients=gradients, averages=averages, squares=squares, settings=settings)
    gradients = [add_up_rows(x) if x.is_sparse else x for x in gradients]
    implementation = _implementation(ADAMW_STEP, parameters[0])
    implementation.forward(parameters, gradients, averages, squares, settings, scale)


def average_shape(parameter: Tensor, dtype: torch.dtype) -> torch.Size:
    """Gives the shape of an average of a parameter that is kept in a dtype; see `adamw_step`."""
    if dtype == torch.uint8:
        return torch.Size(records_of(parameter.numel()))
    return parameter.shape


def _check(parameters: Sequence[Tensor], **groups: Sequence[Any]) -> None:
    for name, group in groups.items():
        if len(group) != len(parameters):
            raise ValueError(
                f"{name} ({len(group)}) must be as many as the parameters ({len(parameters)})"
            )
        for i, (p, x) in enumerate(zip(parameters, group, strict=True)):
            if name == "settings":
                continue
            if name == "gradients" and x.shape != p.shape:
                raise ValueError(
                    f"{name}[{i}] ({tuple(x.shape)}) must have its parameter's shape "
                    f"{tuple(p.shape)}"
                )
            if name != "gradients" and x.shape != (shape := average_shape(p, x.dtype)):
                raise ValueError(
                    f"{name}[{i}] ({tuple(x.shape)}, {x.dtype}) must have shape {tuple(shape)} for "
                    f"a parameter of shape {tuple(p.shape)}"
                )
    for i, x in enumerate(groups["gradients"]):
        if x.is_sparse and (x.sparse_dim(), x.dense_dim()) != (1, 1):
            raise ValueError(
                f"gradients[{i}] must be a matrix that is sparse in its rows, not one of "
                f"{x.sparse_dim()} sparse and {x.dense_dim()} dense dimensions"
            )


def _implementation(op: Op, tensor: Tensor) -> Implementation:
    # A gradient in bfloat16 is read as float32.
    dtype = torch.float32 if tensor.dtype == torch.bfloat16 else tensor.dtype
    return op.choose(tensor.device, dtype).implementation
