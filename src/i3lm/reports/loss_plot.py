"""The loss curve of a run as a picture."""

from __future__ import annotations

import io
import json
from pathlib import Path

from i3lm.files import write_file


def plot_loss(metrics_file: Path, picture: Path) -> None:
    """Draws training and held-out loss over steps from a metrics file, as PNG.

    Args:
        metrics_file: JSON lines with ``step`` and ``loss`` or ``eval_loss`` (nats per token).
        picture: Where the PNG goes.

    Raises:
        OutputError: The picture cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = [json.loads(line) for line in metrics_file.read_text(encoding="utf-8").splitlines()]
    training = [(r["step"], r["loss"]) for r in records if "loss" in r]
    held_out = [(r["step"], r["eval_loss"]) for r in records if "eval_loss" in r]

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if training:
        axes.plot(*zip(*training, strict=True), color="tab:blue", lw=1.2, label="training")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", color="tab:orange", ms=4, label="held out")
        last_step, last_loss = held_out[-1]
        axes.annotate(
            f"{last_loss:.3f}", (last_step, last_loss), textcoords="offset points", xytext=(0, 8),
            ha="right",
        )  # fmt: skip
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=120)
    write_file(picture, drawn.getvalue())
