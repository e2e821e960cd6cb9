"""The 8-bit records of `float8` inside numba kernels, a piece of one block at a time."""

from __future__ import annotations

import numpy as np
from numba import carray

from i3lm.ops.adamw.float8 import (
    BLOCK,
    RECORD,
    SIGNED_CUT,
    SIGNED_TOP,
    UNSIGNED_CUT,
    UNSIGNED_TOP,
)
from i3lm.ops.numba_bridge import inlined, pointer

_SIGNED_CUT, _UNSIGNED_CUT = np.int32(SIGNED_CUT), np.int32(UNSIGNED_CUT)
_SIGNED_TOP, _UNSIGNED_TOP = np.int32(SIGNED_TOP), np.int32(UNSIGNED_TOP)
_SIZE, _SIGN = np.int32(0x7FFFFFFF), np.int32(31)
_SEVEN, _EIGHT, _SIXTEEN = np.int32(7), np.int32(8), np.int32(16)
_LOW_HALF, _ONE, _ZERO = np.int32(0xFFFF), np.int32(1), np.int32(0)
_SHARE, _ENDLESS = np.float32(2.0**-16), np.int32(0x7F800000)


@inlined()
def _record(address, start):
    """The record at an address of the block that begins with number `start`."""
    place = start // BLOCK * RECORD
    return carray(pointer(address), place + RECORD, np.uint8)[place:]


@inlined()
def _base(record):
    return np.int32(np.int32(record[BLOCK]) | np.int32(record[BLOCK + 1]) << _EIGHT)


@inlined()
def _keep_base(record, top, highest):
    base = max(np.int32(top + _ONE - highest), _ZERO)
    record[BLOCK] = np.uint8(base)
    record[BLOCK + 1] = np.uint8(base >> _EIGHT)
    return base


@inlined()
def _largest_bits(row):
    top = _ZERO
    for i in range(BLOCK):
        top = max(top, np.int32(np.float32(row[i]).view(np.int32) & _SIZE))
    return top


@inlined()
def load_signed(row, address, start):
    """Copies the numbers of a block into a row; behind the last number there are any."""
    record = _record(address, start)
    base = _base(record)
    for i in range(BLOCK):
        code = np.int32(record[i])
        size = np.int32(code & _SIGNED_TOP)
        bits = np.int32(np.int32(size + base) << _SIGNED_CUT) if size > 0 else _ZERO
        row[i] = np.int32(bits | np.int32(np.int32(code >> _SEVEN) << _SIGN)).view(np.float32)


@inlined()
def load_unsigned(row, address, start):
    """As `load_signed`, of numbers without a sign."""
    record = _record(address, start)
    base = _base(record)
    for i in range(BLOCK):
        code = np.int32(record[i])
        row[i] = np.int32(np.int32(code + base) << _UNSIGNED_CUT).view(np.float32)


@inlined()
def store_signed(row, random, address, start):
    """Writes a block, rounded by the lower half of random numbers; all of the row counts."""
    record = _record(address, start)
    base = _keep_base(record, np.int32(_largest_bits(row) >> _SIGNED_CUT), _SIGNED_TOP)
    edge = np.int32(np.int32(base + _ONE) << _SIGNED_CUT)
    smallest = edge.view(np.float32)
    for i in range(BLOCK):
        whole = np.float32(row[i]).view(np.int32)
        bits, drawn = np.int32(whole & _SIZE), np.int32(np.int32(random[i]) & _LOW_HALF)
        added = np.int32(drawn << np.int32(_SIGNED_CUT - _SIXTEEN))
        moved = np.int32(bits + added) if bits < _ENDLESS else bits
        code = np.int32(np.int32(moved >> _SIGNED_CUT) - base)
        if bits < edge:
            share = np.float32(drawn) * _SHARE
            code = _ONE if bits.view(np.float32) > share * smallest else _ZERO
        record[i] = np.uint8(code | np.int32(np.int32(whole >> _SIGN) & np.int32(128)))


@inlined()
def store_unsigned(row, random, address, start):
    """As `store_signed`, of numbers without a sign, by the upper half."""
    record = _record(address, start)
    base = _keep_base(record, np.int32(_largest_bits(row) >> _UNSIGNED_CUT), _UNSIGNED_TOP)
    for i in range(BLOCK):
        bits = np.int32(np.float32(row[i]).view(np.int32) & _SIZE)
        drawn = np.int32(np.int32(random[i] >> np.uint32(16)) & _LOW_HALF)
        added = np.int32(drawn << np.int32(_UNSIGNED_CUT - _SIXTEEN))
        moved = np.int32(bits + added) if bits < _ENDLESS else bits
        code = np.int32(np.int32(moved >> _UNSIGNED_CUT) - base)
        record[i] = np.uint8(max(code, _ZERO))
