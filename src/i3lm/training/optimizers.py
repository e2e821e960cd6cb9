"""Optimizers over the parameter groups that ship with the models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from i3lm.layers import parameter_groups
from i3lm.layers.parameter_groups import MATRIX


def make_optimizer(
    name: str,
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    fused: bool,
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
    """
    groups = model_groups(model, weight_decay)
    adamw: dict[str, Any] = {"lr": learning_rate, "betas": betas, "eps": eps, "fused": fused}
    if name == "muon":
        return MuonWithAdamW(groups, learning_rate, adamw)
    return AdamW(groups, **adamw)


def model_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The groups that a model sorts its parameters into; for one that has none, the general ones.

    A model of another family may well have a rule of its own, under the same name.
    """
    if callable(own := getattr(model, "parameter_groups", None)):
        return own(weight_decay)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return parameter_groups(model, weight_decay, head=head)


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
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            # Loading a state makes new groups and a new state: the parts follow here.
            is_muon = isinstance(part, Muon)
            part.param_groups = [
                group for group in self.param_groups if (group.get("role") == MATRIX) == is_muon
            ]
            part.state = self.state
            part.step()
        return loss
