"""``i3lm quickstart``"""

from __future__ import annotations


def quickstart(output: str = "runs/quickstart", overwrite: bool = False) -> None:
    """Trains a small hybrid model on built-in stories, in about three minutes on two cores.

    It shows held-out loss before and after, writes a picture of the loss, and continues three
    prompts.

    Args:
        output: The folder for the model, its figures and settings.
        overwrite: Replace the run in the output folder.
    """
    import shutil
    import sys
    from pathlib import Path

    from rich.console import Console

    from i3lm.cli.train import print_result
    from i3lm.reports import plot_loss
    from i3lm.training.checkpoints import METRICS_FILE
    from i3lm.training.options import (
        DataOptions,
        ModelOptions,
        RunOptions,
        SampleOptions,
        TokenizerOptions,
        TrainingOptions,
    )
    from i3lm.training.run import run_training

    options = RunOptions(
        ModelOptions(
            config={
                "hidden_size": 192,
                "layer_types": "4 x linear_attention, 1 x full_attention",
                "num_attention_heads": 6,
                "max_position_embeddings": 128,
            }
        ),
        TokenizerOptions(source="bpe", vocab_size=1024),
        DataOptions(source="stories", size=6_000),
        TrainingOptions(
            max_steps=450, batch_size=32, learning_rate=3e-3, warmup_steps=20, evaluate_every=100
        ),
        SampleOptions(
            prompts=[
                "Long ago, a girl named Lena lived",
                "Otto and Rosie were sitting in the meadow.",
                "The opposite of",
            ],
            every=100,
            max_new_tokens=70,
            temperature=0.6,
        ),
    )
    folder = Path(output)
    result = run_training(folder, options, console=Console(stderr=True), overwrite=overwrite)
    picture = folder / "loss.png"
    plot_loss(folder / METRICS_FILE, picture)
    print_result(result)
    print(f"\nloss plot: {picture}")
    # The next command must work where i3lm is not in the path, too.
    i3lm = "i3lm" if shutil.which("i3lm") else f"{sys.executable} -m i3lm"
    print(f'next: {i3lm} generate {output} --prompt "One morning"    or    {i3lm} chat {output}')
