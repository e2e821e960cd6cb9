"""Layers for one new token by kernels, in place of their modules."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from operator import is_
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from i3lm.layers.attention import CausalSelfAttention
from i3lm.layers.channel_mix import ChannelMix
from i3lm.layers.feed_forward import FeedForward
from i3lm.layers.hybrid import HybridMixer
from i3lm.layers.linear import Linear
from i3lm.layers.time_mix import TimeMix

# A kernel, and what it reads of its module: parameters and linear maps, in its order.
_Form = tuple[str, tuple[str, ...], tuple[str, ...]]
_PARTS: dict[type[nn.Module], _Form] = {
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
    CausalSelfAttention: ("attention", (), ("query_key_value", "output")),
}
# The head behind the last norm is itself its linear map.
_HEAD: _Form = "head", (), ("",)
# Hooks on all modules of the process.
_GLOBAL_HOOKS = (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks)
# What takes the place of one module's forward pass, as offloading and compilers do.
_REPLACEMENTS = ("forward", "_compiled_call_impl")
_WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.int8)


@dataclass(frozen=True)
class Half:
    """``x + module(norm(x))`` by one kernel.

    Attributes:
        kernel: The kernel's name.
        module: What stands behind the norm.
        layer: The number of its layer.
    """

    kernel: str
    module: nn.Module
    layer: int


@dataclass(frozen=True)
class Stretch:
    """Layers that follow each other and are computed alike.

    Attributes:
        layers: Their numbers.
        halves: The numbers of their halves in the plan; None where modules must be called.
        is_watched: Whether hooks want to know of the only layer's inputs and outputs.
    """

    layers: range
    halves: range | None
    is_watched: bool = False


@dataclass(frozen=True)
class Pieces:
    """The modules of a model.

    Attributes:
        root: The module whose forward pass wants to know.
        within: What lies between it and the layers, and their list at the end.
        embeddings: What is added up before the layers; they, norm and head are for a root that
            would leave all its modules to the kernels.
        norm: The norm behind the layers.
        head: What is behind that.
    """

    root: nn.Module
    within: tuple[nn.Module, ...]
    embeddings: tuple[nn.Embedding, ...] = ()
    norm: nn.Module | None = None
    head: nn.Module | None = None


@dataclass(frozen=True)
class Ends:
    """What kernels compute from before a model's layers and behind them.

    Attributes:
        embedding: Where the tables lie.
        head: Where norm and head lie.
        sizes: The rows of each table.
        channels: The width of the layers' inputs.
        outputs: The number of logits.
    """

    embedding: Any
    head: Any
    sizes: tuple[int, ...]
    channels: int
    outputs: int


@dataclass(frozen=True)
class Plan:
    """What kernels compute a model's layers from.

    Attributes:
        halves: What has a kernel, in order.
        records: Where the parameters of each lie, as the kernels take them.
        stretches: All layers.
        ends: What is before and behind them, where no module need be called at all.
        prepared: What a caller has prepared for the states in a cache.
    """

    halves: tuple[Half, ...]
    records: list[Any]
    stretches: tuple[Stretch, ...]
    ends: Ends | None
    prepared: WeakKeyDictionary[Any, Any] = field(default_factory=WeakKeyDictionary)


class DecodingStep:
    """Where the kernels of a decoding step find the parameters of a model's layers.

    They are looked up once and used while the modules are what they were. A module of another
    kind (an adapter, a map of low rank), a hook or a replaced forward pass: the modules of its
    layer must be called. A copy and a pickle of this begin empty.

    Args:
        names: The attributes of a layer that are norm and module of a half, in turn; it need not
            have them all.
    """

    def __init__(self, names: Sequence[tuple[str, str]]) -> None:
        self.names = names
        self.forget()

    def __reduce__(self) -> tuple[Any, ...]:
        return DecodingStep, (self.names,)

    def forget(self) -> None:
        """Lets go of the parameters, which would else stay in memory with this."""
        self._known: tuple[_Watch, Plan] | None = None

    def plan(self, pieces: Callable[[], Pieces], kernels: ModuleType) -> Plan | None:
        """Gives what the kernels compute a model's layers from.

        Args:
            pieces: Gives the model's modules, of the same root each time.
            kernels: What `i3lm.ops.decoding_step.decoding_kernels` gives.

        Returns:
            The plan, or None where no half has a kernel or a hook is on all modules of the
            process.
        """
        if any(_GLOBAL_HOOKS):
            return None
        known = self._known
        if known is None or not known[0].unchanged():
            watch = _Watch()
            known = self._known = watch, _look_up(pieces(), self.names, kernels, watch)
        return known[1] if known[1].halves else None


@dataclass
class _Watch:
    """What must be as it was for parameters to be those of the modules.

    It is looked at before every token, when the matrices of the last one have driven all else out
    of the processor's caches: the fewer things are touched, the better.
    """

    modules: list[nn.Module] = field(default_factory=list)
    types: list[type] = field(default_factory=list)
    # Parameters and children, by name.
    homes: list[dict[str, Any]] = field(default_factory=list)
    things: list[Any] = field(default_factory=list)
    # Hooks and attributes, where a replaced forward pass would be one more.
    others: list[dict[Any, Any]] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    # In one piece: a list's numbers would be one more thing to touch each.
    addresses: array[int] = field(default_factory=partial(array, "Q"))
    kept: list[Tensor] = field(default_factory=list)

    def unchanged(self) -> bool:
        """Whether all is as it was."""
        things = list(chain.from_iterable(map(dict.values, self.homes)))
        return (
            list(map(type, self.modules)) == self.types
            and len(things) == len(self.things)
            and all(map(is_, things, self.things))
            and list(map(len, self.others)) == self.sizes
            # `module.to` keeps a parameter and changes what it holds. Shards that come and go may
            # have their memory again, and then it is theirs.
            and array("Q", map(Tensor.data_ptr, self.tensors)) == self.addresses
        )

    def add(self, module: nn.Module) -> None:
        """Watches a module, its parameters and its children."""
        self.modules.append(module)
        self.types.append(type(module))
        for home in (module._parameters, module._modules):
            if home:  # a module that uses what is put into an empty one is of another type
                self.homes.append(home)
                self.things += home.values()
        for other in (module._forward_hooks, module._forward_pre_hooks, module.__dict__):
            self.others.append(other)
            self.sizes.append(len(other))

    def add_memory(self, tensors: list[Tensor]) -> None:
        """Watches where tensors lie."""
        self.tensors += tensors
        self.addresses.extend(tensor.data_ptr() for tensor in tensors)
        # Kept though a parameter be given other memory, which then cannot have the same address.
        self.kept += [tensor.detach() for tensor in tensors]


def _look_up(
    pieces: Pieces, names: Sequence[tuple[str, str]], kernels: ModuleType, watch: _Watch
) -> Plan:
    for module in (pieces.root, *pieces.within):
        watch.add(module)
    halves: list[Half] = []
    records: list[Any] = []
    stretches: list[Stretch] = []
    for number, layer in enumerate(pieces.within[-1].children()):
        present = [pair for pair in names if hasattr(layer, pair[1])]
        watch.add(layer)
        parts = [_Part(getattr(layer, norm), getattr(layer, module)) for norm, module in present]
        for part in parts:
            part.watch_with(watch)
        served = not _is_replaced(layer) and all(part.is_served() for part in parts)
        first = len(halves)
        if served:
            halves += [Half(part.kernel, part.module, number) for part in parts]
            records += [part.record(kernels) for part in parts]
        here = range(number, number + 1)
        new = range(first, len(halves)) if served else None
        _append(stretches, Stretch(here, new, served and _is_intercepted(layer)))
    ends = _look_up_ends(pieces, kernels, watch) if _is_whole(stretches) else None
    return Plan(tuple(halves), records, tuple(stretches), ends)


def _is_whole(stretches: list[Stretch]) -> bool:
    """Whether kernels compute all layers, and nobody wants to know of one."""
    return len(stretches) == 1 and stretches[0].halves is not None and not stretches[0].is_watched


def _look_up_ends(pieces: Pieces, kernels: ModuleType, watch: _Watch) -> Ends | None:
    if pieces.norm is None or pieces.head is None:
        return None
    head, tables = _Part(pieces.norm, pieces.head, _HEAD), pieces.embeddings
    head.watch_with(watch)
    for table in tables:
        watch.add(table)
    if (
        any(map(_is_intercepted, pieces.within))
        or not head.is_served()
        or not all(map(_is_table, tables))
    ):
        return None
    weights = [table.weight for table in tables]
    watch.add_memory(weights)
    return Ends(
        kernels.record_of("embedding", epsilon=0.0, width=0, vectors=weights),
        head.record(kernels),
        tuple(len(weight) for weight in weights),
        *reversed(head.weights[0].shape),
    )


def _append(stretches: list[Stretch], new: Stretch) -> None:
    """Appends a stretch, to the last one where the two can be computed as one."""
    last = stretches[-1] if stretches else None
    if last and last.halves and new.halves and not (last.is_watched or new.is_watched):
        layers = range(last.layers.start, new.layers.stop)
        stretches[-1] = Stretch(layers, range(last.halves.start, new.halves.stop))
    else:
        stretches.append(new)


class _Part:
    """A norm and what stands behind it, with the linear maps inside."""

    def __init__(self, norm: nn.Module, module: nn.Module, form: _Form | None = None) -> None:
        self.norm, self.module = norm, module
        self.kernel, names, maps = form or _PARTS.get(type(module), ("", (), ()))
        self.linears = [module.get_submodule(name) for name in maps]
        stored = [parts for x in self.linears if isinstance(x, Linear) and (parts := x.stored())]
        self.vectors = [getattr(module, name) for name in names]
        self.weights = [parts[0] for parts in stored]
        self.scales, self.biases = [parts[1] for parts in stored], [parts[2] for parts in stored]

    def watch_with(self, watch: _Watch) -> None:
        for module in dict.fromkeys((self.norm, self.module, *self.linears)):  # a head is both
            watch.add(module)
        if self.is_served():
            watch.add_memory([x for x in (*self.weights, *self._small()) if x is not None])

    def is_served(self) -> bool:
        """Whether the kernels take these: matrices of one dtype, all else float32, as they lie."""
        norm = self.norm
        if (
            not self.kernel
            or type(norm) is not nn.LayerNorm
            or norm.weight is None
            or norm.bias is None
            or len(self.weights) < len(self.linears)
            or any(map(_is_intercepted, (norm, self.module, *self.linears)))
        ):
            return False
        small = [tensor for tensor in self._small() if tensor is not None]
        return (
            len({weight.dtype for weight in self.weights}) <= 1
            and all(weight.dtype in _WEIGHT_DTYPES for weight in self.weights)
            and all(tensor.dtype == torch.float32 for tensor in small)
            and all(map(_is_plain, [*self.weights, *small]))
        )

    def record(self, kernels: ModuleType) -> Any:
        """Where the half's parameters lie."""
        return kernels.record_of(
            self.kernel,
            epsilon=self.norm.eps,
            width=self._width(),
            norm=[self.norm.weight, self.norm.bias],
            vectors=self.vectors,
            weights=self.weights,
            scales=self.scales,
            biases=self.biases,
        )

    def _small(self) -> list[Tensor | None]:
        return [self.norm.weight, self.norm.bias, *self.vectors, *self.scales, *self.biases]

    def _width(self) -> int:
        if isinstance(self.module, CausalSelfAttention):
            return self.module.num_attention_heads
        if isinstance(self.module, HybridMixer):
            return self.module.A.shape[0]
        return self.weights[0].shape[0]


def _is_replaced(module: nn.Module) -> bool:
    """Whether something else runs in place of a module's own forward pass."""
    return any(module.__dict__.get(name) for name in _REPLACEMENTS)


def _is_intercepted(module: nn.Module) -> bool:
    """Whether more than its own forward pass happens when a module is called."""
    hooked = bool(module._forward_hooks) or bool(module._forward_pre_hooks)
    return hooked or _is_replaced(module)


def _is_table(module: nn.Embedding) -> bool:
    """Whether a module gives rows of a table as they lie."""
    return (
        type(module) is nn.Embedding
        and module.max_norm is None
        and not _is_intercepted(module)
        and module.weight.dtype == torch.float32
        and _is_plain(module.weight)
    )


def _is_plain(tensor: Tensor) -> bool:
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.device.type == "cpu"
        and tensor.is_contiguous()
    )
