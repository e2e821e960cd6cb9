from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from i3lm.errors import CheckpointError
from i3lm.training.checkpoints import (
    latest_checkpoint,
    load_state,
    publish_checkpoint,
    read_records,
    rotate_checkpoints,
    save_states,
    verify_checkpoint,
)


def make_checkpoint(folder: Path, step: int) -> Path:
    written = folder / "saving.part" / "new"
    (written / "shards").mkdir(parents=True)
    (written / "weights").write_bytes(bytes(range(100)))
    (written / "shards" / "0").write_text(f"step {step}")
    publish_checkpoint(written, folder / f"checkpoint-{step}")
    shutil.rmtree(written.parent)
    return folder / f"checkpoint-{step}"


def cut_short(checkpoint: Path) -> None:
    (checkpoint / "weights").write_bytes(bytes(range(99)))


def flip_a_bit(checkpoint: Path) -> None:
    (checkpoint / "shards" / "0").write_text("step 28")


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut short": (cut_short, "is damaged: weights has 99 bytes instead of 100"),
    "changed": (flip_a_bit, "is damaged: the checksum of shards/0 differs"),
    "a file is gone": (lambda c: (c / "weights").unlink(), "is not whole: weights is missing"),
    "no manifest": (
        lambda c: (c / "manifest.json").unlink(),
        "is not whole: manifest.json is missing",
    ),
    "half a manifest": (
        lambda c: (c / "manifest.json").write_text('{"step": 9, "fi'),
        "is damaged: manifest.json is not ours",
    ),
    "another manifest": (
        lambda c: (c / "manifest.json").write_text("[]"),
        "is damaged: manifest.json is not ours",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path: Path, damage: str):
    make_checkpoint(tmp_path, 10)
    newest = make_checkpoint(tmp_path, 29)
    reports: list[str] = []
    assert latest_checkpoint(tmp_path, reports.append) == newest
    do, message = DAMAGE[damage]
    do(newest)
    assert latest_checkpoint(tmp_path, reports.append) == tmp_path / "checkpoint-10"
    assert reports == [f"{newest}: {message}; going back to the checkpoint before it"]
    cut_short(tmp_path / "checkpoint-10")
    message = r"checkpoint-10: is damaged: .*; no checkpoint before it is left: begin again"
    with pytest.raises(CheckpointError, match=message):
        latest_checkpoint(tmp_path, reports.append)


def test_no_checkpoint_is_no_damage(tmp_path: Path):
    (tmp_path / "checkpoint-x").mkdir()
    assert latest_checkpoint(tmp_path, pytest.fail) is None
    assert latest_checkpoint(tmp_path / "nowhere", pytest.fail) is None


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path):
    cut_short(make_checkpoint(tmp_path, 10))
    verify_checkpoint(make_checkpoint(tmp_path, 10))


def test_rotation_goes_by_step_and_leaves_the_rest_alone(tmp_path: Path):
    for step in (100, 9, 20):
        make_checkpoint(tmp_path, step)
    (tmp_path / "notes").mkdir()
    rotate_checkpoints(tmp_path, 2)
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint-20", "checkpoint-100", "notes"}


def test_states_with_and_without_tensors(tmp_path: Path):
    whole = torch.arange(6.0).view(2, 3)
    states = {
        "data": {"epoch": 2, "position": [0.1, None], "text": "é"},
        "carried": {"rows": 4, "state": whole.T},
    }
    save_states(tmp_path, states)
    assert load_state(tmp_path, "data") == states["data"]
    carried = load_state(tmp_path, "carried")
    assert carried["rows"] == 4
    assert carried["state"].equal(whole.T)
    with pytest.raises(CheckpointError, match=r"holds no other\.json"):
        load_state(tmp_path, "other")


def test_records_up_to_a_step(tmp_path: Path):
    path = tmp_path / "records.jsonl"
    assert read_records(path, 5) == []
    path.write_text('{"step": 1}\n{"step": 6}\n{"step": 2}\n{"st')
    assert read_records(path, 5) == [{"step": 1}, {"step": 2}]
    assert json.loads(path.read_text().splitlines()[0]) == {"step": 1}
