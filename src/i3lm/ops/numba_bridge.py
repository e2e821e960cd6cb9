"""What the numba implementations share: arrays, threads, and an exponential that vectorises."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import carray, config, njit, types
from numba.core import cgutils, event
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic, overload, typeof_impl
from torch import Tensor

from i3lm.ops.numba_cache import know_all_sources

know_all_sources()


def processor_features() -> list[str]:
    """What numba compiles for, in LLVM's words such as ``+avx512f``: this processor's features.

    Or those of another one, which its user may have named.
    """
    settings: Any = config  # made of the environment when it is imported
    named = settings.CPU_FEATURES
    return (get_host_cpu_features() if named is None else named).split(",")


def _use_whole_vectors() -> None:
    """Has loops use all 512 bits of a vector where processors gain by it (benchmarks/NOTES.md).

    LLVM keeps to half for most of Intel's, of which the first ran slower with whole ones. Those
    that came with bfloat16 instructions do not. It is a setting of the process, for all that numba
    compiles in it, and takes effect where nothing was compiled yet.
    """
    features = processor_features()
    settings: Any = config
    if settings.CPU_FEATURES is None and "+avx512bf16" in features:
        settings.CPU_FEATURES = ",".join([*features, "-prefer-256-bit"])


_use_whole_vectors()

_asked = torch.get_num_threads()
_LAUNCHED = numba.get_num_threads()  # starts its threads, and with them changes PyTorch's number
if torch.get_num_threads() != _asked:
    torch.set_num_threads(_asked)
_matched = threading.local()  # as numba's own number is

# Sums may be reordered and products contracted; NaN and infinity keep their meaning, so that a
# diverged run shows as one.
FAST: set[str] = {"reassoc", "contract", "nsz", "arcp", "afn"}

# numba's own pool of threads, which serves where neither OpenMP nor TBB is found, ends the process
# that launches two kernels at once.
_turn = threading.Lock() if numba.threading_layer() == "workqueue" else None


class _InTurn:
    """A kernel that Python threads call one after the other; other kernels call it as it is."""

    def __init__(self, kernel: Any, turn: threading.Lock) -> None:
        self.kernel, self.turn = kernel, turn

    def __call__(self, *arguments: Any) -> Any:
        with self.turn:
            return self.kernel(*arguments)


@typeof_impl.register(_InTurn)
def _type_in_turn(function: _InTurn, context: Any) -> Any:
    return types.Dispatcher(function.kernel)


def _kernel(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Makes a decorator that compiles a function which Python may call."""

    def compile_(function: Callable[..., Any]) -> Any:
        kernel = njit(**options, cache=True, error_model="numpy")(function)
        return kernel if _turn is None else _InTurn(kernel, _turn)

    return compile_


compiled: Any = partial(_kernel, parallel=True, fastmath=FAST)
# For loops that write what they compute (benchmarks/NOTES.md, the first trap).
as_written: Any = partial(_kernel, parallel=True, fastmath=False)
# Such a function may launch others.
serial: Any = partial(_kernel, fastmath=FAST)
# For functions that kernels call, with loops that write what they compute. The compiler makes two
# forms of such a loop, and how near its arrays lie decides which one runs; and a process that
# compiles a kernel reorders what it may in another way than the next one, which has it from the
# cache. Only as written are all bitwise the same. Not saying so is not enough: a function called
# takes over the freedom of its caller.
serial_as_written: Any = partial(njit, fastmath=False, cache=True, error_model="numpy")
inlined: Any = partial(njit, inline="always", fastmath=FAST, error_model="numpy")

logger = logging.getLogger(__name__)


class _CompilingTeller(event.Listener):
    """Says once in a process that numba compiles, which takes seconds and is not seen else."""

    told = False

    def on_start(self, event: Any) -> None:
        if not self.told:
            self.told = True
            logger.info("compiling kernels for this processor, once; they are kept for next time")

    def on_end(self, event: Any) -> None:
        pass


event.register("numba:compile", _CompilingTeller())

_LOG2_E = np.float32(1.4426950408889634)
# ln 2 in two parts, so that n * ln 2 is exact where it cancels against x (Cody and Waite).
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)


def _type_pointer(typing_context: Any, address: Any) -> tuple[Any, Any]:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate


# Inside a kernel, an address as `numba.carray` takes it, with a shape and a dtype.
pointer: Any = intrinsic(_type_pointer)


def _type_call(typing_context: Any, function: Any, *arguments: Any) -> tuple[Any, Any]:
    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        integer = ir.IntType(64)
        form = ir.FunctionType(integer, [integer] * len(arguments)).as_pointer()
        return builder.call(
            builder.inttoptr(values[0], form), cgutils.unpack_tuple(builder, values[1])
        )

    return types.int64(types.int64, types.StarArgTuple.from_types(arguments)), generate


