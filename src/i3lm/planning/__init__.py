"""What a model costs before it is built."""

from i3lm.models.flops import count_matmul_parameters, training_flops_per_token
from i3lm.planning.parameters import count_parameters

__all__ = ["count_matmul_parameters", "count_parameters", "training_flops_per_token"]
