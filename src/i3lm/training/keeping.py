"""The models that a run leaves behind: the best yet, and the last."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from i3lm.errors import CheckpointError
from i3lm.files import write_folder
from i3lm.inference.adapters import Base, write_adapter
from i3lm.models.model_card import write_model_card
from i3lm.processes import is_first
from i3lm.training.checkpoints import EVALUATION_FILE
from i3lm.training.sharding import whole_weights


class ModelWriter:
    """Writes the model in training as a checkpoint: weights, tokenizer, card, held-out figures.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        base: What an adapter is trained on, which is then written without it; None where the
            whole model is.
        parameters: Number of the model's own parameters, an adapter's left out.
        target: The held-out perplexity that the run is to reach, if any.
        sharded: Whether several processes have a part of each weight.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        base: Base | None,
        parameters: int,
        target: float | None,
        sharded: bool,
    ) -> None:
        self.model, self.tokenizer, self.base = model, tokenizer, base
        self.parameters, self.target, self.sharded = parameters, target, sharded

    def write(self, folder: Path, metrics: dict[str, float], steps: int) -> None:
        """Makes a folder hold the model as it is now; for all processes together.

        Args:
            folder: The folder, replaced as a whole.
            metrics: The Trainer's figures of its newest evaluation.
            steps: How many steps the model was trained for.
        """
        weights = whole_weights(self.model) if self.sharded else None
        if not is_first():
            return

        def write(part: Path) -> None:
            if self.base is None:
                self.model.save_pretrained(part, state_dict=weights)
            else:
                write_adapter(part, self.model, self.base)
            self.tokenizer.save_pretrained(part)
            write_model_card(part, self.model.config, self.parameters, _facts(metrics, steps))
            record = json.dumps(self._evaluation(metrics, steps))
            (part / EVALUATION_FILE).write_text(record + "\n", encoding="utf-8")

        write_folder(folder, write)

    def _evaluation(self, metrics: dict[str, float], steps: int) -> dict[str, Any]:
        record: dict[str, Any] = {"step": steps, **held_out_figures(metrics)}
        if self.target is not None:
            record["target_perplexity"] = self.target
            record["target_reached"] = record["perplexity"] <= self.target
        return record


class BestKeeper(TrainerCallback):
    """Keeps the model with the lowest held-out loss in a folder of its own."""

    def __init__(self, folder: Path, writer: ModelWriter) -> None:
        self.folder, self.writer = folder, writer
        self.best = float("inf")

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Takes the best so far of a resumed run.

        The model that is kept tells its own loss: it may be of a later step than the checkpoint,
        and a resumed run that evaluates at other steps would not meet that loss again.

        Raises:
            CheckpointError: The kept model's figures cannot be read.
        """
        figures = self.folder / EVALUATION_FILE
        if figures.exists():
            try:
                self.best = json.loads(figures.read_text(encoding="utf-8"))["loss"]
            except (OSError, ValueError, LookupError, TypeError) as error:
                raise CheckpointError(
                    f"{figures}: is damaged, so the best loss of the run is unknown; remove "
                    f"{self.folder} to keep the next best model"
                ) from error

    def on_evaluate(self, args, state, control, metrics=None, **kwargs) -> None:
        """Saves the model if it is the best yet, the untrained one left out."""
        if state.global_step and metrics and metrics["eval_loss"] < self.best:
            self.best = metrics["eval_loss"]
            self.writer.write(self.folder, metrics, state.global_step)


def held_out_figures(metrics: dict[str, float]) -> dict[str, float]:
    """What a run says of its held-out text, from the Trainer's figures of an evaluation."""
    names = ("loss", "perplexity", "bits_per_byte")
    return {name: metrics[f"eval_{name}"] for name in names}


def _facts(metrics: dict[str, float], steps: int) -> dict[str, str]:
    return {
        "Training steps": f"{steps:,}",
        "Held-out loss": f"{metrics['eval_loss']:.4f} nats per token",
        "Held-out bits per byte": f"{metrics['eval_bits_per_byte']:.4f}",
    }