# Inside a kernel, `call(address, *arguments)` of what `address_of` gives, all int64. What is called
# is not compiled once more with the function that calls it, as all others are.
call: Any = intrinsic(_type_call)


@cache
def address_of(function: Any) -> int:
    """Compiles a plain function from int64 numbers to an int64 number; gives its address.

    An exception in it is printed and does not reach the caller, to whom it is the number 0: let it
    give another one.
    """
    count = function.__code__.co_argcount
    signature = types.int64(*[types.int64] * count)
    # What others have defined is not known by the sources of all kernels (`numba_cache`).
    kept = function.__module__.startswith("i3lm.")
    compiled_function: Any = numba.cfunc(signature, cache=kept)(function)
    _functions.append(compiled_function)  # else its code would be freed
    address: int = compiled_function.address
    return address


_functions: list[Any] = []


@njit(cache=True)
def floats(address, shape):
    """Inside a kernel, the float32 array of a shape at an address."""
    return carray(pointer(address), shape, np.float32)


def match_threads() -> int:
    """Makes numba use as many threads as PyTorch does (at most as many as it was started with).

    Returns:
        That number.
    """
    threads = min(torch.get_num_threads(), _LAUNCHED)
    # Asking numba itself costs as much as a small kernel.
    if threads != getattr(_matched, "threads", _LAUNCHED):
        numba.set_num_threads(threads)
        _matched.threads = threads
    return threads


def as_arrays(*tensors: Tensor | None) -> list[np.ndarray]:
    """The tensors as contiguous arrays, bfloat16 as its bits; None becomes an empty (0, 0) mark.

    For what a kernel reads. A tensor that is not contiguous is copied, and what a kernel wrote
    there would be lost: the arrays are read-only, and numba compiles no kernel that writes one.
    """
    nothing = np.zeros((0, 0), np.bool_)
    arrays = [nothing if x is None else _array(x.contiguous()) for x in tensors]
    for array in arrays:
        array.setflags(write=False)
    return arrays


def targets(*tensors: Tensor) -> list[np.ndarray]:
    """The tensors as arrays that a kernel writes, over their own memory; bfloat16 as its bits.

    Raises:
        ValueError: A tensor is not contiguous.
    """
    for tensor in tensors:
        if not tensor.is_contiguous():
            raise ValueError(
                f"a kernel cannot write a tensor of shape {tuple(tensor.shape)} with strides "
                f"{tensor.stride()}: it must be contiguous"
            )
    return [_array(tensor) for tensor in tensors]


def _array(tensor: Tensor) -> np.ndarray:
    bits = tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor
    return np.asarray(_Memory(bits))


class _Memory:
    """What NumPy needs to see a tensor's memory as an array.

    `Tensor.numpy` fixes the size of that memory for good, and weights that are spread over
    processes (FSDP2) are freed and gathered again all the time.
    """

    __slots__ = ("__array_interface__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor  # as long as the array lives
        self.__array_interface__ = {
            "data": (tensor.data_ptr(), False),
            "shape": tuple(tensor.shape),
            "typestr": _type_of(tensor.dtype),
            "version": 3,
        }


@cache
def _type_of(dtype: torch.dtype) -> str:
    """What NumPy calls a type."""
    return np.dtype(str(dtype).removeprefix("torch.")).str


def _type_multiply_add(typing_context: Any, a: Any, b: Any, c: Any) -> tuple[Any, Any]:
    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        number = values[0].type
        form = ir.FunctionType(number, [number] * 3)
        name = f"llvm.fmuladd.{'f32' if number == ir.FloatType() else 'f64'}"
        return builder.call(cgutils.get_or_insert_function(builder.module, form, name), values)

    return a(a, a, a), generate


# Inside a kernel, a * b + c in one instruction where the processor has it: in loops as written too.
multiply_add: Any = intrinsic(_type_multiply_add)


def exp(x: Any) -> Any:
    """``e^x`` inside a kernel: float32 to 2 ulp in a form that vectorises, float64 by libm."""
    raise NotImplementedError("for use inside numba kernels")  # they take the overload below


@inlined()
def _exp_float32(x):
    """``e^x`` for x at most about 88; below -87 the smallest normal number."""
    x = max(x, np.float32(-87.0))
    n = np.floor(multiply_add(x, _LOG2_E, np.float32(0.5)))
    r = multiply_add(n, -_LN2_LOW, multiply_add(n, -_LN2_HIGH, x))  # |r| <= ln(2) / 2
    # e^r by its Taylor series to degree 7: the rest is below 1e-8.
    p = np.float32(1.0 / 5040.0)
    p = multiply_add(p, r, np.float32(1.0 / 720.0))
    p = multiply_add(p, r, np.float32(1.0 / 120.0))
    p = multiply_add(p, r, np.float32(1.0 / 24.0))
    p = multiply_add(p, r, np.float32(1.0 / 6.0))
    p = multiply_add(p, r, np.float32(0.5))
    p = multiply_add(p, r, np.float32(1.0))
    p = multiply_add(p, r, np.float32(1.0))
    # 2^n by writing n into the exponent bits.
    return p * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)


