"""Products of matrices inside a kernel, held against exact ones: of whole numbers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from i3lm.ops.numba_products import add_product, whole_columns

# What stands around a matrix and must not be read into a result, or written.
GUARD = 1e30


def framed(matrix: np.ndarray, transposed: bool) -> tuple[np.ndarray, np.ndarray]:
    """A copy of a matrix that lies inside a larger one, by rows or by columns; and the larger."""
    inner = matrix.T if transposed else matrix
    outer = np.full((inner.shape[0] + 3, inner.shape[1] + 5), GUARD, inner.dtype)
    view = outer[1:-2, 2:-3]
    view[:] = inner
    return (view.T if transposed else view), outer


def check(dtype: type, M: int, K: int, columns: int, by_columns: bool, seed: int) -> None:
    """Holds a product of small whole numbers, whose sums are exact, against NumPy's."""
    N = whole_columns(columns, np.dtype(dtype).itemsize)
    generator = np.random.default_rng(seed)
    left, right, target = (
        generator.integers(-8, 9, shape).astype(dtype) for shape in ((M, K), (K, N), (M, N))
    )
    expected = target + left @ right
    inner_left, _ = framed(left, by_columns)
    inner_right, _ = framed(right, False)
    inner_target, outer = framed(target, False)
    add_product(inner_left, inner_right, inner_target)
    np.testing.assert_array_equal(inner_target, expected)
    inner_target[:] = GUARD
    assert (outer == GUARD).all()


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    dtype=st.sampled_from([np.float32, np.float64]),
    M=st.integers(0, 40),
    K=st.integers(0, 70),
    columns=st.integers(1, 130),
    by_columns=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
@example(dtype=np.float32, M=8, K=32, columns=128, by_columns=False, seed=0)
@example(dtype=np.float32, M=9, K=1, columns=1, by_columns=True, seed=0)
@example(dtype=np.float64, M=17, K=65, columns=33, by_columns=True, seed=0)
def test_a_product_is_exact_where_its_sums_are(dtype, M, K, columns, by_columns, seed):
    check(dtype, M, K, columns, by_columns, seed)


def test_columns_are_made_whole():
    for size in (4, 8):
        piece = whole_columns(1, size)
        assert piece * size % 64 == 0
        assert [whole_columns(n, size) for n in (0, 1, piece, piece + 1)] == [
            *(0, piece, piece),
            2 * piece,
        ]


def test_a_row_is_summed_in_one_order_alone_and_among_others():
    generator = np.random.default_rng(0)
    left = generator.standard_normal((11, 300)).astype(np.float32)
    right = generator.standard_normal((300, whole_columns(20, 4))).astype(np.float32)
    together = np.zeros((11, right.shape[1]), np.float32)
    add_product(left, right, together)
    for row in range(11):
        alone = np.zeros((1, right.shape[1]), np.float32)
        add_product(left[row : row + 1], right, alone)
        np.testing.assert_array_equal(alone[0], together[row])


@pytest.mark.parametrize("what", ["read-only", "by columns"])
def test_a_target_that_it_cannot_write_is_refused(what: str):
    left, right = np.ones((4, 3)), np.ones((3, whole_columns(1, 8)))
    target = np.zeros((right.shape[1], 4)).T if what == "by columns" else left @ right
    target.setflags(write=what != "read-only")
    with pytest.raises(numba.TypingError):
        add_product(left, right, target)


def test_a_processor_without_avx512_takes_smaller_pieces(tmp_path: Path):
    program = (
        "import numpy as np\n"
        "from tests.ops.test_numba_products import check\n"
        "from i3lm.ops import numba_products\n"
        "print(numba_products._ROWS, numba_products._LINES)\n"
        "for by_columns in (False, True):\n"
        "    check(np.float32, 13, 40, 70, by_columns, 0)\n"
        "    check(np.float64, 13, 40, 70, by_columns, 0)\n"
    )
    # The plainest of its kind, whose code every processor runs.
    environment = {"NUMBA_CPU_NAME": "generic", "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **environment},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["4", "1"]
