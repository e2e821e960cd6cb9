"""A half of a layer for one new token by one kernel, in place of its modules."""

from __future__ import annotations

from operator import is_
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from i3lm.layers.attention import CausalSelfAttention, KeyValueStore, Rotation
from i3lm.layers.channel_mix import ChannelMix
from i3lm.layers.feed_forward import FeedForward
from i3lm.layers.hybrid import HybridMixer
from i3lm.layers.linear import Linear
from i3lm.layers.time_mix import TimeMix

# The kernel of each kind of module, and what it reads: parameters and linear maps, in its order.
_PARTS: dict[type[nn.Module], tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    TimeMix: (
        "time_mix",
        ("time_decay", "time_first", "time_mix_key", "time_mix_value", "time_mix_receptance"),
        ("key", "value", "receptance", "output"),
    ),
    ChannelMix: (
        "channel_mix",
        ("time_mix_key", "time_mix_receptance"),
        ("key", "receptance", "value"),
    ),
    HybridMixer: ("state_space", ("mix", "A", "B", "C", "D"), ()),
    FeedForward: ("feed_forward", (), ("up", "down")),
    CausalSelfAttention: ("attention_input", (), ("query_key_value", "output")),
}
# Hooks on all modules of the process.
_GLOBAL_HOOKS = (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks)
# What takes the place of one module's forward pass, as offloading and compilers do.
_REPLACEMENTS = ("forward", "_compiled_call_impl")
_WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.int8)
_NOTHING = torch.empty(0)


