"""How good a model is on text it has not seen."""

from i3lm.evaluation.loss import Evaluation, evaluate_text

__all__ = ["Evaluation", "evaluate_text"]
