from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from i3lm.errors import OutputError
from i3lm.reports import plot_loss


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    records = [{"step": 0, "eval_loss": 4.0}, {"step": 1, "loss": 3.5}, {"step": 2, "loss": 3.0}]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_a_picture(metrics: Path, tmp_path: Path):
    plot_loss(metrics, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_full_disk(metrics: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fill(descriptor: int):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("i3lm.files.os.fsync", fill)
    with pytest.raises(OutputError, match=r"loss.png: cannot be written: no space is left on the"):
        plot_loss(metrics, tmp_path / "loss.png")
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
