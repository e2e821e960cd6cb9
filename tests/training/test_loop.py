from __future__ import annotations

from pathlib import Path

import pytest

from i3lm.training.checkpoints import save_states
from i3lm.training.loop import _tell_of_other_processes


def test_another_number_of_processes_is_told(tmp_path: Path):
    checkpoint = tmp_path / "checkpoint-7"
    checkpoint.mkdir()
    save_states(checkpoint, {"progress": {"losses_since_log": [0.1, 0.2]}})
    _tell_of_other_processes(checkpoint, 2, pytest.fail)
    said: list[str] = []
    _tell_of_other_processes(checkpoint, 1, said.append)
    assert said[0].startswith("checkpoint-7 was saved by 2 processes, and now there are 1: the run")
