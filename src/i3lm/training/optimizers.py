"""Optimizers over the parameter groups that ship with the models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from i3lm.errors import ConfigurationError
from i3lm.layers import Linear, parameter_groups
from i3lm.layers.parameter_groups import MATRIX
from i3lm.ops.adamw import (
    ADAMW_STEP,
    AdamWSettings,
    adamw_step,
    add_up_rows,
    average_shape,
    gradient_norm,
)
from i3lm.ops.adamw.float8 import NEAREST, decode, encode, records_of

# What averages are kept in; of 8 bits are the records of `i3lm.ops.adamw.float8`.
STATE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.uint8}


def make_optimizer(
    name: str,
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    fused: bool,
    state: str = "fp32",
) -> Optimizer:
    """Gives the optimizer of a model's trainable parameters.

    Args:
        name: ``adamw``, or ``muon`` for `MuonWithAdamW`.
        model: A model; if it has a method ``parameter_groups``, that method sorts them.
        learning_rate: The rate of all groups.
        weight_decay: The decay of the groups that decay.
        betas: AdamW's.
        eps: AdamW's.
        fused: Whether AdamW computes a step in one kernel.
        state: What AdamW keeps its averages in: ``fp32``, or ``bf16`` or ``fp8`` for a half or a
            quarter of the memory.

    Raises:
        ConfigurationError: `state` is not ``fp32`` where `OnePassAdamW` does not serve.
    """
    groups = model_groups(model, weight_decay)
    adamw: dict[str, Any] = {"lr": learning_rate, "betas": betas, "eps": eps, "fused": fused}
    if name == "muon":
        return MuonWithAdamW(groups, learning_rate, adamw)
    if _suit_one_pass([parameter for group in groups for parameter in group["params"]]):
        return OnePassAdamW(groups, STATE_DTYPES[state], lr=learning_rate, betas=betas, eps=eps)
    if state != "fp32":
        raise ConfigurationError(
            f"training.optimizer_state ({state}) is for weights in float32 on a CPU, where numba "
            "works (see i3lm doctor): choose fp32"
        )
    plain = AdamW(groups, **adamw)
    plain.register_load_state_dict_pre_hook(_widen_records)
    return plain


def _widen_records(optimizer: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    """The saved state of an `OnePassAdamW` as other optimizers know it."""
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    states = dict(saved["state"])
    for number, parameter in zip(numbers, parameters, strict=False):  # PyTorch compares them itself
        state = states[number] = dict(states.get(number, {}))
        for name, signed in OnePassAdamW.AVERAGES.items():
            if name in state and state[name].dtype == torch.uint8:
                state[name] = decode(state[name], signed, parameter.shape)
    return {**saved, "state": {number: state for number, state in states.items() if state}}


def _suit_one_pass(parameters: list[Tensor]) -> bool:
    """Whether a kernel of `adamw_step` serves these parameters."""
    plain = all(type(p) is nn.Parameter and p.is_contiguous() for p in parameters)
    kinds = {(p.device, p.dtype) for p in parameters}
    return plain and all(
        ADAMW_STEP.choose(*kind).implementation.name != "reference" for kind in kinds
    )


def model_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The groups that a model sorts its parameters into; for one that has none, the general ones.

    A model of another family may well have a rule of its own, under the same name.
    """
    if callable(own := getattr(model, "parameter_groups", None)):
        return own(weight_decay)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return parameter_groups(model, weight_decay, head=head)


