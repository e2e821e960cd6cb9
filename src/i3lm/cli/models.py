"""``i3lm models``"""

from __future__ import annotations


def models(json: bool = False) -> None:
    """Lists the members of the family with layers, context and exact parameter counts.

    Args:
        json: Print a JSON list in place of the table.
    """
    from i3lm.cli.running import print_json
    from i3lm.planning import count_parameters
    from i3lm.presets import list_presets, load_preset

    rows = []
    for name in list_presets():
        preset = load_preset(name)
        config = preset.config()
        kinds = config.layer_types
        rows.append({
            "name": name,
            "parameters": count_parameters(config),
            "layers": {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)},
            "recurrence": config.recurrence,
            "hidden_size": config.hidden_size,
            "context": config.max_position_embeddings,
            "vocab_size": config.vocab_size,
            "tokenizer": preset.tokenizer,
            "description": preset.description,
        })  # fmt: skip
    if json:
        print_json(rows)
        return
    _print_table(rows)


def _print_table(rows: list[dict]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for title in ("name", "parameters", "layers", "width", "context", "vocabulary", "tokenizer"):
        numeric = title in ("parameters", "width", "context", "vocabulary")
        table.add_column(title, justify="right" if numeric else "left", no_wrap=True)
    for row in rows:
        short = {"linear_attention": row["recurrence"], "full_attention": "attention"}
        layers = " + ".join(
            f"{count} {short.get(kind, kind)}" for kind, count in row["layers"].items()
        )
        table.add_row(
            row["name"], f"{row['parameters']:,}", layers, f"{row['hidden_size']:,}",
            f"{row['context']:,}", f"{row['vocab_size']:,}", row["tokenizer"],
        )  # fmt: skip
    console = Console()
    if console.width < 110:  # a folded count would be no exact count
        console = Console(width=110)
    console.print(table)
