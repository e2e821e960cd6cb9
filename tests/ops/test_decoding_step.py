"""Kernels of a decoding step by themselves; what they compute is tested with the models."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from i3lm.ops.decoding_step import numba as kernels
from i3lm.ops.numba_bridge import match_threads

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
    """Arguments of a kernel, without the number of tasks."""
    groups = [
        [(0.1 + abs(random.standard_normal(shape))).astype(np.float32) for shape in shapes]
        for shapes in [[(1, C), (C,), (C,)], *SHAPES[name]]
    ]
    (x, weight, bias), vectors, matrices, states = groups
    biases = [random.uniform(size=len(matrix)).astype(np.float32) for matrix in matrices]
    scales = [np.zeros(0, np.float32) for _ in matrices]
    if name == "attention":  # of the last but one token that there is room for
        states[2:2] = [6, random.uniform(size=(1, 6)) < 0.8]
        states[3][0, -1] = True
    return x, (weight, bias, 1e-5), *map(tuple, (vectors, matrices, scales, biases, states))


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
    random, heap = np.random.default_rng(0), []
    for _ in range(8):
        arguments, seen = draw(random, name), set()
        for turn in range(60):
            heap += [np.empty(size, np.uint8) for size in random.integers(1, 200, 30)]
            random.shuffle(heap)
            del heap[::2]
            *inputs, states = scatter(random, heap, arguments)
            del heap[::3]
            tasks = 1 + turn % match_threads()
            output = getattr(kernels, name)(*inputs, states, tasks)
            assert np.isfinite(output).all()
            seen.add(b"".join(np.asarray(array).tobytes() for array in (output, *states)))
        assert len(seen) == 1
