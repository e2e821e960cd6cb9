"""``i3lm train``"""

from __future__ import annotations

from i3lm.training.options import (
    AdapterOptions,
    DataOptions,
    ModelOptions,
    SampleOptions,
    TokenizerOptions,
    TrainingOptions,
)


def train(
    output: str,
    model: ModelOptions = ModelOptions(),  # noqa: B008 (jsonargparse reads the defaults)
    tokenizer: TokenizerOptions = TokenizerOptions(),  # noqa: B008 (likewise)
    data: DataOptions = DataOptions(),  # noqa: B008 (likewise)
    training: TrainingOptions = TrainingOptions(),  # noqa: B008 (likewise)
    sample: SampleOptions = SampleOptions(),  # noqa: B008 (likewise)
    adapter: AdapterOptions = AdapterOptions(),  # noqa: B008 (likewise)
    resume: bool = False,
    overwrite: bool = False,
    json: bool = False,
) -> None:
    """Trains a new model, or fine-tunes a checkpoint.

    Options come from YAML files (--config, the later over the earlier), and from the command
    line, which wins:

    i3lm train --config configs/tinystories-10m.yaml --output runs/mine --data.source my.txt

    i3lm train --output runs/small --model.source i3-12m --training.max_steps 200

    i3lm train --output runs/tuned --model.source runs/mine --data.source more.jsonl

    Args:
        output: The folder for the model, its figures and settings.
        model: Which model to train.
        tokenizer: Which tokenizer to use.
        data: Which text to train on.
        training: How to train.
        sample: Which texts to write while training.
        adapter: Low-rank adapters, to train a small addition to a checkpoint.
        resume: Go on from the newest checkpoint in the output folder.
        overwrite: Replace the run in the output folder.
        json: Print the result as one JSON object; progress goes to standard error either way.
    """
    import contextlib
    import sys
    from pathlib import Path

    from rich.console import Console

    from i3lm.cli.running import print_json
    from i3lm.processes import is_first
    from i3lm.training.options import RunOptions

    # With WANDB_MODE=offline, transformers prints a line when it is imported.
    with contextlib.redirect_stdout(sys.stderr):
        from i3lm.training.run import run_training

    result = run_training(
        Path(output),
        RunOptions(model, tokenizer, data, training, sample, adapter),
        console=Console(stderr=True),
        resume=resume,
        overwrite=overwrite,
    )
    if not is_first():
        return
    if json:
        print_json({
            "output": str(result.output), "parameters": result.parameters,
            "steps": result.steps, "tokens": result.tokens,
            "before": result.before, "after": result.after, "samples": result.samples,
            "target_reached": result.target_reached,
        })  # fmt: skip
        return
    print_result(result)


def print_result(result) -> None:
    """Prints held-out figures before and after, where the model is, and samples."""
    from i3lm.evaluation import figures_line

    for when, figures in (("before", result.before), ("after", result.after)):
        print(f"held out, {when}: {figures_line(figures)}")
    print(f"model: {result.output / 'best'}")
    for sample in result.samples:
        print(f"\n> {sample['prompt']}\n{sample['prompt']}{sample['text']}")
