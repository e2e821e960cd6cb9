"""Counting operations against figures worked out by hand."""

from __future__ import annotations

import pytest

from i3lm.planning import count_matmul_parameters, training_flops_per_token
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
