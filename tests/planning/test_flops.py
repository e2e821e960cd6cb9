"""Counting operations against figures worked out by hand."""

from __future__ import annotations

import pytest

from i3lm.models.i3 import I3Config
from i3lm.planning import count_matmul_parameters, count_parameters, training_flops_per_token
from i3lm.presets import load_preset


def test_matmul_parameters_of_the_80m_by_hand():
    d, v, n = 512, 35_560, 32
    hybrid = n * n + 2 * n * d + 8 * d * d
    attention = 4 * d * d + 8 * d * d
    assert count_matmul_parameters(load_preset("i3-80m").config()) == (
        10 * hybrid + 6 * attention + d * v
    )


@pytest.mark.parametrize(
    # The published estimates are 0.35 and 0.88 GFLOP a token.
    ("preset", "gflops"), [("i3-80m", 0.35), ("i3-200m", 0.88)],
)  # fmt: skip
def test_flops_per_token(preset: str, gflops: float):
    config = load_preset(preset).config()
    measured = training_flops_per_token(config, config.max_position_embeddings) / 1e9
    assert measured == pytest.approx(gflops, rel=0.03)


@pytest.mark.parametrize(("window", "T"), [(16, 64), (64, 64), (500, 64), (3, 1000)])
def test_attention_of_a_sliding_window_by_counting_keys(window: int, T: int):
    config = I3Config(
        vocab_size=50,
        hidden_size=16,
        layer_types="linear_attention, 2 x sliding_attention",
        sliding_window=window,
        position_embedding_type="none",
    )
    seen = sum(min(t + 1, window) for t in range(T)) / T
    attention = training_flops_per_token(config, T) - 6 * count_matmul_parameters(config)
    # Half a key per layer is left out, as in the published estimates.
    assert attention == pytest.approx(2 * 12 * 16 * seen, abs=2 * 12 * 16 * 0.51)


def test_only_learned_positions_have_parameters():
    counts = {
        kind: count_parameters(I3Config(position_embedding_type=kind))
        for kind in ("learned", "rope", "none")
    }
    assert counts["learned"] - 256 * 512 == counts["rope"] == counts["none"]
