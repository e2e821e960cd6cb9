"""What a model costs before it is built."""

from i3lm.planning.parameters import count_parameters

__all__ = ["count_parameters"]
