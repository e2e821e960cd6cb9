"""How good a model is on text it has not seen."""

from i3lm.evaluation.loss import Evaluation, evaluate_text, figures_line, next_token_loss

__all__ = ["Evaluation", "evaluate_text", "figures_line", "next_token_loss"]