@overload(exp, inline="always", jit_options={"fastmath": FAST})
def _exp_by_dtype(x):
    if x == types.float32:
        return lambda x: _exp_float32(x)
    return lambda x: math.exp(x)


_SIXTEEN, _HALF, _ONE = np.uint32(16), np.uint32(0x7FFF), np.uint32(1)


def widen(x: Any) -> Any:
    """A number of an array inside a kernel; uint16 stands for the bits of a bfloat16.

    NumPy does not know bfloat16: it is the upper half of a float32.
    """
    raise NotImplementedError("for use inside numba kernels")  # they take the overload below


@overload(widen, inline="always", jit_options={"fastmath": FAST})
def _widen_by_dtype(x):
    if x == types.uint16:
        return lambda x: np.uint32(np.uint32(x) << _SIXTEEN).view(np.float32)
    if x == types.int8:
        return lambda x: np.float32(x)
    return lambda x: x


def written(x: Any, like: Any) -> Any:
    """A number as arrays of the kind of `like` keep it; bfloat16 rounds to the nearest, or even."""
    raise NotImplementedError("for use inside numba kernels")  # they take the overload below


@inlined()
def _bfloat16_bits(x):
    bits = np.float32(x).view(np.uint32)
    return np.uint16((bits + _HALF + ((bits >> _SIXTEEN) & _ONE)) >> _SIXTEEN)


@overload(written, inline="always", jit_options={"fastmath": FAST})
def _written_by_dtype(x, like):
    if like == types.uint16:
        return lambda x, like: _bfloat16_bits(x)
    return lambda x, like: x


@inlined()
def copy(target, source):
    """Copies a vector into another, either perhaps of bfloat16."""
    for i in range(target.shape[0]):
        target[i] = written(widen(source[i]), target[i])


def fetch_at(builder: Any, address: Any) -> None:
    """Emits that the 64 bytes around an address be brought into the cache, to stay."""
    integer = ir.IntType(32)
    form = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, *[integer] * 3])
    function = cgutils.get_or_insert_function(builder.module, form, "llvm.prefetch.p0i8")
    place = builder.inttoptr(address, cgutils.voidptr_t)
    builder.call(function, [place, integer(0), integer(3), integer(1)])  # of data


def _type_fetch_line(typing_context: Any, array: Any, index: Any) -> tuple[Any, Any]:
    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        view = context.make_array(signature.args[0])(context, builder, values[0])
        place = builder.gep(view.data, [values[1]])
        fetch_at(builder, builder.ptrtoint(place, ir.IntType(64)))
        return context.get_dummy_value()

    return types.none(array, types.intp), generate


# Inside a kernel, `fetch_line(row, i)` has the 64 bytes around a number of a vector brought into
# the cache, to be read or written later.
fetch_line: Any = intrinsic(_type_fetch_line)

# So many steps ahead a walk through time fetches what it reads and writes.
AHEAD = 4


@inlined()
def fetch(row):
    """Has a vector brought into the cache for a later step.

    The rows of one block of channels lie a page or so apart, where processors do not look ahead
    by themselves, and each would be waited for.
    """
    for i in range(0, row.size, 64 // row.itemsize):  # a line has 64 bytes
        fetch_line(row, i)


@inlined()
def fetch_ahead(numbers, low, high):
    """Has what stands so far behind a piece of a vector brought into the cache, to its end."""
    size = AHEAD * (high - low)
    fetch(numbers[min(low + size, numbers.size) : min(high + size, numbers.size)])


# A kernel keeps what one step touches as rows of one small array: a loop over many arrays that
# might overlap does not vectorise (benchmarks/NOTES.md).


@inlined()
def load(work, row, source):
    """Copies a vector, perhaps of bfloat16, into the beginning of a row of the working array."""
    for i in range(source.shape[0]):
        work[row, i] = widen(source[i])


@inlined()
def store(target, work, row):
    """Copies the beginning of a row of the working array into a vector, perhaps of bfloat16."""
    for i in range(target.shape[0]):
        target[i] = written(work[row, i], target[i])
