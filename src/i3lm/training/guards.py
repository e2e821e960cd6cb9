"""What watches a run for numbers that went wrong, and finds where they did."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from i3lm.layers import HybridMixer


class NonFiniteError(Exception):
    """The gradient of a step is not finite, so the step was not taken.

    Args:
        step: The step, counted from 1.
        where: Where the first number that is not finite comes from.
    """

    def __init__(self, step: int, where: str) -> None:
        super().__init__(f"step {step}: the gradient is not finite: {where}")
        self.step, self.where = step, where


ALL_FINITE = "going through the step again, every number is finite: it overflowed in their sum"


def find_non_finite(
    model: nn.Module, batches: Sequence[Any], loss_of: Callable[[Any], Tensor]
) -> str:
    """Says where the first number that is not finite comes from, by going through a step again.

    Looked at in turn: the weights; what each module gives, in the order in which they end; the
    gradients, from the loss backwards. The model's gradients are lost.

    Args:
        model: The model, not yet changed by the step.
        batches: The batches of the step.
        loss_of: Gives the loss of a batch, a scalar.
    """
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return f"the weight {name} is not finite already"
    for batch in batches:
        with _watching(model) as found, torch.no_grad():
            loss_of(batch)
        if found:
            return f"{found[0]} gives the first output that is not finite"
    for batch in batches:
        model.zero_grad()
        loss_of(batch).backward()
        for name, parameter in reversed(list(model.named_parameters())):
            gradient = parameter.grad
            if gradient is not None and gradient.is_sparse:
                gradient = gradient.coalesce().values()
            if gradient is not None and not gradient.isfinite().all():
                return f"the gradient of {name} is the first that is not finite"
    return ALL_FINITE


@contextmanager
def _watching(model: nn.Module) -> Iterator[list[str]]:
    """Gives a list that the modules whose output is not finite add their names to."""
    found: list[str] = []

    def watch(name: str, module: nn.Module) -> Any:
        title = f"{name} ({type(module).__name__})" if name else "the loss"

        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            if not all(bool(tensor.isfinite().all()) for tensor in _tensors(output)):
                found.append(title)

        return module.register_forward_hook(look)

    hooks = [watch(name, module) for name, module in model.named_modules()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _tensors(output: Any) -> Iterator[Tensor]:
    """The floating-point tensors in what a module gives."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _tensors(value)


def spectral_radius(model: nn.Module) -> float | None:
    """The largest absolute eigenvalue of a state transition A among the layers; None without any.

    Above 1 the state of such a layer grows without bound, the faster the longer the text.
    """
    matrices = [m.A.detach() for m in model.modules() if isinstance(m, HybridMixer)]
    if not matrices:
        return None
    whole = [A.full_tensor() if isinstance(A, DTensor) else A for A in matrices]
    A = torch.stack(whole).float().cpu()  # (layers, N, N)
    if not A.isfinite().all():
        return math.inf
    return float(torch.linalg.eigvals(A).abs().max())


class SpectralRadiusWatch(TrainerCallback):
    """Adds the spectral radius to every line of the log, and warns once when it passes 1.

    It comes before the callbacks that write the log.

    Args:
        report: Takes the warning.
    """

    def __init__(self, report: Callable[[str], None]) -> None:
        self.report = report
        self.warned = False

    def on_log(self, args, state, control, logs=None, model=None, **kwargs) -> None:
        """Looks at the layers that have a state transition."""
        if logs is None or "loss" not in logs or (radius := spectral_radius(model)) is None:
            return
        logs["spectral_radius"] = radius
        if radius > 1 and not self.warned:
            self.warned = True
            self.report(
                f"warning: step {state.global_step}: the spectral radius of a state transition A "
                f"is {radius:.4f}, above 1: states grow with the length of the text; lower "
                "training.learning_rate if the loss becomes unsteady"
            )
