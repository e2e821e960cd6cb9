"""The kernels as a step of decoding calls them: with a table that says where everything lies.

It has one record for each half of a layer. Handing numba the hundreds of arrays of a model anew
for every token would take as long as a small model computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numba import carray
from torch import Tensor

from i3lm.ops.decoding_step import numba as halves
from i3lm.ops.decoding_step.reference import EPSILON
from i3lm.ops.numba_bridge import as_array, bits_of, match_threads, pointer, serial

__all__ = ["KERNELS", "address_of", "empty_array", "half", "match_threads", "record_of", "table_of"]

_ADDRESS = np.int64  # of contiguous memory; 0 where there is nothing
_STEP = np.dtype(
    [
        ("width", np.int64),  # of the middle or the state, or the number of heads
        ("epsilon", np.float64),
        ("norm", _ADDRESS, (2,)),  # weight and bias
        ("vectors", _ADDRESS, (5,)),
        ("weights", _ADDRESS, (4,)),
        ("scales", _ADDRESS, (4,)),
        ("biases", _ADDRESS, (4,)),
        # What is new with every token. Of an attention: the first of the keys and of the values,
        # the mask, and cosines and sines.
        ("states", _ADDRESS, (4,)),
        ("room", np.int64),  # tokens from one head's keys to the next head's
        ("count", np.int64),  # tokens that an attention looks at, the new one the last
    ]
)


@serial()
def _floats(address, shape):
    return carray(pointer(address), shape, np.float32)


@serial()
def _record(address):
    return carray(pointer(address), (1,), _STEP)[0]


@serial()
def _norm(step, C):
    return _floats(step.norm[0], (C,)), _floats(step.norm[1], (C,)), step.epsilon


@serial()
def _map(step, m, N, K, like):
    """A matrix, its scale and its bias, the last two perhaps empty."""
    scale, bias = step.scales[m], step.biases[m]
    return (
        carray(pointer(step.weights[m]), (N, K), like.dtype),
        _floats(scale, (N if scale else 0,)),
        _floats(bias, (N if bias else 0,)),
    )


@serial()
def _time_mix(R, C, x, step, like, tasks):
    x, step = _floats(x, (R, C)), _record(step)
    at = step.vectors
    vectors = (
        _floats(at[0], (C,)),
        _floats(at[1], (C,)),
        _floats(at[2], (C,)),
        _floats(at[3], (C,)),
        _floats(at[4], (C,)),
    )
    k, v = _map(step, 0, C, C, like), _map(step, 1, C, C, like)
    r, o = _map(step, 2, C, C, like), _map(step, 3, C, C, like)
    weights, scales = (k[0], v[0], r[0], o[0]), (k[1], v[1], r[1], o[1])
    biases = k[2], v[2], r[2], o[2]
    states = _floats(step.states[0], (R, 3, C)), _floats(step.states[1], (R, C))
    x[:] = halves.time_mix(x, _norm(step, C), vectors, weights, scales, biases, states, tasks)


@serial()
def _channel_mix(R, C, x, step, like, tasks):
    x, step = _floats(x, (R, C)), _record(step)
    F = step.width
    vectors = _floats(step.vectors[0], (C,)), _floats(step.vectors[1], (C,))
    k, r, v = _map(step, 0, F, C, like), _map(step, 1, C, C, like), _map(step, 2, C, F, like)
    weights, scales, biases = (k[0], r[0], v[0]), (k[1], r[1], v[1]), (k[2], r[2], v[2])
    states = (_floats(step.states[0], (R, C)),)
    x[:] = halves.channel_mix(x, _norm(step, C), vectors, weights, scales, biases, states, tasks)


@serial()
def _state_space(R, C, x, step, like, tasks):
    x, step = _floats(x, (R, C)), _record(step)
    N = step.width
    at = step.vectors
    vectors = (
        _floats(at[0], (C,)),
        _floats(at[1], (N, N)),
        _floats(at[2], (N, C)),
        _floats(at[3], (C, N)),
        _floats(at[4], (C,)),
    )
    states = (_floats(step.states[0], (R, C + N)),)
    x[:] = halves.state_space(x, _norm(step, C), vectors, (), (), (), states, tasks)


@serial()
def _feed_forward(R, C, x, step, like, tasks):
    x, step = _floats(x, (R, C)), _record(step)
    F = step.width
    up, down = _map(step, 0, F, C, like), _map(step, 1, C, F, like)
    weights, scales, biases = (up[0], down[0]), (up[1], down[1]), (up[2], down[2])
    x[:] = halves.feed_forward(x, _norm(step, C), (), weights, scales, biases, (), tasks)


@serial()
def _attention(R, C, x, step, like, tasks):
    x, step = _floats(x, (R, C)), _record(step)
    H, count = step.width, step.count
    shape = (R, H, step.room, C // H)
    keys, values = _floats(step.states[0], shape), _floats(step.states[1], shape)
    seen = carray(pointer(step.states[2]), (R if step.states[2] else 0, count), np.bool_)
    heads, o = _map(step, 0, 3 * C, C, like), _map(step, 1, C, C, like)
    weights, scales, biases = (heads[0], o[0]), (heads[1], o[1]), (heads[2], o[2])
    turned = (2, R if step.states[3] else 0, C // H)
    states = keys, values, count, seen, _floats(step.states[3], turned)
    x[:] = halves.attention(x, _norm(step, C), (), weights, scales, biases, states, tasks)


# By name. Each replaces x, one token of each sequence, by what the half makes of it. It takes the
# numbers of rows and of channels, the address of x, float32, shape (R, C), and of the half's
# record, an array of the matrices' dtype (bfloat16 as uint16), and the number of threads.
KERNELS: dict[str, Any] = {
    "time_mix": _time_mix,
    "channel_mix": _channel_mix,
    "state_space": _state_space,
    "feed_forward": _feed_forward,
    "attention": _attention,
}


def record_of(epsilon: float, width: int, **tensors: Sequence[Tensor | None]) -> Any:
    """The record of a half whose contiguous tensors, by the names of its fields, stay in memory."""
    record = np.zeros((), _STEP)
    record["epsilon"], record["width"] = epsilon, width
    for name, group in tensors.items():
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in group]
        record[name][: len(addresses)] = addresses
    return record


def table_of(records: list[Any]) -> np.ndarray:
    """A table of records."""
    return np.array(records, _STEP)


def address_of(table: np.ndarray) -> int:
    """Where a table begins; its records follow each other."""
    return table.__array_interface__["data"][0]


def empty_array(dtype: torch.dtype) -> np.ndarray:
    """What tells a kernel the dtype of matrices."""
    return as_array(bits_of(torch.empty(0, dtype=dtype)))


def half(
    name: str,
    x: Tensor,
    norm: list[Tensor],
    vectors: list[Tensor],
    weights: list[Tensor],
    states: list[Tensor],
) -> list[Tensor]:
    """What `reference.half` gives, by a kernel; for checks."""
    output, *states = [tensor.clone() for tensor in (x, *states)]
    attends = name == "attention"
    width = states[0].shape[1] if attends else (*weights, *vectors[1:])[0].shape[0]
    record = record_of(EPSILON, width, norm=norm, vectors=vectors, weights=weights, states=states)
    if attends:
        record["room"] = record["count"] = states[0].shape[2]
    table, like = table_of([record]), empty_array(weights[0].dtype if weights else x.dtype)
    place = output.data_ptr(), address_of(table)
    KERNELS[name](*output.shape, *place, like, match_threads())
    return [output, *states]
