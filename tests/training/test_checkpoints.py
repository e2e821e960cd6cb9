from __future__ import annotations

from pathlib import Path

from i3lm.training.checkpoints import latest_checkpoint, read_records


def test_latest_checkpoint_is_a_complete_one(tmp_path: Path):
    assert latest_checkpoint(tmp_path) is None
    for name, state in (
        ("checkpoint-9", "{}"),
        ("checkpoint-10", "{}"),
        ("checkpoint-11", '{"glo'),
        ("checkpoint-12", None),
        ("checkpoint-x", "{}"),
    ):
        (tmp_path / name).mkdir()
        if state is not None:
            (tmp_path / name / "trainer_state.json").write_text(state)
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_records_up_to_a_step(tmp_path: Path):
    path = tmp_path / "records.jsonl"
    assert read_records(path, 5) == []
    path.write_text('{"step": 1}\n{"step": 6}\n{"step": 2}\n{"st')
    assert read_records(path, 5) == [{"step": 1}, {"step": 2}]
