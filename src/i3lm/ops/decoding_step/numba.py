"""The halves of a layer for one new token, and what is before and behind all layers, by numba.

A step of decoding reads every matrix once and computes little else, so what counts is that nothing
stands between one matrix and the next. Only products and the heads of an attention are worth two
threads; all else is short and serial. `run` goes through a table with one record for each half,
which says where everything lies and which functions compute it. These call each other by address:
compiled into one another they would be compiled, and optimised, many times over.

All numbers are float32, but for matrices of bfloat16 or int8. The inputs x have the shape (R, C), a
row per sequence, and are replaced by the outputs; so are the states.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numba import carray

from i3lm.ops.linear.numba import HEIGHT, INPUT, NUMBERS, OUTPUT, WIDTH
from i3lm.ops.numba_bridge import (
    call,
    exp,
    floats,
    inlined,
    pointer,
    serial,
    serial_as_written,
)
from i3lm.ops.numba_team import share_out
from i3lm.ops.wkv.numba import next_token
from i3lm.ops.wkv.reference import FASTEST_DECAY

__all__ = ["KERNELS", "STEP", "attend", "floats_needed", "run"]

_ADDRESS = np.int64  # of contiguous memory; 0 where there is nothing
STEP = np.dtype(
    [
        ("products", _ADDRESS, (4, NUMBERS)),  # as `i3lm.ops.linear.numba` takes them
        ("kernel", _ADDRESS),  # the half itself
        ("multiply", _ADDRESS),
        ("attend", _ADDRESS),
        ("width", np.int64),  # of the middle or the state, or the number of heads
        # Of an attention: the projections of its input, and what its heads make of them.
        ("projected", _ADDRESS),
        ("attended", _ADDRESS),
        ("epsilon", np.float64),
        ("norm", _ADDRESS, (2,)),  # weight and bias
        ("vectors", _ADDRESS, (5,)),
        # What is new with every token. Of an attention: the first of the keys and of the values,
        # the mask, and cosines and sines. Of an embedding: ids and positions; of a head: where the
        # address of the logits stands.
        ("states", _ADDRESS, (4,)),
        ("room", np.int64),  # tokens from one head's keys to the next head's
        ("count", np.int64),  # tokens that an attention looks at, the new one the last
    ]
)
_STEP_BYTES = STEP.itemsize
_LOG_FASTEST = np.float32(np.log(-FASTEST_DECAY))

# Loops are spelt out: for `x += y` numba also compiles, for three seconds, the words of an error.


@serial()
def _record(address):
    return carray(pointer(address), (1,), STEP)[0]


def run(arguments, team):
    """Replaces x (R, C) by what kernels make of it, one after the other; leads a team.

    Args:
        arguments: The address of int64 numbers: R, C, the address of x, that of the first record,
            which the others follow, how many they are, and the address of memory for
            `floats_needed` numbers.
        team: The address of the team (`i3lm.ops.numba_team`).

    Returns:
        How many were computed; fewer than asked for if one failed.
    """
    R, C, x, step, count, work = carray(pointer(arguments), (6,), np.int64)
    for i in range(count):
        if not call(_record(step).kernel, R, C, x, step, work, team):
            return i
        step += _STEP_BYTES
    return count


@serial()
def _multiply(step, first, count, R, x, outputs, team):
    """Multiplies inputs that follow each other in memory, from `x` on, by matrices of a half.

    Args:
        step: The address of the record.
        first: The number of the first matrix.
        count: How many of them; each has its own input and output.
        R: Rows.
        x: The address of the inputs.
        outputs: The address of the outputs, which follow each other too.
        team: The address of the team.
    """
    products = carray(pointer(step), (4, NUMBERS), np.int64)
    for m in range(first, first + count):
        products[m, INPUT], products[m, OUTPUT] = x, outputs
        x += 4 * R * products[m, WIDTH]
        outputs += 4 * R * products[m, HEIGHT]
    at = step + 8 * NUMBERS * first
    return share_out(team, _record(step).multiply, at, count, R)


@serial()
def _moments(x):
    """Mean and variance of a vector."""
    C = np.float32(x.size)
    mean = np.float32(0)
    for i in range(x.size):
        mean += x[i]
    mean /= C
    variance = np.float32(0)
    for i in range(x.size):
        variance += (x[i] - mean) ** 2
    return mean, variance / C


@serial_as_written()
def _normalise(x, weight, bias, epsilon, output):
    for r in range(x.shape[0]):
        mean, variance = _moments(x[r])
        scale = np.float32(1) / np.sqrt(variance + np.float32(epsilon))
        for i in range(x.shape[1]):
            output[r, i] = (x[r, i] - mean) * scale * weight[i] + bias[i]


@serial()
def _norm(x, step, output):
    C = x.shape[1]
    weight, bias = floats(step.norm[0], (C,)), floats(step.norm[1], (C,))
    _normalise(x, weight, bias, step.epsilon, output)


@serial_as_written()
def _mix(x, previous, share, output):
    for r in range(x.shape[0]):
        for i in range(x.shape[1]):
            output[r, i] = (x[r, i] - previous[r, i]) * share[i] + previous[r, i]


@inlined()
def _sigmoid(x):
    one = np.float32(1)
    small = exp(-abs(x))
    return (one if x >= 0 else small) / (one + small)


@inlined()
def _gelu(x):
    """``x Phi(x)``, with the error function of Abramowitz and Stegun 7.1.26 (to 1.5e-7)."""
    one = np.float32(1)
    z = abs(x) * np.float32(0.70710678)
    t = one / (one + np.float32(0.3275911) * z)
    p = np.float32(1.061405429)
    p = p * t + np.float32(-1.453152027)
    p = p * t + np.float32(1.421413741)
    p = p * t + np.float32(-0.284496736)
    p = p * t + np.float32(0.254829592)
    tail = np.float32(0.5) * p * t * exp(-z * z)
    return x * (one - tail if x >= 0 else tail)


@serial_as_written()
def _gate(receptance, values):
    for r in range(receptance.shape[0]):
        for i in range(receptance.shape[1]):
            values[r, i] *= _sigmoid(receptance[r, i])


@serial_as_written()
def _apply_gelu(x):
    for r in range(x.shape[0]):
        for i in range(x.shape[1]):
            x[r, i] = _gelu(x[r, i])


@serial_as_written()
def _apply_squared_relu(x):
    for r in range(x.shape[0]):
        for i in range(x.shape[1]):
            positive = max(x[r, i], np.float32(0))
            x[r, i] = positive * positive


@serial_as_written()
def _write_log_decay(time_decay, decay):
    for i in range(decay.size):
        decay[i] = -exp(min(time_decay[i], _LOG_FASTEST))


@serial_as_written()
def _copy(x, output):
    for r in range(x.shape[0]):
        for i in range(x.shape[1]):
            output[r, i] = x[r, i]


@serial_as_written()
def _add(total, x):
    for r in range(x.shape[0]):
        for i in range(x.shape[1]):
            total[r, i] += x[r, i]


@serial_as_written()
def _turn(x, cosine, sine):
    """Turns queries or keys (H, D) of one token by the angles of its position."""
    half = x.shape[1] // 2
    for h in range(x.shape[0]):
        for i in range(half):
            low, high = x[h, i], x[h, half + i]
            x[h, i] = low * cosine[i] - high * sine[i]
            x[h, half + i] = high * cosine[half + i] + low * sine[half + i]


@serial()
def _dot(x, y):
    total = np.float32(0)
    for i in range(x.size):
        total += x[i] * y[i]
    return total


@serial_as_written()
def _softmax(scores):
    top, total = np.float32(-np.inf), np.float32(0)
    for s in range(scores.size):
        top = max(top, scores[s])
    for s in range(scores.size):
        scores[s] = exp(scores[s] - top)
        total += scores[s]
    for s in range(scores.size):
        scores[s] /= total


@serial()
def _score(query, keys, scores):
    scale = np.float32(1 / np.sqrt(query.size))
    for s in range(scores.size):
        total = np.float32(0)
        for i in range(query.size):
            total += query[i] * keys[s, i]
        scores[s] = total * scale


@serial_as_written()
def _sum_up(scores, values, output):
    for i in range(output.size):
        output[i] = 0
    for s in range(scores.size):
        for i in range(output.size):
            output[i] += scores[s] * values[s, i]


@serial()
def _attend_head(query, keys, values, mask, output):
    """One query (D,) over the keys and values (S, D) that the mask (S,) or (0,) leaves."""
    scores = np.empty(len(keys), np.float32)
    _score(query, keys, scores)
    for s in range(mask.size):
        if not mask[s]:
            scores[s] = -np.inf
    _softmax(scores)
    _sum_up(scores, values, output)


@serial()
def _attend(R, C, at, share, shares):
    step = _record(at)
    H, D = step.width, C // step.width
    mask, seen = step.states[2], step.count if step.states[2] else 0
    for task in range(share, R * H, shares):
        r, h, first = task // H, task % H, 4 * task * step.room * D
        query = floats(step.projected + 4 * (3 * r * C + h * D), (D,))
        keys = floats(step.states[0] + first, (step.count, D))
        values = floats(step.states[1] + first, (step.count, D))
        seen_by_row = carray(pointer(mask + r * seen), (seen,), np.bool_)
        output = floats(step.attended + 4 * task * D, (D,))
        _attend_head(query, keys, values, seen_by_row, output)


def attend(R, C, at, share, shares):
    """A share of the heads of all rows: from projections (R, 3, H, D) to outputs (R, H, D)."""
    _attend(R, C, at, share, shares)
    return 1


@serial()
def _project_mixes(R, C, x, at, shift, share, count, work, outputs, team):
    """Products of the norm of x, mixed with that of the token before, which it replaces.

    Args:
        R: Rows.
        C: Channels.
        x: The inputs, an array (R, C).
        at: The address of the half's record.
        shift: The address of the token before, normed.
        share: The number of the first vector to mix by; the others follow.
        count: How many mixes and products.
        work: The address of room for the norm and the mixes.
        outputs: The address of the products.
        team: The address of the team.
    """
    step, mixes = _record(at), work + 4 * R * C
    fresh, before = floats(work, (R, C)), floats(shift, (R, C))
    _norm(x, step, fresh)
    for m in range(count):
        shares = floats(step.vectors[share + m], (C,))
        _mix(fresh, before, shares, floats(mixes + 4 * R * C * m, (R, C)))
    _copy(fresh, before)
    return _multiply(at, 0, count, R, mixes, outputs, team)


@serial()
def _row(table, numbers, r, C):
    """The row (1, C) of a table that the r-th of some numbers names."""
    return floats(table + 4 * C * carray(pointer(numbers), (r + 1,), np.int64)[r], (1, C))


# The kernels, all of one form. They take the numbers of rows and channels, the addresses of x
# (R, C), of the half's record, of memory to work in and of the team; they give 1. An exception in
# one ends in a 0 by numba (`address_of`), and so does one in what they call.


def time_mix(R, C, x, at, work, team):
    """``x + TimeMix(norm(x))``."""
    step, x, block = _record(at), floats(x, (R, C)), 4 * R * C
    projected = work + 4 * block
    if not _project_mixes(R, C, x, at, step.states[1], 2, 3, work, projected, team):
        return 0
    decay, first = floats(work, (C,)), floats(step.vectors[1], (C,))
    _write_log_decay(floats(step.vectors[0], (C,)), decay)
    key, value = floats(projected, (R, C)), floats(projected + block, (R, C))
    sums, mixed = floats(step.states[0], (R, 3, C)), floats(work + block, (R, C))
    for r in range(R):
        next_token(key[r], value[r], decay, first, sums[r], mixed[r])
    _gate(floats(projected + 2 * block, (R, C)), mixed)
    if not _multiply(at, 3, 1, R, work + block, work, team):
        return 0
    _add(x, floats(work, (R, C)))
    return 1


def channel_mix(R, C, x, at, work, team):
    """``x + ChannelMix(norm(x))``."""
    step, x = _record(at), floats(x, (R, C))
    F, projected = step.width, work + 12 * R * C
    if not _project_mixes(R, C, x, at, step.states[0], 0, 2, work, projected, team):
        return 0
    _apply_squared_relu(floats(projected, (R, F)))
    if not _multiply(at, 2, 1, R, projected, work, team):
        return 0
    values = floats(work, (R, C))
    _gate(floats(projected + 4 * R * F, (R, C)), values)
    _add(x, values)
    return 1


def state_space(R, C, x, at, work, team):
    """``x + HybridMixer(norm(x))``; small, and therefore serial."""
    step, x = _record(at), floats(x, (R, C))
    N, fresh = step.width, floats(work, (R, C))
    _norm(x, step, fresh)
    vectors = step.vectors
    states, hidden = floats(step.states[0], (R, C + N)), floats(work + 4 * R * C, (N,))
    A, B = floats(vectors[1], (N, N)), floats(vectors[2], (N, C))
    mix, read, skip = (
        floats(vectors[0], (C,)),
        floats(vectors[3], (C, N)),
        floats(vectors[4], (C,)),
    )
    for r in range(R):
        state = states[r]
        for n in range(N):
            hidden[n] = _dot(A[n], state[C:]) + _dot(B[n], fresh[r])
        for n in range(N):
            state[C + n] = hidden[n]
        for c in range(C):
            average = mix[c] * (state[c] - fresh[r, c]) + fresh[r, c]
            state[c] = average
            x[r, c] += skip[c] * average + _dot(read[c], hidden)
    return 1


def feed_forward(R, C, x, at, work, team):
    """``x + FeedForward(norm(x))``."""
    step, x, middle = _record(at), floats(x, (R, C)), work + 4 * R * C
    fresh = floats(work, (R, C))
    _norm(x, step, fresh)
    if not _multiply(at, 0, 1, R, work, middle, team):
        return 0
    _apply_gelu(floats(middle, (R, step.width)))
    if not _multiply(at, 1, 1, R, middle, work, team):
        return 0
    _add(x, fresh)
    return 1


def attention(R, C, x, at, work, team):
    """``x + CausalSelfAttention(norm(x))``; writes the new keys and values behind the others."""
    step, x = _record(at), floats(x, (R, C))
    fresh, projected = floats(work, (R, C)), work + 4 * R * C
    _norm(x, step, fresh)
    if not _multiply(at, 0, 1, R, work, projected, team):
        return 0
    H, D, last = step.width, C // step.width, step.count - 1
    heads = floats(projected, (R, 3, H, D))
    keys = floats(step.states[0], (R, H, step.room, D))
    values = floats(step.states[1], (R, H, step.room, D))
    turned = floats(step.states[3], (2, R if step.states[3] else 0, D))
    for r in range(R):
        if turned.size:
            _turn(heads[r, 0], turned[0, r], turned[1, r])
            _turn(heads[r, 1], turned[0, r], turned[1, r])
        _copy(heads[r, 1], keys[r, :, last])
        _copy(heads[r, 2], values[r, :, last])
    step.projected, step.attended = projected, work
    if not share_out(team, step.attend, R, C, at):
        return 0
    if not _multiply(at, 1, 1, R, work, projected, team):
        return 0
    _add(x, floats(projected, (R, C)))
    return 1


def embedding(R, C, x, at, work, team):
    """The embedding of a token and, where there are any, of its position."""
    step, x = _record(at), floats(x, (R, C))
    for r in range(R):
        _copy(_row(step.vectors[0], step.states[0], r, C), x[r : r + 1])
        if step.vectors[1]:
            _add(x[r : r + 1], _row(step.vectors[1], step.states[1], r, C))
    return 1


def head(R, C, x, at, work, team):
    """``head(norm(x))``, which goes elsewhere: x stays."""
    step = _record(at)
    _norm(floats(x, (R, C)), step, floats(work, (R, C)))
    logits = carray(pointer(step.states[0]), (1,), np.int64)[0]
    return _multiply(at, 0, 1, R, work, logits, team)


def floats_needed(R, C, width):
    """How many numbers a kernel needs room for, given the record's `width`."""
    return R * (8 * C + width)


KERNELS: dict[str, Callable[..., int]] = {
    "time_mix": time_mix,
    "channel_mix": channel_mix,
    "state_space": state_space,
    "feed_forward": feed_forward,
    "attention": attention,
    "embedding": embedding,
    "head": head,
}
