from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

from i3lm.errors import DataError, OutputError
from i3lm.files import (
    append_line,
    as_output_error,
    settle_folder,
    write_file,
    write_folder,
    writing,
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
        (
            RuntimeError(
                "[enforce fail at inline_container.cc:747] . open file failed with "
                "strerror: Is a directory"
            ),
            "Is a directory",
        ),
        (RuntimeError("Parent directory out does not exist."), "Parent directory out does not"),
    ],
)
def test_reasons(error: Exception, reason: str):
    translated = as_output_error(Path("out"), error)
    assert str(translated).startswith(f"out: cannot be written: {reason}")


def test_other_errors_are_not_of_the_output():
    for error in (
        ValueError("x"),
        BrokenPipeError(errno.EPIPE, "x"),
        RuntimeError("[enforce fail at inline_container.cc:1] . PytorchStreamReader failed"),
        DataError("text.txt: cannot be read (os error 5)"),
    ):
        assert as_output_error(Path("out"), error) is None


def test_what_torch_says_of_a_file_that_it_cannot_write(tmp_path: Path):
    def translated(path: Path) -> str:
        with pytest.raises(OutputError) as caught, writing(path):
            torch.save({"x": torch.zeros(1000)}, path)
        return str(caught.value).removeprefix(f"{path}: cannot be written: ")

    assert translated(tmp_path) == "Is a directory"
    missing = tmp_path / "no"
    assert translated(missing / "x.pt") == f"Parent directory {missing} does not exist."
    if Path("/dev/full").exists():
        assert translated(Path("/dev/full")).startswith("no space is left on the disk")


def test_what_torch_says_of_a_damaged_file_is_not_of_the_output(tmp_path: Path):
    path = tmp_path / "x.pt"
    torch.save({"x": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(RuntimeError, match="PytorchStreamReader"), writing(tmp_path):
        torch.load(path)


def test_lines_are_appended(tmp_path: Path):
    path = tmp_path / "lines.jsonl"
    append_line(path, "one")
    append_line(path, "zwei ü")
    assert path.read_text(encoding="utf-8") == "one\nzwei ü\n"
    with pytest.raises(OutputError, match=f"{tmp_path}: cannot be written: .*Is a directory"):
        append_line(tmp_path, "three")


@pytest.mark.parametrize("killed_after", ["writing", "moving the old", "moving the new"])
def test_what_a_killed_process_left_is_settled(tmp_path: Path, killed_after: str):
    folder, part, old = (tmp_path / name for name in ("best", "best.part", "best.old"))
    for path, text in ((folder, "old"), (part, "new")):
        path.mkdir()
        (path / "file").write_text(text)
    if killed_after != "writing":
        folder.rename(old)
    if killed_after == "moving the new":
        part.rename(folder)
    settle_folder(folder)
    assert list(tmp_path.iterdir()) == [folder]
    expected = "new" if killed_after == "moving the new" else "old"
    assert (folder / "file").read_text() == expected