class DecodingStep:
    """``x + module(norm(x))`` for one new token by one kernel, with the modules' parameters.

    The parameters are looked up once and used while the modules are what they were. A module of
    another kind (an adapter, a map of low rank), a hook or a replaced forward pass: the modules
    must be called. A copy and a pickle of this begin empty.
    """

    def __init__(self) -> None:
        self.forget()

    def __reduce__(self) -> tuple[Any, ...]:
        return DecodingStep, ()

    def forget(self) -> None:
        """Lets go of the parameters, which would else stay in memory with this."""
        self._kernel = ""
        self._arguments: tuple[Any, ...] | None = None
        self._owners: tuple[nn.Module, ...] = ()
        self._modules: list[nn.Module] = []
        self._types: list[type] = []
        self._widths: tuple[int, ...] = ()  # channels of every state
        # What must stand where for the parameters to be those of the modules.
        self._homes: list[dict[str, Any]] = []
        self._names: list[str] = []
        self._things: list[Any] = []
        self._hooks: list[dict[int, Any]] = []
        self._tensors: list[Tensor] = []
        self._addresses: list[int] = []

    def __call__(
        self, kernels: ModuleType, norm: nn.Module, module: nn.Module, x: Tensor, *states: Tensor
    ) -> Tensor | None:
        """Gives ``x + module(norm(x))`` and replaces the states in place.

        Args:
            kernels: What `i3lm.ops.decoding_step.decoding_kernels` gives.
            norm: The LayerNorm.
            module: What comes behind it, not an attention.
            x: Inputs, shape (B, 1, C).
            states: The module's states, as the kernel takes them.

        Returns:
            Shape (B, 1, C); or None where the modules must be called, and nothing is changed.
        """
        if not self._ready(norm, module):
            return None
        expected = [(x.shape[0], width) for width in self._widths]
        fitting = [(state.shape[0], state.shape[-1]) for state in states if _is_plain(state)]
        if fitting != expected:
            return None
        return self._run(kernels, self._kernel, x, *states)

    def attend(
        self,
        kernels: ModuleType,
        norm: nn.Module,
        attention: CausalSelfAttention,
        x: Tensor,
        mask: Tensor | None,
        store: KeyValueStore | None,
        rotation: Rotation | None,
    ) -> Tensor | None:
        """As a call, for an attention: its products by kernels, the rest by itself."""
        if not self._ready(norm, attention):
            return None
        # The last bit of PyTorch's products can depend on the alignment of what they read, and
        # only its own memory has always the same.
        heads = self._run(kernels, self._kernel, x).clone()
        mixed = attention.attend(heads, mask, store, rotation)
        return self._run(kernels, "attention_output", x, mixed.flatten(0, 1))

    def _run(self, kernels: ModuleType, kernel: str, x: Tensor, *states: Tensor) -> Tensor:
        assert self._arguments is not None
        rows = x.reshape(x.shape[0], -1).numpy()
        arrays = tuple([state.numpy() for state in states])
        output = getattr(kernels, kernel)(rows, *self._arguments, arrays, kernels.match_threads())
        return torch.from_numpy(output).unsqueeze(1)

    def _ready(self, norm: nn.Module, module: nn.Module) -> bool:
        if self._owners != (norm, module) or not self._unchanged():
            self.forget()
            self._look_up(norm, module)
        hooked = any(self._hooks) or any(_GLOBAL_HOOKS)
        return self._arguments is not None and not hooked

    def _unchanged(self) -> bool:
        if list(map(type, self._modules)) != self._types:
            return False
        if not all(map(is_, map(dict.get, self._homes, self._names), self._things)):
            return False
        # `module.to` keeps a parameter and changes what it holds. The arrays keep the old memory,
        # so that the new one cannot have its address; shards that come and go may have it again,
        # and then it is theirs.
        return [tensor.data_ptr() for tensor in self._tensors] == self._addresses

    def _look_up(self, norm: nn.Module, module: nn.Module) -> None:
        self._owners = norm, module
        kernel, names, maps = _PARTS.get(type(module), ("", (), ()))
        linears = [getattr(module, name) for name in maps]
        replaced = any(
            x.__dict__.get(name) for x in (norm, module, *linears) for name in _REPLACEMENTS
        )
        if not kernel or type(norm) is not nn.LayerNorm or replaced:
            return
        stored = [parts for x in linears if isinstance(x, Linear) and (parts := x.stored())]
        vectors = [getattr(module, name) for name in names]
        weights = [parts[0] for parts in stored]
        scales, biases = [parts[1] for parts in stored], [parts[2] for parts in stored]
        small = [norm.weight, norm.bias, *vectors, *scales, *biases]
        if len(weights) < len(linears) or not _readable(weights, small):
            return
        self._watch([norm, module, *linears], [(module, name) for name in maps])
        self._tensors = [*weights, *(x for x in small if x is not None)]
        self._addresses = [tensor.data_ptr() for tensor in self._tensors]
        affine = _array(norm.weight), _array(norm.bias), norm.eps
        groups = (vectors, weights, scales, biases)
        self._kernel, self._widths = kernel, _state_widths(module)
        self._arguments = (affine, *(tuple(map(_array, group)) for group in groups))

    def _watch(self, modules: list[nn.Module], children: list[tuple[nn.Module, str]]) -> None:
        self._modules, self._types = modules, list(map(type, modules))
        slots: list[tuple[dict[str, Any], str]]
        slots = [(owner._modules, name) for owner, name in children]
        for module in modules:
            slots += [(module._parameters, name) for name in module._parameters]
            slots += [(module.__dict__, name) for name in _REPLACEMENTS]
            self._hooks += [module._forward_hooks, module._forward_pre_hooks]
        self._homes, self._names = [home for home, _ in slots], [name for _, name in slots]
        self._things = [home.get(name) for home, name in slots]


def _state_widths(module: nn.Module) -> tuple[int, ...]:
    if isinstance(module, HybridMixer):
        return (module.C.shape[0] + module.C.shape[1],)
    if isinstance(module, TimeMix | ChannelMix):
        return (module.time_mix_key.shape[0],) * (2 if isinstance(module, TimeMix) else 1)
    return ()


def _readable(weights: list[Tensor], small: list[Tensor | None]) -> bool:
    """Whether the kernels take these: matrices of one dtype, all else float32, as they lie."""
    kinds = (Tensor, nn.Parameter)
    return (
        len({weight.dtype for weight in weights}) <= 1
        and all(weight.dtype in _WEIGHT_DTYPES for weight in weights)
        and all(tensor.dtype == torch.float32 for tensor in small if tensor is not None)
        and all(
            type(tensor) in kinds and tensor.device.type == "cpu" and tensor.is_contiguous()
            for tensor in [*weights, *small]
            if tensor is not None
        )
        and small[0] is not None
        and small[1] is not None
    )


def _array(tensor: Tensor | None) -> Any:
    from i3lm.ops.numba_bridge import as_array, bits_of

    # Detached, the array keeps the memory though the parameter be given another.
    return as_array(bits_of((_NOTHING if tensor is None else tensor).detach()))


def _is_plain(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.device.type == "cpu" and tensor.is_contiguous()
