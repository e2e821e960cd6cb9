"""Choosing which implementation of an op runs, and being able to say why."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib.util
import logging
import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.amp import is_autocast_available

logger = logging.getLogger(__name__)

# Triton's interpreter runs its kernels on any device, slowly: for tests. Triton itself reads this
# variable once, when it is imported.
TRITON_INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"

# The implementations that are right everywhere and fast nowhere.
SLOW = ("scan", "reference")

# Up to so many, an elementwise op is best done by PyTorch: measured with three mixes of width 768.
FEW_NUMBERS = 2**16

_ops: dict[str, Op] = {}
# op name -> implementation name, set by `use_implementation` for a block of code.
_overrides: contextvars.ContextVar[dict[str, str] | None] = contextvars.ContextVar(
    "i3lm_op_overrides", default=None
)


def _accept_anything(device: torch.device, dtype: torch.dtype) -> str | None:
    return None


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    Attributes:
        name: The word used everywhere: file, flag, test id.
        forward: The op; every implementation of an op has the same signature.
        backward: The gradients of its inputs, from those of its outputs and what the op keeps; None
            where PyTorch differentiates the forward pass itself.
        refuses: Given the device and dtype, why this implementation cannot serve them, or None.
        reads_bfloat16: Whether a recurrence takes sequences of bfloat16, and gives its output so;
            others get them in the dtype in which they compute.
    """

    name: str
    forward: Callable[..., Any]
    backward: Callable[..., tuple[Any, ...]] | None = None
    refuses: Callable[[torch.device, torch.dtype], str | None] = _accept_anything
    reads_bfloat16: bool = False


@dataclass(frozen=True)
class Choice:
    """The implementation that serves a call, and the reason it was taken."""

    implementation: Implementation
    reason: str


@dataclass
class Op:
    """A named op with its implementations, best first."""

    name: str
    implementations: list[Implementation]
    _told: set[tuple[str, str]] = field(default_factory=set)

    def __post_init__(self) -> None:
        _ops[self.name] = self

    @property
    def names(self) -> list[str]:
        """The names of the implementations, best first."""
        return [implementation.name for implementation in self.implementations]

    @property
    def override(self) -> str | None:
        """The implementation that `use_implementation` names for this block of code, or None."""
        return (_overrides.get() or {}).get(self.name)

    def choose(
        self, device: torch.device, dtype: torch.dtype, implementation: str | None = None
    ) -> Choice:
        """Gives the implementation for these tensors: argument, then override, then best.

        Args:
            device: Where the inputs are.
            dtype: The inputs' dtype.
            implementation: A name that must be used, or None.

        Raises:
            ValueError: The name is unknown, or that implementation refuses device or dtype.
        """
        if torch.compiler.is_compiling():
            traced = _name_of_choice(self.name, device, dtype, implementation)
            return Choice(self.named(traced), "chosen when the call was traced")
        return self._choose(device, dtype, implementation)

    def choose_for(self, x: Tensor, dtype: torch.dtype) -> Implementation:
        """Gives the implementation for an elementwise op on `x`, whose last is the plain form.

        That serves few numbers, where another's call costs more than it saves; compilers, which
        make one pass of it themselves; and tensors that hold others, such as shards.

        Args:
            x: The input.
            dtype: The output's dtype, which must be accepted besides device and dtype of `x`.
        """
        plain = self.implementations[-1]
        if torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter):
            return plain
        if x.numel() < FEW_NUMBERS and self.override is None:
            return plain
        chosen = self._choose(x.device, x.dtype, None).implementation
        if chosen is plain or dtype == x.dtype:
            return chosen
        return self._choose(x.device, dtype, None).implementation

    def _choose(
        self, device: torch.device, dtype: torch.dtype, implementation: str | None
    ) -> Choice:
        asked, source = implementation, "asked for by the call"
        if asked is None:
            asked, source = self.override, "asked for by an override"
        if asked is not None:
            chosen = self.named(asked)
            refusal = chosen.refuses(device, dtype)
            if refusal is not None:
                raise ValueError(f"{self.name}: implementation {asked!r} refuses: {refusal}")
            return Choice(chosen, source)
        refusals: list[str] = []
        for candidate in self.implementations:
            refusal = candidate.refuses(device, dtype)
            if refusal is None:
                reason = "; ".join(refusals) or "the fastest there is for this device and dtype"
                choice = Choice(candidate, reason)
                self._tell_once(choice, device)
                return choice
            refusals.append(f"{candidate.name}: {refusal}")
        raise ValueError(f"no implementation of {self.name} accepts {dtype} on {device}")

    def named(self, name: str) -> Implementation:
        """Gives an implementation by name, or raises a ValueError that lists them."""
        for candidate in self.implementations:
            if candidate.name == name:
                return candidate
        known = ", ".join(self.names)
        raise ValueError(f"{self.name} has no implementation {name!r}; it has {known}")

    def _tell_once(self, choice: Choice, device: torch.device) -> None:
        key = (choice.implementation.name, choice.reason)
        if key not in self._told:
            self._told.add(key)
            slow = choice.implementation.name in SLOW and device.type != "meta"
            level = logging.WARNING if slow else logging.INFO
            logger.log(level, "%s runs as %s (%s)", self.name, *key)


