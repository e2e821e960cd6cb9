"""Weights, gradients and optimizer states in shards, one per process (FSDP2).

What is saved is whole, in the form that a run in one process gives it: a checkpoint can be resumed
by any number of processes, sharded or not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from i3lm.processes import is_first, process_rank


def shard_model(model: PreTrainedModel, device: torch.device) -> None:
    """Leaves each process one part of every weight; the weights must be the same in all of them.

    The weights of a layer come together while the layer computes, those outside of the layers
    while the model does.

    Args:
        model: The model, changed in place. It then loads whole weights, and gives DTensors.
        device: The kind of device that the weights are on.
    """
    mesh = init_device_mesh(device.type, (process_rank()[1],))
    layers = set(model._no_split_modules or ())
    for module in model.modules():
        if type(module).__name__ in layers:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.register_load_state_dict_pre_hook(_shard_weights)


def _shard_weights(model: nn.Module, state: dict[str, Any], *_: Any) -> None:
    """Cuts whole weights into shards, before the model loads them."""
    for name, own in model.state_dict().items():
        if name in state:
            state[name] = _like(state[name], own)


def shard_optimizer(optimizer: Optimizer) -> None:
    """Makes an optimizer over sharded weights give whole states, and load them.

    To ask for its states is then for all processes together; only the first one gets them.
    """
    optimizer.register_state_dict_post_hook(_gather_states)
    optimizer.register_load_state_dict_pre_hook(_shard_states)


def _gather_states(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    states = {index: _whole(values) for index, values in state["state"].items()}
    return {**state, "state": states}


def _shard_states(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    indices = [index for group in state["param_groups"] for index in group["params"]]
    states = dict(state["state"])
    for index, parameter in zip(indices, parameters, strict=True):
        if index in states:
            # The count of steps is a scalar, which each process has whole.
            states[index] = {
                name: _like(value, parameter) if value.shape == parameter.shape else value
                for name, value in states[index].items()
            }
    return {**state, "state": states}


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """Gives the whole weights of a sharded model to the first process, on the CPU.

    It is for all processes together; the others get nothing.
    """
    return _whole(model.state_dict())


def _whole(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors gathered one by one, on the CPU of the first process; nothing elsewhere."""
    whole = {}
    for name, value in tensors.items():
        gathered = value.full_tensor() if isinstance(value, DTensor) else value
        if is_first():
            whole[name] = gathered.cpu() if isinstance(gathered, Tensor) else gathered
    return whole


def _like(whole: Tensor, own: Any) -> Tensor:
    """A whole tensor in the shards of another."""
    if not isinstance(own, DTensor) or isinstance(whole, DTensor):
        return whole
    # Every process has read the whole: none of them has to send anything.
    whole = whole.to(own.device)
    return distribute_tensor(whole, own.device_mesh, own.placements, src_data_rank=None)
