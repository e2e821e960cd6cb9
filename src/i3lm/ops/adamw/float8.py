"""AdamW's averages in 8 bits a number: floats that share, in blocks, how small they can be.

A block of 128 numbers is a record of 130 bytes, its codes and their base (16 bits, the lower byte
first). A code counts the floats of a few bits of precision from the block's smallest one upwards,
so it is the upper bits of a float32 less the base. The average m has a sign and 3 bits behind the
leading one, the average v of squares no sign and 4; both span 16 powers of two below the block's
largest number. Blocks of such kind are those of arXiv:2110.02861, section 2.2.

What lies between two codes becomes either at random, by as much as it is nearer, so that it is
right on average (arXiv:1502.02551, section 3). So is an m below the smallest, which becomes it or
zero. A v below the smallest is raised to it: zero would make its step endless.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 128
RECORD = BLOCK + 2
# Bits of a float32 that are cut off: of numbers with a sign, and without.
SIGNED_CUT, UNSIGNED_CUT = 20, 19
SIGNED_TOP, UNSIGNED_TOP = 127, 255  # the largest code
NEAREST = 2**15  # in place of random bits
_SIZE, _ENDLESS = 0x7FFFFFFF, 0x7F800000


def records_of(size: int) -> tuple[int, int]:
    """The shape of the records of so many numbers."""
    return -(-size // BLOCK), RECORD


def encode(numbers: Tensor, signed: bool, random: Tensor) -> Tensor:
    """Gives the records of float32 numbers.

    Args:
        numbers: Any shape; without a sign, at least 0.
        signed: Whether they have a sign.
        random: 16 random bits for each number, as integers, shape (numbers.numel(),).

    Returns:
        Shape (blocks, 130), uint8.
    """
    rest = -numbers.numel() % BLOCK
    blocks = F.pad(numbers.float().flatten(), (0, rest)).view(-1, BLOCK)
    random = F.pad(random, (0, rest)).view(-1, BLOCK)
    cut, top = (SIGNED_CUT, SIGNED_TOP) if signed else (UNSIGNED_CUT, UNSIGNED_TOP)
    bits = blocks.view(torch.int32).long() & _SIZE
    base = ((bits.amax(1, keepdim=True) >> cut) + 1 - top).clamp_min(0)
    added = torch.where(bits < _ENDLESS, random << (cut - 16), 0)  # NaN must not be carried over
    codes = ((bits + added) >> cut) - base
    if signed:
        smallest = _float((base + 1) << cut)
        share = random.float() * 2.0**-16
        is_small = bits < (base + 1) << cut
        codes = torch.where(is_small, (blocks.abs() > share * smallest).long(), codes)
        codes = codes | (blocks.view(torch.int32) < 0).long() << 7
    codes = codes.clamp(0, 255)
    return torch.cat([codes, base & 255, base >> 8], dim=1).to(torch.uint8)


def decode(records: Tensor, signed: bool, shape: tuple[int, ...]) -> Tensor:
    """Gives the float32 numbers of records, in a shape."""
    whole = records.long()
    codes, base = whole[:, :BLOCK], whole[:, BLOCK:-1] | whole[:, -1:] << 8
    if signed:
        size = codes & SIGNED_TOP
        bits = torch.where(size > 0, size + base, 0) << SIGNED_CUT
        numbers = torch.where(codes > SIGNED_TOP, -_float(bits), _float(bits))
    else:
        numbers = _float((codes + base) << UNSIGNED_CUT)
    return numbers.flatten()[: torch.Size(shape).numel()].view(shape)


def _float(bits: Tensor) -> Tensor:
    return bits.int().view(torch.float32)
