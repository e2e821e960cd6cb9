"""Work that threads share, led by whichever comes first."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import carray

from i3lm.ops.numba_bridge import address_of, call, pointer, serial
from i3lm.ops.numba_team import (
    _begin,
    _count,
    _read,
    _wait,
    make_team,
    share_at_once,
    share_out,
    work_together,
)

SIZE, PIECES = 12, 2000


def _add_share(numbers, piece, size, share, shares):
    """Adds to each number of a share what the whole before it was: so pieces must be in order."""
    array = carray(pointer(numbers), (2, size), np.int64)
    source, target = piece % 2, 1 - piece % 2
    for i in range(share, size, shares):
        total = 0
        for j in range(size):
            total += array[source, j]
        array[target, i] = (total + i * piece) % 1000003
    return 1


def _lead_pieces(arguments, team):
    function, numbers, pieces, size = carray(pointer(arguments), (4,), np.int64)
    for piece in range(pieces):
        if not share_out(team, function, numbers, piece, size):
            return -piece
    return pieces


def _fail_third(a, piece, c, share, shares):
    return 0 if piece == 3 and share == shares - 1 else 1


def _raise(arguments, team):
    raise ValueError("this leader fails")


def _raise_in_share(a, b, c, share, shares):
    raise ValueError("this share fails")


def run(share: int, numbers: np.ndarray, pieces: int, threads: int, team: np.ndarray) -> int:
    """Has threads do pieces of work."""
    arguments = np.array([share, numbers.ctypes.data, pieces, SIZE], np.int64)
    leader = address_of(_lead_pieces)
    return work_together(leader, arguments.ctypes.data, team.ctypes.data, threads)


def expected(numbers: np.ndarray, pieces: int) -> np.ndarray:
    """What pieces of work make of numbers."""
    numbers = numbers.copy()
    for piece in range(pieces):
        total = int(numbers[piece % 2].sum())
        numbers[1 - piece % 2] = (total + np.arange(SIZE) * piece) % 1000003
    return numbers


@settings(max_examples=60, deadline=None, derandomize=True)
@given(threads=st.integers(1, 9), pieces=st.integers(0, 60), uses=st.integers(1, 3))
def test_pieces_follow_each_other(threads, pieces, uses):
    """With more threads than numba has, some come when all is done."""
    numbers = np.random.default_rng(pieces).integers(0, 1000, (2, SIZE))
    wanted, team = numbers, make_team()
    for _ in range(uses):
        wanted = expected(wanted, pieces)
        assert run(address_of(_add_share), numbers, pieces, threads, team) == pieces
        assert (numbers == wanted).all()


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_failed_share_is_told_to_the_leader(threads: int):
    team, numbers = make_team(), np.zeros((2, SIZE), np.int64)
    assert run(address_of(_fail_third), numbers, 9, threads, team) == -3
    assert run(address_of(_add_share), numbers, 9, threads, team) == 9  # and then forgotten


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("threads", [1, 2])
def test_exceptions_end_the_work_in_whatever_thread(threads: int):
    team, numbers = make_team(), np.zeros((2, SIZE), np.int64)
    assert work_together(address_of(_raise), 0, team.ctypes.data, threads) == 0
    assert run(address_of(_raise_in_share), numbers, 3, threads, team) == 0
    assert share_at_once(address_of(_raise_in_share), 0, 0, 0, 3) == 3


@pytest.mark.parametrize("shares", [1, 2, 7])
def test_one_piece_at_once(shares: int):
    numbers = np.random.default_rng(0).integers(0, 1000, (2, SIZE))
    wanted, place = expected(numbers, 1), numbers.ctypes.data
    assert share_at_once(address_of(_add_share), place, 0, SIZE, shares) == 0
    assert (numbers == wanted).all()
    assert share_at_once(address_of(_fail_third), 0, 3, 0, shares) == 1


def _count_share(table, piece, meets, share, shares):
    """Counts itself, if every share of the piece before is done once; some pieces meet first."""
    met, counts = table, table + 8 + 8 * piece * shares
    for other in range(shares if piece else 0):
        if _read(counts - 8 * (other + 1)) != 1:
            return 0
    if piece % meets == 0:
        here, looks = _count(table + 8 * (1 + PIECES * shares + piece)) + 1, 0
        while here < shares and looks < 200_000:  # 10 ms and more: others are let run
            looks = _wait(looks)
            here = _read(table + 8 * (1 + PIECES * shares + piece))
        if share == 0 and here == shares:
            _count(met)
    else:
        for _ in range((7 * piece + 13 * share) % 41 * 20):
            _wait(0)
    _count(counts + 8 * share)
    return 1


def count_shares(meets: int, threads: int) -> tuple[int, bool, int]:
    """Has threads count their shares of pieces.

    Returns:
        How many pieces were done, whether each share was done once, and at how many pieces all
        threads were there at once.
    """
    table = np.zeros(1 + PIECES * threads + PIECES, np.int64)
    arguments = np.array([address_of(_count_share), table.ctypes.data, PIECES, meets], np.int64)
    team = make_team()
    leader = address_of(_lead_pieces)
    done = work_together(leader, arguments.ctypes.data, team.ctypes.data, threads)
    return done, bool((table[1 : 1 + PIECES * threads] == 1).all()), int(table[0])


def run_alone() -> int:
    """Hands out pieces of two shares where nobody else is."""
    numbers, team = np.zeros((2, SIZE), np.int64), make_team()
    arguments = np.array([address_of(_add_share), numbers.ctypes.data, 5, SIZE], np.int64)
    _begin(team.ctypes.data, 2)
    return _lead_alone(address_of(_lead_pieces), arguments.ctypes.data, team.ctypes.data)


@serial()
def _lead_alone(leader, arguments, team):
    return call(leader, arguments, team)


# In a process of its own: a mistake would have it wait for ever.
TWO_THREADS = """
import numba
from tests.ops.test_numba_team import count_shares, run_alone
print(numba.threading_layer(), run_alone(), *(x for m in (4, 97) for x in count_shares(m, 2)))
"""


@pytest.mark.parametrize("layer", ["default", "workqueue"])
def test_each_share_is_done_once_by_threads_that_race(layer: str):
    variables = {**os.environ, "NUMBA_NUM_THREADS": "2", "NUMBA_THREADING_LAYER": layer}
    variables.pop("OMP_NUM_THREADS", None)
    done = subprocess.run(
        [sys.executable, "-c", TWO_THREADS],
        env=variables,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    _, alone, *counted = done.stdout.split()
    assert alone == "5"
    assert counted[0::3] == [str(PIECES)] * 2
    assert counted[1::3] == ["True"] * 2
    assert all(int(met) > 0 for met in counted[2::3])  # else it would test one thread
