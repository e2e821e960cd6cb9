"""The halves of a layer for one new token, each compiled by numba into one call.

A step of decoding reads every matrix once and computes little else, so what counts is that nothing
stands between one matrix and the next. Only products are worth two threads; those of one input run
in one parallel region, and all else is short and serial. Inputs are float32, shape (R, C), one row
per sequence; outputs are new; states are replaced in place.

Parameters come grouped: `weights`, `scales` and `biases` hold an entry for each matrix, empty where
a matrix has none, and a norm is (weight, bias, epsilon).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, prange

from i3lm.ops.linear.numba import multiply_rows
from i3lm.ops.numba_bridge import compiled, exp, inlined, serial
from i3lm.ops.wkv.numba import FASTEST, forward_kernel

__all__ = [
    "attention",
    "channel_mix",
    "feed_forward",
    "state_space",
    "time_mix",
]

_NO_MARKS = np.zeros((0, 0), np.bool_)
# For loops that write what they compute. The compiler makes two forms of such a loop, and how near
# its arrays lie decides which one runs: only as written are both bitwise the same. Not saying so is
# not enough: a function called takes over the freedom of its caller.
_as_written: Any = njit(fastmath=False, cache=True, error_model="numpy")


@compiled()
def _multiply(inputs, weights, scales, biases, outputs, tasks):
    """Every input times its matrix, the rows of each matrix shared out over the tasks."""
    for task in prange(tasks):
        for m in range(len(weights)):
            N = weights[m].shape[0]
            share = (N + tasks - 1) // tasks
            low, high = task * share, min((task + 1) * share, N)
            multiply_rows(inputs[m], weights[m], scales[m], biases[m], outputs[m], low, high)


@serial()
def _product(x, weight, scale, bias, tasks):
    output = np.empty((x.shape[0], weight.shape[0]), np.float32)
    _multiply((x,), (weight,), (scale,), (bias,), (output,), tasks)
    return output


@_as_written
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


@_as_written
def _normalised(x, norm):
    weight, bias, epsilon = norm
    output = x.copy()
    for r in range(x.shape[0]):
        mean, variance = _moments(x[r])
        scale = np.float32(1) / np.sqrt(variance + np.float32(epsilon))
        row = output[r]
        for i in range(row.size):
            row[i] = (row[i] - mean) * scale
        row *= weight
        row += bias
    return output


@_as_written
def _mixed(x, previous, share):
    output = x.copy()
    output -= previous
    output *= share
    output += previous
    return output


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


@_as_written
def _gate(receptance, values):
    for r in range(receptance.shape[0]):
        for i in range(receptance.shape[1]):
            receptance[r, i] = _sigmoid(receptance[r, i])
    values *= receptance


@_as_written
def _apply_gelu(x):
    for r in range(x.shape[0]):
        for i in range(x.shape[1]):
            x[r, i] = _gelu(x[r, i])


@_as_written
def _apply_squared_relu(x):
    for r in range(x.shape[0]):
        for i in range(x.shape[1]):
            positive = max(x[r, i], np.float32(0))
            x[r, i] = positive * positive


@_as_written
def _log_decay(time_decay):
    decay = np.empty_like(time_decay)
    for i in range(decay.size):
        decay[i] = max(-np.exp(time_decay[i]), np.float32(FASTEST))
    return decay


@_as_written
def _add_scaled(total, share, x):
    for i in range(total.size):
        total[i] += share * x[i]


@_as_written
def _turned(x, cosine, sine):
    """Queries or keys (H, D) of one token, turned by the angles of its position."""
    half = x.shape[1] // 2
    output = x.copy()
    for h in range(x.shape[0]):
        for i in range(half):
            low, high = x[h, i], x[h, half + i]
            output[h, i] = low * cosine[i] - high * sine[i]
            output[h, half + i] = high * cosine[half + i] + low * sine[half + i]
    return output


@serial()
def _dot(x, y):
    total = np.float32(0)
    for i in range(x.size):
        total += x[i] * y[i]
    return total


@_as_written
def _softmax(scores):
    top = scores.max()
    total = np.float32(0)
    for s in range(scores.size):
        scores[s] = exp(scores[s] - top)
        total += scores[s]
    for s in range(scores.size):
        scores[s] /= total


@compiled()
def _attend(query, keys, values, count, mask, output):
    """One query (R, H, D) over the first `count` keys and values (R, H, room, D)."""
    R, H, D = query.shape
    scale = np.float32(1 / np.sqrt(D))
    for task in prange(R * H):
        r, h = task // H, task % H
        scores = np.empty(count, np.float32)
        for s in range(count):
            scores[s] = _dot(query[r, h], keys[r, h, s]) * scale
            if mask.size and not mask[r, s]:
                scores[s] = -np.inf
        _softmax(scores)
        mixed = np.zeros(D, np.float32)
        for s in range(count):
            _add_scaled(mixed, scores[s], values[r, h, s])
        output[r, h] = mixed


# The kernels, all of one signature. `vectors` and `states` are tuples in the order in which
# `i3lm.layers.decoding_step` and the cache keep them.


@serial()
def time_mix(x, norm, vectors, weights, scales, biases, states, tasks):
    """``x + TimeMix(norm(x))``."""
    time_decay, time_first, mix_key, mix_value, mix_receptance = vectors
    sums, shift = states
    R, C = x.shape
    fresh = _normalised(x, norm)
    key, value = np.empty((R, 1, C), np.float32), np.empty((R, 1, C), np.float32)
    receptance, mixed = np.empty((R, C), np.float32), np.empty((R, 1, C), np.float32)
    inputs = (
        _mixed(fresh, shift, mix_key),
        _mixed(fresh, shift, mix_value),
        _mixed(fresh, shift, mix_receptance),
    )
    outputs = key.reshape(R, C), value.reshape(R, C), receptance
    _multiply(inputs, weights[:3], scales[:3], biases[:3], outputs, tasks)
    shift[:] = fresh
    decay = _log_decay(time_decay)
    forward_kernel(key, value, decay, time_first, sums, _NO_MARKS, _NO_MARKS, mixed, sums)
    gated = mixed.reshape(R, C)
    _gate(receptance, gated)
    return x + _product(gated, weights[3], scales[3], biases[3], tasks)


@serial()
def channel_mix(x, norm, vectors, weights, scales, biases, states, tasks):
    """``x + ChannelMix(norm(x))``."""
    mix_key, mix_receptance = vectors
    shift = states[0]
    fresh = _normalised(x, norm)
    R, C = x.shape
    key = np.empty((R, weights[0].shape[0]), np.float32)
    receptance = np.empty((R, C), np.float32)
    inputs = _mixed(fresh, shift, mix_key), _mixed(fresh, shift, mix_receptance)
    _multiply(inputs, weights[:2], scales[:2], biases[:2], (key, receptance), tasks)
    shift[:] = fresh
    _apply_squared_relu(key)
    values = _product(key, weights[2], scales[2], biases[2], tasks)
    _gate(receptance, values)
    return x + values


@serial()
def state_space(x, norm, vectors, weights, scales, biases, states, tasks):
    """``x + HybridMixer(norm(x))``; small, and therefore serial."""
    mix, A, B, C, D = vectors
    state = states[0]
    fresh, output = _normalised(x, norm), np.empty_like(x)
    channels, N = C.shape
    hidden = np.empty(N, np.float32)
    for r in range(x.shape[0]):
        for n in range(N):
            total = np.float32(0)
            for i in range(N):
                total += A[n, i] * state[r, channels + i]
            for i in range(channels):
                total += B[n, i] * fresh[r, i]
            hidden[n] = total
        state[r, channels:] = hidden
        for c in range(channels):
            average = mix[c] * (state[r, c] - fresh[r, c]) + fresh[r, c]
            state[r, c] = average
            total = D[c] * average
            for n in range(N):
                total += C[c, n] * hidden[n]
            output[r, c] = x[r, c] + total
    return output


@serial()
def feed_forward(x, norm, vectors, weights, scales, biases, states, tasks):
    """``x + FeedForward(norm(x))``."""
    middle = _product(_normalised(x, norm), weights[0], scales[0], biases[0], tasks)
    _apply_gelu(middle)
    return x + _product(middle, weights[1], scales[1], biases[1], tasks)


@serial()
def attention(x, norm, vectors, weights, scales, biases, states, tasks):
    """``x + CausalSelfAttention(norm(x))``.

    The states are keys and values, (R, H, room, D), the number of tokens with this one, what it
    sees, bool (R, count) or empty, and cosines and sines of its position, (2, R, D) or empty.
    """
    keys, values, count, mask, rotation = states
    R, C = x.shape
    H, D = keys.shape[1], keys.shape[3]
    projected = _product(_normalised(x, norm), weights[0], scales[0], biases[0], tasks)
    heads = projected.reshape(R, 3, H, D)
    query = np.empty((R, H, D), np.float32)
    for r in range(R):
        query[r], key = heads[r, 0], heads[r, 1]
        if rotation.size:
            query[r] = _turned(heads[r, 0], rotation[0, r], rotation[1, r])
            key = _turned(heads[r, 1], rotation[0, r], rotation[1, r])
        keys[r, :, count - 1] = key
        values[r, :, count - 1] = heads[r, 2]
    mixed = np.empty((R, H, D), np.float32)
    _attend(query, keys, values, count, mask, mixed)
    return x + _product(mixed.reshape(R, C), weights[1], scales[1], biases[1], tasks)
