"""``i3lm verify``"""

from __future__ import annotations

from typing import Any


def verify(
    checkpoint: str, device: str = "auto", precision: str = "fp32", json: bool = False
) -> int:
    """Holds a checkpoint's ways of computing the same thing against each other.

    A batch against single sequences, padding against none, reading in chunks and token by token
    against one pass, states after pieces against states after the whole, the model saved and read
    back or exported against the model itself, and every kernel that runs here against the
    reference. Prints the largest difference of each and what it may be; ends with status 1 if any
    is larger.

    Args:
        checkpoint: A checkpoint folder, or the output folder of a run (its best model).
        device: cpu, cuda, mps, or auto for the fastest there is.
        precision: fp32, bf16, fp16 or auto.
        json: Print everything as one JSON object.
    """
    import dataclasses

    from i3lm.cli.running import print_json
    from i3lm.device import resolve_device, resolve_precision
    from i3lm.inference.loading import load_checkpoint
    from i3lm.inference.verification import verify_model

    where = resolve_device(device)
    precision = resolve_precision(precision, where)
    model, _ = load_checkpoint(checkpoint, where)
    checks = list(verify_model(model, precision))
    failed = [check.name for check in checks if check.passed is False]
    if json:
        print_json({
            "checkpoint": checkpoint,
            "device": str(where),
            "precision": precision,
            "passed": not failed,
            "checks": [dataclasses.asdict(check) for check in checks],
        })  # fmt: skip
    else:
        _print_table(checks)
        applied = [check for check in checks if check.passed is not None]
        print(
            f"{len(failed)} of {len(applied)} FAILED: {', '.join(failed)}"
            if failed
            else f"all {len(applied)} hold on {where} in {precision}"
        )
    return 1 if failed else 0


def _print_table(checks: list[Any]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("check", no_wrap=True)
    table.add_column("largest difference", justify="right", no_wrap=True)
    table.add_column("tolerance", justify="right", no_wrap=True)
    table.add_column("result")
    for check in checks:
        verdict = {True: "holds", False: "FAILS", None: "does not apply"}[check.passed]
        table.add_row(
            check.name,
            "-" if check.difference is None else f"{check.difference:.1e}",
            f"{check.tolerance:.0e}",
            verdict if check.reason is None else f"{verdict}: {check.reason}",
        )
    console = Console()
    if console.width < 110:  # a folded name would not be found again
        console = Console(width=110)
    console.print(table, highlight=False, markup=False)
