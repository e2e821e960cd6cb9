from __future__ import annotations

import errno
from pathlib import Path

import pytest

from i3lm.errors import OutputError
from i3lm.training.checkpoints import (
    as_output_error,
    latest_checkpoint,
    read_records,
    write_file,
    write_folder,
)


def write_one(part: Path) -> None:
    (part / "file").write_text("new")


def fail_half_way(error: BaseException):
    def write(part: Path) -> None:
        write_one(part)
        raise error

    return write


def test_folder_is_replaced_whole(tmp_path: Path):
    folder = tmp_path / "deep" / "best"
    write_folder(folder, write_one)
    (folder / "old").write_text("gone after the next")
    write_folder(folder, write_one)
    assert [path.name for path in folder.iterdir()] == ["file"]
    assert [path.name for path in folder.parent.iterdir()] == ["best"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_failed_write_leaves_the_folder_as_it_was(tmp_path: Path, error: BaseException):
    folder = tmp_path / "best"
    folder.mkdir()
    (folder / "file").write_text("old")
    expected = OutputError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected):
        write_folder(folder, fail_half_way(error))
    assert (folder / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_failed_rename_puts_the_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "best"
    folder.mkdir()
    (folder / "file").write_text("old")
    rename = Path.rename

    def rename_but_not_the_new(self: Path, target: Path) -> Path:
        if self.suffix == ".part":
            raise OSError(errno.EIO, "broken")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", rename_but_not_the_new)
    with pytest.raises(OutputError, match=r"best: cannot be written: .*broken"):
        write_folder(folder, write_one)
    assert (folder / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_failed_write_leaves_the_file_as_it_was(tmp_path: Path):
    path = tmp_path / "config.yaml"
    write_file(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_file(path, "new \ud800")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "x"), "no space is left on the disk"),
        (OSError(errno.EROFS, "x"), "the file system is read-only; write elsewhere"),
        (PermissionError(errno.EACCES, "x"), "permission denied; choose a folder that you may"),
        (RuntimeError("I/O error: x (os error 28)"), "no space is left on the disk"),
        (
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 1 vs 2"),
            "no space is left on the disk",
        ),
    ],
)
def test_reasons(error: Exception, reason: str):
    translated = as_output_error(Path("out"), error)
    assert str(translated).startswith(f"out: cannot be written: {reason}")


def test_other_errors_are_not_of_the_output():
    assert as_output_error(Path("out"), ValueError("x")) is None
    assert as_output_error(Path("out"), BrokenPipeError(errno.EPIPE, "x")) is None


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
