"""Which parameters of a model are matrices, as optimizers ask before they decay or turn one."""

from __future__ import annotations

from typing import Any

from torch import nn

# What a group is made of, under its key "role".
MATRIX, HEAD, OTHER = "matrix", "head", "other"


def parameter_groups(
    model: nn.Module, weight_decay: float, head: nn.Module | None = None
) -> list[dict[str, Any]]:
    """Sorts the trainable parameters into groups for a PyTorch optimizer, by their ``role``.

    - ``matrix`` maps one space of the network to another. It decays, and its update may be made
      orthogonal, as Muon does.
    - ``head`` maps to the vocabulary. It decays; but its rows are one per token, so an orthogonal
      update would move rare tokens as far as common ones.
    - ``other`` is all the rest: norms, biases, embeddings (a tied head is one), token shifts, decay
      rates, bonuses, and the state transition A, whose size sets how long a state remembers.
      Pulling any of these towards zero means nothing good, so they do not decay.

    A layer whose matrices are not called ``weight`` names them in its attribute ``matrices``.

    Args:
        model: A model, or a model in parts that others wrapped or added to.
        weight_decay: The decay of matrices and of the head.
        head: The module that gives the logits, if there is one.

    Returns:
        The groups that are not empty, in that order; every trainable parameter is in one.
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    of_head = {id(p) for p in head.parameters()} if head is not None else set()
    matrices = {id(p) for module in model.modules() for p in _matrices(module)} - tables
    roles: dict[str, list[nn.Parameter]] = {MATRIX: [], HEAD: [], OTHER: []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            role = OTHER
            if id(parameter) in matrices:
                role = HEAD if id(parameter) in of_head else MATRIX
            roles[role].append(parameter)
    return [
        {"params": params, "role": role, "weight_decay": 0.0 if role == OTHER else weight_decay}
        for role, params in roles.items()
        if params
    ]


def _matrices(module: nn.Module) -> list[nn.Parameter]:
    """A module's own parameters that are matrices; of most, a ``weight`` of two dimensions."""
    names = getattr(module, "matrices", ("weight",))
    found = [getattr(module, name, None) for name in names]
    return [p for p in found if isinstance(p, nn.Parameter) and p.dim() == 2]
