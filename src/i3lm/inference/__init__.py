"""Talking to a trained model."""

from i3lm.inference.generation import Completion, SamplingOptions, TextGenerator

__all__ = ["Completion", "SamplingOptions", "TextGenerator"]
