"""The recipes in configs/ are what i3lm reads, describe the family, and train."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from i3lm.cli.running import build_parser
from i3lm.cli.train import train
from i3lm.data.sources.hub import KNOWN_SETS, HubSet
from i3lm.planning import count_parameters
from i3lm.training.build import resolve_start
from i3lm.training.options import TrainingOptions

CONFIGS = Path(__file__).parents[1] / "configs"
HARDWARE = sorted((CONFIGS / "hardware").glob("*.yaml"))
OVERLAYS = [CONFIGS / "offline.yaml", *HARDWARE]
# Published runs: parameters of the model, and tokens per optimizer step.
RECIPES = {
    "i3-22m": (22_640_626, None),  # its batch was not published
    "i3-80m": (76_861_160, 4 * 256),
    "i3-200m": (169_847_552, 4 * 8 * 256),
    "i3-ethan-base": (170_437_376, 4 * 8 * 1024),
}


def read(*files: Path, more: tuple[str, ...] = ()):
    """The options of `i3lm train` with some files, as the command reads them."""
    parser = build_parser("train", train)
    arguments = [argument for file in files for argument in ("--config", str(file))]
    return parser.instantiate(parser.parse_args([*arguments, "--output", "run", *more]))


def recipe(name: str) -> Path:
    return CONFIGS / f"{name}.yaml"


def tokens_per_step(training: TrainingOptions) -> int:
    return training.batch_size * training.gradient_accumulation_steps * training.context_length


@pytest.mark.parametrize("file", sorted(CONFIGS.rglob("*.yaml")), ids=lambda file: file.stem)
def test_every_file_is_read(file):
    read(file)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_of_the_published_size(name):
    parameters, per_step = RECIPES[name]
    options = read(recipe(name))
    model = resolve_start(options.model).preset.config()
    assert options.model.source == name
    assert count_parameters(model) == parameters
    if per_step is not None:
        assert tokens_per_step(options.training) == per_step
        assert options.training.context_length == model.max_position_embeddings


@pytest.mark.parametrize("name", RECIPES)
def test_the_sets_of_a_recipe_are_known_by_name(name):
    for source in read(recipe(name)).data.all_sources():
        which = HubSet.parse(source.source, source.split, source.revision)
        assert which is not None
        assert which.name in KNOWN_SETS


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda file: file.stem)
@pytest.mark.parametrize("name", RECIPES)
def test_an_overlay_changes_what_it_names_and_nothing_else(name, overlay):
    plain, merged = read(recipe(name)), read(recipe(name), overlay)
    named = yaml.safe_load(overlay.read_text(encoding="utf-8"))
    for group in ("model", "tokenizer", "data", "training", "sample", "adapter"):
        changes = named.get(group, {})
        assert vars(merged[group]) == {**vars(plain[group]), **changes}


@pytest.mark.parametrize("file", HARDWARE, ids=lambda file: file.stem)
def test_hardware_changes_how_a_step_is_computed_not_which(file):
    processes = 2 if file.stem == "multi-gpu" else 1
    for name in ("i3-22m", "i3-200m", "i3-ethan-base"):
        training = read(recipe(name), file).training
        rows = training.batch_size * training.gradient_accumulation_steps * processes
        assert rows == 32


# i3-22m trains as it is; the others keep their layers and become narrow.
NARROW = ("--model.config.hidden_size", "64", "--model.config.num_attention_heads", "4")


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("i3-22m", ()),
        ("i3-80m", NARROW),
        ("i3-200m", NARROW),
        ("i3-ethan-base", NARROW),
    ],
)
def test_the_offline_twin_of_a_recipe_trains(i3lm, tmp_path, name, more):
    steps = 4
    finished = i3lm(
        "train", "--config", recipe(name), "--config", CONFIGS / "offline.yaml",
        "--output", tmp_path / "run", "--training.max_steps", steps,
        "--training.warmup_steps", 1, "--training.device", "cpu",
        "--training.precision", "fp32", "--data.size", 100, "--sample.prompts", "[]", "--json",
        *more,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    result = json.loads(finished.stdout)
    assert result["steps"] == steps
    assert result["after"]["loss"] < result["before"]["loss"]
    trained = json.loads((tmp_path / "run" / "last" / "config.json").read_text(encoding="utf-8"))
    published = resolve_start(read(recipe(name)).model).preset.config()
    assert trained["layer_types"] == published.layer_types