@torch.compiler.assume_constant_result
def _name_of_choice(
    op: str, device: torch.device, dtype: torch.dtype, implementation: str | None
) -> str:
    # A compiler cannot follow what a choice looks at, and need not: it is fixed while tracing.
    return _ops[op]._choose(device, dtype, implementation).implementation.name


def runs_directly(implementation: Implementation) -> bool:
    """Whether a call skips the registered op and goes straight to the implementation.

    So it is where nobody differentiates or traces the call (the registered op costs some 30
    microseconds), and where PyTorch itself differentiates the implementation.
    """
    if implementation.backward is None:
        return True
    return not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def numba_refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the numba implementations cannot serve a device and dtype, or None."""
    if device.type != "cpu":
        return f"runs on the CPU, not on {device.type}"
    if dtype not in (torch.float32, torch.float64):
        return f"computes in float32 and float64, not in {dtype}"
    return _numba_failure()


def numba_refuses_bits(device: torch.device, dtype: torch.dtype) -> str | None:
    """As `numba_refuses`, for kernels that take bfloat16 as its bits and compute in float32."""
    return numba_refuses(device, torch.float32 if dtype == torch.bfloat16 else dtype)


def amx_refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why kernels for a processor's matrix unit cannot serve a device and dtype, or None."""
    if dtype != torch.bfloat16:
        return f"serves bfloat16, not {dtype}"
    if (reason := numba_refuses_bits(device, dtype)) is not None:
        return reason
    from i3lm.ops.amx_bridge import missing

    return missing()


@functools.cache
def _numba_failure() -> str | None:
    """Why numba cannot run in this process, or None."""
    try:
        import i3lm.ops.numba_bridge  # noqa: F401 (numba compiles and caches when imported)
    except Exception as error:  # whatever a broken installation raises, another kernel can serve
        return f"numba does not work here ({type(error).__name__}: {error})"
    return None


@functools.cache
def processor_vendor() -> str | None:
    """Who made the processor, as it names itself (``GenuineIntel``, ``AuthenticAMD``), or None."""
    if sys.platform == "win32":
        return platform.processor().rpartition(" ")[2] or None
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # macOS, say
        return None
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")]
    return names[0] if names else None


def triton_refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the Triton implementations cannot serve a device and dtype, or None."""
    if dtype != torch.float32:
        return f"computes in float32, not in {dtype}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if TRITON_INTERPRETS:
        return None
    if device.type != "cuda":
        return f"runs on CUDA devices, not on {device.type}"
    if not torch.cuda.is_available():
        return "no CUDA device answers"
    if torch.cuda.get_device_capability(device) < (7, 0):
        return "needs a GPU of compute capability 7.0 or later"
    return None


@contextlib.contextmanager
def use_implementation(**names: str) -> Iterator[None]:
    """Makes ops use the named implementations inside the block.

    Example:
        >>> with use_implementation(wkv="reference"):
        ...     pass
    """
    token = _overrides.set({**(_overrides.get() or {}), **names})
    try:
        yield
    finally:
        _overrides.reset(token)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a recurrence runs: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def gradient_dtype(parameter: Tensor) -> torch.dtype | None:
    """The dtype that the gradient of a tensor is to have; None means that in which it comes."""
    if torch.compiler.is_compiling() or not parameter.is_leaf:
        return parameter.dtype
    return parameter.grad_dtype


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a product of `x` with a matrix runs: autocast's, or its own."""
    device = x.device.type
    if x.dtype == torch.float64 or not is_autocast_available(device):
        return x.dtype
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Keeps autocast out of a recurrence, whose exponents and states need full precision."""
    if not is_autocast_available(device.type):  # as for meta, where nothing is computed
        yield
        return
    with torch.autocast(device_type=device.type, enabled=False):
        yield
