"""The recurrences as ops of PyTorch, so that a traced model holds each as one node."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from i3lm.ops.dispatch import Op, full_precision

Registered = Callable[..., tuple[Tensor, Tensor]]


def register_recurrence(op: Op, inputs: Sequence[str]) -> Registered:
    """Registers ``i3lm::NAME`` and ``i3lm::NAME_backward``.

    The op takes the inputs, then reset and mask (or None) and the name of an implementation; it
    gives the output, shaped as the first input, and the final state, shaped as the last. The
    gradients of all inputs come from the implementation's own backward pass.

    Args:
        op: The op. Implementations without a backward pass never come here.
        inputs: Names of the differentiable inputs, the sequence first and the state last.
    """
    tensors = ", ".join(f"Tensor {name}" for name in inputs)
    rest = "Tensor? reset, Tensor? mask, str implementation"
    count = len(inputs)

    @torch.library.custom_op(
        f"i3lm::{op.name}", mutates_args=(), schema=f"({tensors}, {rest}) -> (Tensor, Tensor)"
    )
    def forward(*given: Any) -> tuple[Tensor, Tensor]:
        *values, name = given
        output, final = op.named(name).forward(*values)
        return output, final

    @forward.register_fake
    def _(*given: Any) -> tuple[Tensor, Tensor]:
        sequence, state = given[0], given[count - 1]
        return sequence.new_empty(sequence.shape), state.new_empty(state.shape)

    @torch.library.custom_op(
        f"i3lm::{op.name}_backward",
        mutates_args=(),
        schema=f"(Tensor grad_output, Tensor grad_state, {tensors}, {rest}) -> "
        f"({', '.join(['Tensor'] * count)})",
    )
    def backward(*given: Any) -> tuple[Tensor, ...]:
        *values, name = given
        differentiate = op.named(name).backward
        assert differentiate is not None
        return tuple(differentiate(*values))

    @backward.register_fake
    def _(*given: Any) -> tuple[Tensor, ...]:
        return tuple(tensor.new_empty(tensor.shape) for tensor in given[2 : 2 + count])

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *values, ctx.implementation = inputs
        ctx.save_for_backward(*values)

    def gradients(ctx: Any, grad_output: Tensor, grad_state: Tensor) -> tuple[Any, ...]:
        with full_precision(grad_output.device):  # a backward pass may run inside autocast too
            found = backward(grad_output, grad_state, *ctx.saved_tensors, ctx.implementation)
        return (*found, None, None, None)

    forward.register_autograd(gradients, setup_context=save)
    return forward