def _loss_of(closure: Callable[[], Tensor] | None) -> Tensor | None:
    """What the closure that an optimizer's step may be given computes, with gradients."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def leave_gradients_small(model: nn.Module) -> None:
    """Lets gradients stay in the form in which they are computed, for `OnePassAdamW`.

    Those of matrices are bfloat16 under autocast, and turning them into float32 adds nothing but
    memory and time. That of a token embedding has rows for the ids of the batch, and the zeros of
    all others need not be written. For steps of one backward pass alone: sums of gradients need
    float32, and have many rows. A matrix that serves in several places is left as it is.
    """
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for module in model.modules():
        if isinstance(module, Linear) and uses[id(module.weight)] == 1:
            module.weight.grad_dtype = None
        elif type(module) is nn.Embedding and uses[id(module.weight)] == 1:
            module.sparse = not module.scale_grad_by_freq  # PyTorch knows not both


class OnePassAdamW(AdamW):
    """`torch.optim.AdamW` by `i3lm.ops.adamw_step`, with gradient clipping in the same pass.

    State and settings are those of `torch.optim.AdamW`, so checkpoints of one serve the other, if
    averages are not kept in 8 bits.
    Sparse gradients are taken for what they are, zero in the rows that they leave out: the step is
    that of dense ones.

    Args:
        groups: Parameter groups.
        state_dtype: What the averages are kept in: float32, bfloat16, or uint8 for records of
            8-bit floats, which what `make_optimizer` gives elsewhere can load.
        settings: As for `torch.optim.AdamW`.
    """

    # And whether they have a sign.
    AVERAGES: ClassVar = {"exp_avg": True, "exp_avg_sq": False}

    def __init__(
        self,
        groups: list[dict[str, Any]],
        state_dtype: torch.dtype = torch.float32,
        **settings: Any,
    ) -> None:
        super().__init__(groups, **settings)
        self.state_dtype = state_dtype
        self._scale = 1.0
        self._make_averages()

    def __getstate__(self) -> dict[str, Any]:
        kept = {"state_dtype": self.state_dtype, "_scale": self._scale}
        return {**super().__getstate__(), **kept}

    def gradient_norm(self) -> Tensor:
        """The 2-norm of all gradients, a float32 scalar."""
        return torch.tensor(gradient_norm([gradient for _, gradient, _ in self._with_gradients()]))

    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """Makes the next step one whose gradients have at most this norm; they stay as they are.

        Args:
            max_norm: The largest norm, more than 0.

        Returns:
            The norm now, a float32 scalar.
        """
        norm = self.gradient_norm()
        # As torch.nn.utils.clip_grad_norm_ does.
        self._scale = min(1.0, max_norm / (norm.item() + 1e-6))
        return norm

    # torch declares one overload for each kind of closure; this takes both.
    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """Takes one step."""
        loss = _loss_of(closure)
        self._make_averages()  # of groups that were added, or that a loaded state lacks
        moved = self._with_gradients()
        if not moved:
            return loss
        states = [self.state[p] for p, _, _ in moved]
        torch._foreach_add_([state["step"] for state in states], 1)
        adamw_step(
            [p for p, _, _ in moved],
            [gradient for _, gradient, _ in moved],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [
                AdamWSettings(
                    float(group["lr"]),
                    group["betas"],
                    group["eps"],
                    group["weight_decay"],
                    int(state["step"]),
                )
                for (_, _, group), state in zip(moved, states, strict=True)
            ],
            scale=self._scale,
        )
        self._scale = 1.0
        return loss

    def _with_gradients(self) -> list[tuple[Tensor, Tensor, dict[str, Any]]]:
        """The parameters that have a gradient, each with it and with its group."""
        found = []
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if parameter.grad.is_sparse:  # its rows are added up once for norm and step
                    parameter.grad = add_up_rows(parameter.grad)
                found.append((parameter, parameter.grad, group))
        return found

    def _make_averages(self) -> None:
        """Makes all averages that there are not yet, in one block of memory for each kind.

        That is before the first step. Made one by one behind its backward pass, they would lie
        between what that leaves free, and no large block would fit there again.
        """
        every = (p for group in self.param_groups for p in group["params"])
        parameters = [p for p in every if not self.state.get(p)]
        if not parameters:
            return
        shapes = [average_shape(p, self.state_dtype) for p in parameters]
        line = 64  # numbers, so that each begins at a line of the cache
        sizes = [-(-shape.numel() // line) * line for shape in shapes]
        blocks = [torch.zeros(sum(sizes), dtype=self.state_dtype) for _ in self.AVERAGES]
        parts = zip(*(block.split(sizes) for block in blocks), strict=True)
        for parameter, shape, pair in zip(parameters, shapes, parts, strict=True):
            state = self.state[parameter]
            state["step"] = torch.tensor(0.0)
            for name, part in zip(self.AVERAGES, pair, strict=True):
                state[name] = part[: shape.numel()].view(shape)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the state of another; its averages become `state_dtype`."""
        super().load_state_dict(state_dict)  # which makes all of it the parameters' dtype
        for parameter, state in self.state.items():
            for name, signed in self.AVERAGES.items():
                state[name] = self._taken(state[name], parameter.shape, signed)

    def _taken(self, average: Tensor, shape: torch.Size, signed: bool) -> Tensor:
        """An average of any dtype as this optimizer keeps it, of a parameter of a shape."""
        # Records are longer than what is in them, so the shape tells.
        is_records = average.shape == records_of(shape.numel())
        if not is_records and average.shape != shape:
            raise ValueError(
                f"an average of shape {tuple(average.shape)} is not that of a parameter of shape "
                f"{tuple(shape)}"
            )
        if is_records and self.state_dtype != torch.uint8:
            average = decode(average, signed, shape)
        elif not is_records and self.state_dtype == torch.uint8:
            return encode(average, signed, torch.full((average.numel(),), NEAREST))
        return average.to(self.state_dtype)


class MuonWithAdamW(Optimizer):
    """Muon for the groups whose role is ``matrix``, AdamW for the others, as one optimizer.

    Muon (Jordan et al., 2024) replaces the update of a matrix by the nearest orthogonal one. That
    is for matrices between hidden spaces; embeddings and head have a row per token, and the state
    transition A is applied to its own output, so they stay with AdamW. Updates are scaled to the
    size that AdamW's usually have (arXiv:2502.16982, section 2.2), so one learning rate and one
    weight decay serve both parts.

    Groups, state and schedule are those of one ordinary optimizer: the two parts only do the
    steps, each on its share.

    Args:
        groups: Parameter groups with a ``role`` each.
        learning_rate: The rate of all groups.
        adamw: The other settings of AdamW.
    """

    def __init__(
        self, groups: list[dict[str, Any]], learning_rate: float, adamw: dict[str, Any]
    ) -> None:
        matrices = [group for group in groups if group.get("role") == MATRIX]
        others = [group for group in groups if group.get("role") != MATRIX]
        self._parts: list[Optimizer] = []
        if matrices:
            muon = Muon(matrices, lr=learning_rate, adjust_lr_fn="match_rms_adamw")
            self._parts.append(muon)
        if others:
            self._parts.append(AdamW(others, **{**adamw, "lr": learning_rate}))
        filled = [group for part in self._parts for group in part.param_groups]
        super().__init__(filled, {"lr": learning_rate})

    # torch declares one overload for each kind of closure; this takes both.
    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """Takes one step of both parts."""
        loss = _loss_of(closure)
        for part in self._parts:
            # Loading a state makes new groups and a new state: the parts follow here.
            is_muon = isinstance(part, Muon)
            part.param_groups = [
                group for group in self.param_groups if (group.get("role") == MATRIX) == is_muon
            ]
            part.state = self.state
            part.step()
        return loss
