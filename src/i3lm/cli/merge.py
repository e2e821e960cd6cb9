"""``i3lm merge``"""

from __future__ import annotations

from typing import Any

# Models and tokenizers are Any below: jsonargparse resolves this module's annotations, and --help
# would wait seconds for torch.


def merge(
    checkpoint: str,
    out: str,
    base: str | None = None,
    overwrite: bool = False,
    json: bool = False,
) -> None:
    """Merges a low-rank adapter into its base, and writes a plain checkpoint.

    i3lm merge runs/adapted models/merged

    The result computes what base and adapter compute together, needs neither, and is as fast as
    the base. The other commands take an adapter as it is.

    Args:
        checkpoint: The folder of an adapter, or the output folder of a run (its best one).
        out: The folder to write.
        base: Where the adapter's base is, if it is not where it was.
        overwrite: Replace what is in the folder to write.
        json: Print what was done as one JSON object.
    """
    from pathlib import Path

    from i3lm.cli.convert import check_target
    from i3lm.cli.running import print_json
    from i3lm.errors import CheckpointError
    from i3lm.files import write_folder
    from i3lm.inference.adapters import is_adapter, read_base
    from i3lm.inference.loading import check_tokenizer_fits, find_checkpoint, load_adapted
    from i3lm.tokenizers import load_tokenizer

    folder = find_checkpoint(checkpoint)
    if not is_adapter(folder):
        raise CheckpointError(f"{folder}: is a whole model, not an adapter: nothing to merge")
    where = read_base(folder).path if base is None else Path(base)
    target = check_target(Path(out), folder, overwrite)
    model = load_adapted(folder, None if base is None else where)
    tokenizer = load_tokenizer(folder)
    check_tokenizer_fits(model, tokenizer, where=str(folder))
    write_folder(target, lambda part: _save(part, model, tokenizer, folder.name, where.name))
    figures = {
        "adapter": str(folder),
        "base": str(where),
        "out": str(target),
        "parameters": model.num_parameters(),
    }
    if json:
        print_json(figures)
        return
    print(f"merged {folder} into {where}: {figures['parameters']:,} parameters\nwrote {target}")


def _save(folder: Any, model: Any, tokenizer: Any, adapter: str, base: str) -> None:
    from i3lm.models.model_card import write_model_card

    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    facts = {"Merged": f"the adapter `{adapter}` into `{base}`"}
    write_model_card(folder, model.config, model.num_parameters(), facts)
