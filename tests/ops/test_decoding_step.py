"""Kernels of a decoding step by themselves; what they compute is tested with the models."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from i3lm.ops.decoding_step.numba_table import Table, record_of
from i3lm.ops.numba_bridge import address_of

C, N, WIDE = 33, 6, 66  # 33 channels: the last one is past every vector of a compiled loop

# The shapes of a kernel's vectors, matrices and states.
SHAPES: dict[str, tuple[list[tuple[int, ...]], ...]] = {
    "time_mix": ([(C,)] * 5, [(C, C)] * 4, [(1, 3, C), (1, C)]),
    "channel_mix": ([(C,)] * 2, [(WIDE, C), (C, C), (C, WIDE)], [(1, C)]),
    "state_space": ([(C,), (N, N), (N, C), (C, N), (C,)], [], [(1, C + N)]),
    "feed_forward": ([], [(WIDE, C), (C, WIDE)], []),
    "attention": ([], [(3 * C, C), (C, C)], [(1, 3, 7, C // 3), (1, 3, 7, C // 3), (2, 1, C // 3)]),
}


def draw(random: np.random.Generator, name: str) -> tuple[Any, ...]:
    """Inputs, norm, vectors, matrices, biases and states of a kernel."""
    groups = [
        tuple((0.1 + abs(random.standard_normal(shape))).astype(np.float32) for shape in shapes)
        for shapes in [[(1, C)], [(C,), (C,)], *SHAPES[name]]
    ]
    x, norm, vectors, matrices, states = groups
    biases = tuple(random.uniform(size=len(matrix)).astype(np.float32) for matrix in matrices)
    if name == "attention":  # of the last but one token that there is room for
        mask = random.uniform(size=(1, 6)) < 0.8
        mask[0, -1] = True
        states = (*states[:2], mask, states[2])
    return *x, norm, vectors, matrices, biases, states


def run(name: str, x: Any, norm: Any, vectors: Any, matrices: Any, biases: Any, states: Any):
    """A kernel on arrays; x and the states are replaced."""
    groups = [[torch.from_numpy(array) for array in group] for group in (norm, vectors, matrices)]
    width = 3 if name == "attention" else N if name == "state_space" else WIDE
    summands = [torch.from_numpy(bias) for bias in biases]
    table = Table([record_of(name, 1e-5, width, *groups, biases=summands)], 1, C)
    table.records["states"][0, : len(states)] = [state.ctypes.data for state in states]
    table.records["room"], table.records["count"] = 7, 6
    table.run(torch.from_numpy(x), 0, 1)


def scatter(random: np.random.Generator, heap: list[np.ndarray], value: Any) -> Any:
    """Copies arrays, in tuples or not, to places between others that come and go on the heap.

    A compiled loop asks how near its arrays are, and small arrays of a heap are close.
    """
    if isinstance(value, tuple):
        parts = {i: scatter(random, heap, value[i]) for i in random.permutation(len(value))}
        return tuple(parts[i] for i in range(len(value)))
    if not isinstance(value, np.ndarray) or value.size > 3 * C:  # matrices stay
        return value
    heap += [np.empty(size, np.uint8) for size in random.integers(1, 400, 2)]
    return value.copy()


@pytest.mark.parametrize("name", SHAPES)
def test_bits_do_not_depend_on_where_arrays_lie(name: str):
    random, heap, threads = np.random.default_rng(0), [], torch.get_num_threads()
    for _ in range(8):
        arguments, seen = draw(random, name), set()
        for turn in range(60):
            heap += [np.empty(size, np.uint8) for size in random.integers(1, 200, 30)]
            random.shuffle(heap)
            del heap[::2]
            inputs = scatter(random, heap, arguments)
            del heap[::3]
            torch.set_num_threads(1 + turn % threads)
            run(name, *inputs)
            assert np.isfinite(inputs[0]).all()
            seen.add(b"".join(array.tobytes() for array in (inputs[0], *inputs[-1])))
        assert len(seen) == 1


def _fail(R, C, x, at, work, team):
    return 0


def test_a_kernel_that_fails_is_an_error():
    random = np.random.default_rng(0)
    _, norm, _, matrices, *_ = draw(random, "feed_forward")
    groups = [[torch.from_numpy(array) for array in group] for group in (norm, (), matrices)]
    record = record_of("feed_forward", 1e-5, WIDE, *groups)
    table = Table([record, record], 1, C)
    table.records["kernel"][1] = address_of(_fail)
    with pytest.raises(RuntimeError, match="kernel 1 of a decoding step failed"):
        table.run(torch.randn(1, C), 0, 2)
