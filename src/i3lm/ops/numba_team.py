"""Work in shares for threads, for numba: of one piece, or of many that follow each other.

A parallel loop of numba has its threads meet at both ends. The code and data for that take 1.7 us,
and 14 to 28 where a large piece of work has driven them out of the caches, as a matrix of a
decoding step does. For many pieces one loop is started: the first thread that comes leads. It
hands out one piece after the other and takes shares of it, as all others do. Between pieces none is
waited for that has not taken one, so it is no matter whether threads run at the same time.

A share is done by a function of int64 numbers, given by its address (`i3lm.ops.numba_bridge`):
three of the piece's own, the number of the share and how many there are. It gives 1, or 0 if it
failed; an exception in it is printed, and is the same as 0.
"""

from __future__ import annotations

import os
import platform
from typing import Any

import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from i3lm.ops.numba_bridge import call, compiled, serial

__all__ = ["make_team", "share_at_once", "share_out", "work_together"]

# A team is 32 int64 numbers. What threads wait for lies in lines of memory of their own: the next
# share to be taken (as many as there are: none is left), how many are finished, and how many
# threads have come to lead. Behind them what the leader alone writes: the number of shares of a
# piece, its function and three numbers, and the leader's result; and how many shares failed.
_SIZE = 32
_NEXT, _FINISHED, _LEADERS, _SHARES = 0, 64, 128, 192  # their places, in bytes
_FUNCTION, _A, _B, _C, _RESULT, _FAILED = range(200, 248, 8)
_ENDED = 2**40  # as the next share: no piece will follow

_INTEGER = ir.IntType(64)
_PAUSES = {"x86_64": "llvm.x86.sse2.pause", "AMD64": "llvm.x86.sse2.pause"}
_PATIENCE = 1000  # looks, 10 us or more, after which others may want the processor


def make_team() -> np.ndarray:
    """Gives the numbers of a team, which may have one leader at a time."""
    return np.zeros(_SIZE, np.int64)


def _type_read(typing_context: Any, address: Any) -> tuple[Any, Any]:
    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        place = builder.inttoptr(values[0], _INTEGER.as_pointer())
        return builder.load_atomic(place, "seq_cst", 8)

    return types.int64(types.int64), generate


def _type_write(typing_context: Any, address: Any, number: Any) -> tuple[Any, Any]:
    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        place = builder.inttoptr(values[0], _INTEGER.as_pointer())
        builder.store_atomic(values[1], place, "seq_cst", 8)
        return context.get_dummy_value()

    return types.none(types.int64, types.int64), generate


def _type_count(typing_context: Any, address: Any) -> tuple[Any, Any]:
    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        place = builder.inttoptr(values[0], _INTEGER.as_pointer())
        return builder.atomic_rmw("add", place, _INTEGER(1), "seq_cst")

    return types.int64(types.int64), generate


def _type_call_of(name: str, result: Any) -> Any:
    """Types a call of a function without arguments, for its effect."""

    def type_call(typing_context: Any) -> tuple[Any, Any]:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            if name:
                form = ir.FunctionType(result, [])
                builder.call(cgutils.get_or_insert_function(builder.module, form, name), [])
            return context.get_dummy_value()

        return types.none(), generate

    return type_call


# Of one number that several threads use: it is read, written, or made one more, which gives what
# it was. And what a thread does between one look and the next: nothing, or let others run.
_read: Any = intrinsic(_type_read)
_write: Any = intrinsic(_type_write)
_count: Any = intrinsic(_type_count)
_pause: Any = intrinsic(_type_call_of(_PAUSES.get(platform.machine(), ""), ir.VoidType()))
_yield: Any = intrinsic(_type_call_of("sched_yield" if os.name == "posix" else "", ir.IntType(32)))


@serial()
def _wait(looks):
    """What a thread does after so many looks for which it had to wait; gives one more."""
    if looks < _PATIENCE:
        _pause()
    else:
        _yield()
    return looks + 1


@compiled()
def share_at_once(function, a, b, c, shares):
    """Does all shares of one piece of work; gives how many failed."""
    failed = 0
    for share in prange(shares):
        failed += 1 - call(function, a, b, c, share, shares)
    return failed


@serial()
def _do(team, share):
    function = _read(team + _FUNCTION)
    a, b, c = _read(team + _A), _read(team + _B), _read(team + _C)
    if not call(function, a, b, c, share, _read(team + _SHARES)):
        _count(team + _FAILED)
    _count(team + _FINISHED)


@serial()
def share_out(team, function, a, b, c):
    """For who leads a team: does all shares of a piece of work together with the others.

    Returns:
        1, or 0 where a share failed.
    """
    shares = _read(team + _SHARES)
    _write(team + _FUNCTION, function)
    _write(team + _A, a)
    _write(team + _B, b)
    _write(team + _C, c)
    _write(team + _FINISHED, 0)
    _write(team + _NEXT, 0)
    while True:
        share = _count(team + _NEXT)
        if share >= shares:
            break
        _do(team, share)
    looks = 0
    while _read(team + _FINISHED) < shares:
        looks = _wait(looks)
    return 1 if _read(team + _FAILED) == 0 else 0


@serial()
def _help(team):
    """Does shares of all that is handed out, until the leader has ended."""
    shares, looks = _read(team + _SHARES), 0
    while True:
        following = _read(team + _NEXT)
        if following >= _ENDED:
            return
        if following < shares:
            share = _count(team + _NEXT)
            # Another thread may have been faster. If not, this share is of what is handed out
            # now, and nothing else will be before it is done.
            if share < shares:
                _do(team, share)
            looks = 0
        else:
            looks = _wait(looks)


@serial()
def _join(leader, arguments, team):
    if _count(team + _LEADERS) == 0:
        _write(team + _RESULT, call(leader, arguments, team))
        _write(team + _NEXT, _ENDED)
    else:
        _help(team)


@serial()
def _begin(team, shares):
    _write(team + _NEXT, shares)
    _write(team + _LEADERS, 0)
    _write(team + _SHARES, shares)
    _write(team + _FAILED, 0)


@compiled()
def _join_all(leader, arguments, team, threads):
    for _ in prange(threads):
        _join(leader, arguments, team)


@serial()
def work_together(leader, arguments, team, threads):
    """Has threads follow a leader, who gives them what to do by `share_out`.

    Args:
        leader: The address of what the leader does, a function of two int64 numbers that gives
            one: of `arguments`, and of the team. If it fails, that is 0.
        arguments: A number of the caller's choice, such as an address.
        team: The address of what `make_team` gives.
        threads: Their number, at least 1, and that of the shares of each piece of work.

    Returns:
        What the leader gives.
    """
    _begin(team, threads)
    _join_all(leader, arguments, team, threads)
    return _read(team + _RESULT)
