"""Ending a run before its last step."""

from __future__ import annotations

from rich.console import Console
from transformers import TrainerCallback


class TargetPerplexity(TrainerCallback):
    """Ends the run at the first evaluation whose held-out perplexity is low enough, and says so.

    The evaluation before the first step does not count: the run would end with no model of its
    own. A target that no evaluation met is said at the end.

    Args:
        target: The perplexity per token to reach; comparable only under one tokenizer.
        console: Where to say it.
    """

    def __init__(self, target: float, console: Console) -> None:
        self.target, self.console = target, console

    def on_evaluate(self, args, state, control, metrics=None, **kwargs) -> None:
        """Asks the Trainer to stop where the target is reached."""
        perplexity = (metrics or {}).get("eval_perplexity")
        if state.global_step and perplexity is not None and perplexity <= self.target:
            control.should_training_stop = True
            self._say(
                f"step {state.global_step:>6}  held-out perplexity {perplexity:,.2f} has reached "
                f"the target of {self.target:g}: the run ends here"
            )

    def on_train_end(self, args, state, control, **kwargs) -> None:
        """Says how near the run came to a target that it did not reach."""
        seen = [
            (record["eval_perplexity"], record["step"])
            for record in state.log_history
            if "eval_perplexity" in record and record["step"]
        ]
        if not seen:
            self._say(f"target perplexity {self.target:g}: not reached, nothing was evaluated")
        elif min(seen)[0] > self.target:
            perplexity, step = min(seen)
            self._say(
                f"target perplexity {self.target:g}: not reached; the lowest was "
                f"{perplexity:,.2f}, at step {step}"
            )

    def _say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)
