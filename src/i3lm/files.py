"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from i3lm.errors import I3Error, OutputError


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Makes `folder` hold what `write` puts into it, or leaves everything as it was.

    `write` gets a temporary folder beside the final one, which takes its place only when
    everything is there.

    Raises:
        OutputError: The folder cannot be written, or the disk is full.
    """
    temporary = folder.with_name(folder.name + ".part")
    previous = folder.with_name(folder.name + ".old")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        write(temporary)
        sync_folder(temporary)
        shutil.rmtree(previous, ignore_errors=True)
        if folder.exists():
            folder.rename(previous)
        temporary.rename(folder)
        sync_entries(folder.parent)
        shutil.rmtree(previous, ignore_errors=True)
    except BaseException as error:  # an interrupt, too, must leave nothing half-written
        shutil.rmtree(temporary, ignore_errors=True)
        if previous.exists() and not folder.exists():
            previous.rename(folder)
        raise as_output_error(folder, error) or error from error


def settle_folder(folder: Path) -> None:
    """Ends what a `write_folder` of this folder left open when its process was killed.

    Between its two renames neither the old nor the new content has the folder's name.
    """
    temporary = folder.with_name(folder.name + ".part")
    previous = folder.with_name(folder.name + ".old")
    if previous.exists() and not folder.exists():
        previous.rename(folder)
    for left in (temporary, previous):
        if left.exists():
            shutil.rmtree(left)


def sync_folder(folder: Path) -> None:
    """Waits until a folder and everything in it is on the disk, not only in its cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        elif path.is_dir():
            sync_entries(path)
    sync_entries(folder)


def sync_entries(folder: Path) -> None:
    """Waits until the names in a folder are on the disk; Windows has no way to ask for that."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, content: str | bytes) -> None:
    """Makes `path` hold the text (as UTF-8) or the bytes, or leaves it as it was.

    Raises:
        OutputError: The file cannot be written, or the disk is full.
    """
    temporary = path.with_name(path.name + ".part")
    try:
        if isinstance(content, str):
            content = content.encode("utf-8")
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # else a crash could leave the new name with old blocks
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise as_output_error(path, error) or error from error


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises what goes wrong inside as an OutputError of `path`, if it is about writing."""
    try:
        yield
    except Exception as error:
        raise as_output_error(path, error) or error from error


def append_line(path: Path, line: str) -> None:
    """Adds a line to the end of a file.

    Raises:
        OutputError: The file cannot be written, or the disk is full.
    """
    with writing(path), path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


_REASONS = {
    28: "no space is left on the disk, or for this process; free some or write elsewhere",
    27: "the file grew past the size limit of this process; raise the limit (ulimit -f)",
    30: "the file system is read-only; write elsewhere",
    13: "permission denied; choose a folder that you may write to",
    20: "a part of the path is a file, not a folder; choose another path",
    2: "its folder does not exist; make it, or choose another path",
    17: "a file of that name is in the way; choose another path",
}

# What PyTorch's writer of archives says: of a write that was cut short (it does not say why, and
# a full disk is the usual cause), of a file that it could not open, of a folder that went away.
_ARCHIVE = re.compile(
    r"inline_container\.cc:\d+\] \. (?:(?P<short>unexpected pos|.*file write failed)"
    r"|open file failed with strerror: (?P<reason>.+))|^Parent directory .* does not exist"
)


def as_output_error(path: Path, error: BaseException) -> OutputError | None:
    """The OutputError that says why `path` could not be written, or None for other errors.

    It is for errors that were raised while `path` was written; it cannot tell a failed read from
    a failed write. safetensors reports operating system errors as its own kind, with the number
    in the text; PyTorch's writer of archives gives no number.
    """
    if isinstance(error, I3Error | BrokenPipeError):
        return None  # it has its own words; and it is the reader of our output that went away
    text = " ".join(str(error).split())
    number = getattr(error, "errno", None)
    if number is None and (match := re.search(r"\(os error (\d+)\)", text)):
        number = int(match[1])
    if number is None and (match := _ARCHIVE.search(text)):
        number, text = (28 if match["short"] else None), match["reason"] or text
    elif number is None and not isinstance(error, OSError):
        return None
    return OutputError(f"{path}: cannot be written: {_REASONS.get(number or 0, text)}")
