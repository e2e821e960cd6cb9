"""Local files: running text, JSON lines and parquet, compressed or not."""

from __future__ import annotations

import bz2
import contextlib
import glob
import gzip
import io
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, cast

from i3lm.data.chat import Document
from i3lm.data.sources.records import BadRecordError, Skipped, choose_column, document_of
from i3lm.data.sources.text import HEAD_BYTES, cut_documents, find_cut_style, read_lines
from i3lm.errors import DataError

Position = dict[str, Any]

KINDS = (".txt", ".jsonl", ".parquet")
# A batch of parquet records holds about this many bytes.
_BATCH_BYTES, _MOST_ROWS = 2**21, 1024


def _open_zst(raw: BinaryIO) -> BinaryIO:
    import pyarrow  # brings its own zstd

    return cast(BinaryIO, io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd")))


_OPENERS: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _open_zst,
}


def has_known_suffix(path: Path) -> bool:
    """Whether a path names a file of a known kind."""
    if path.suffix in _OPENERS:
        return Path(path.stem).suffix in (".txt", ".jsonl")
    return path.suffix in KINDS


@dataclass(frozen=True)
class LocalFile:
    """A file of a known kind.

    Attributes:
        path: Where it is.
        kind: One of `KINDS`.
        compression: ``.gz``, ``.bz2``, ``.xz``, ``.zst`` or empty.
        size: Bytes on the disk.
    """

    path: Path
    kind: str
    compression: str
    size: int

    @classmethod
    def recognise(cls, path: Path) -> LocalFile | None:
        """Gives the file of a path by its suffix, or None where that is not known."""
        if not has_known_suffix(path):
            return None
        compression = path.suffix if path.suffix in _OPENERS else ""
        kind = Path(path.stem).suffix if compression else path.suffix
        return cls(path, kind, compression, _stat(path).st_size)

    @contextlib.contextmanager
    def open(self, start: int = 0) -> Iterator[tuple[BinaryIO, BinaryIO]]:
        """Opens the file at a byte of its content.

        Where it is compressed, all that is before that byte is read and thrown away.

        Yields:
            The content, and the file on the disk, whose place says how much has been read.
        """
        with self.path.open("rb") as raw:
            if not self.compression:
                raw.seek(start)
                yield raw, raw
                return
            with _OPENERS[self.compression](raw) as content:
                while start > 0 and (skipped := content.read(min(start, HEAD_BYTES))):
                    start -= len(skipped)
                yield content, raw


class LocalFiles:
    """Reads files one after the other.

    Args:
        files: The files, in the order they are read in.
        text_column: Where a record holds its document; None to look.
        skipped: Counts the records that hold none.
    """

    def __init__(self, files: list[LocalFile], text_column: str | None, skipped: Skipped) -> None:
        self.files, self.text_column, self.skipped = files, text_column, skipped
        self._done = 0

    def read(self, position: Position | None) -> Iterator[tuple[Document, Position]]:
        """Yields the documents after a position, each with the position after it."""
        position = position or {"file": 0, "at": 0}
        for index in range(position["file"], len(self.files)):
            file = self.files[index]
            before = sum(file.size for file in self.files[:index])
            start = position if index == position["file"] else {"at": 0}
            with reading(file.path):
                for document, place, done in self._READERS[file.kind](self, file, start):
                    self._done = before + done
                    yield document, {"file": index, **place}

    def identity(self) -> list[Any]:
        """Gives what the content depends on: where the files are, their sizes and times."""
        return [file_identity(file.path) for file in self.files]

    def progress(self) -> tuple[int, int]:
        """Gives the bytes on the disk that have been read, and how many there are."""
        return self._done, sum(file.size for file in self.files)

    def _read_text(self, file: LocalFile, start: Position) -> Iterator[_Step]:
        with file.open() as (content, _):
            head = content.read(HEAD_BYTES)
            whole = len(head) < HEAD_BYTES
        style = find_cut_style(head, whole=whole, name=str(file.path))
        with file.open(start["at"]) as (content, raw):
            lines = read_lines(
                content, start=start["at"], number=start.get("line", 0), longest=style.longest
            )
            decoded = (
                (line, text)
                for line in lines
                for text in self._good(line.decode, f"{file.path}, line {line.number}")
            )
            for text, at, number in cut_documents(decoded, style):
                yield text, {"at": at, "line": number}, raw.tell()

    def _read_json_lines(self, file: LocalFile, start: Position) -> Iterator[_Step]:
        with file.open(start["at"]) as (content, raw):
            for line in read_lines(content, start=start["at"], number=start.get("line", 0)):
                if not line.content.strip():
                    continue

                def parse(line=line) -> Document:
                    return document_of(
                        _parse_json(line.decode(), self.text_column), self.text_column
                    )

                for document in self._good(parse, f"{file.path}, line {line.number}"):
                    yield document, {"at": line.end, "line": line.number}, raw.tell()

    def _read_parquet(self, file: LocalFile, start: Position) -> Iterator[_Step]:
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(file.path) as table:
            try:
                name = choose_column(table.schema_arrow.names, self.text_column)
            except BadRecordError as error:
                raise DataError(f"{file.path}: {error.explanation}") from error
            for row, value in _parquet_values(table, name, start["at"]):

                def take(value=value) -> Document:
                    return document_of({name: _as_python(value, name)}, name)

                for document in self._good(take, f"{file.path}, row {row + 1}"):
                    done = file.size * (row + 1) // table.metadata.num_rows
                    yield document, {"at": row + 1}, done

    def _good(self, take: Callable[[], Any], place: str) -> Iterator[Any]:
        """Yields what `take` gives, or counts why it gives nothing."""
        try:
            yield take()
        except BadRecordError as error:
            self.skipped.add(error, place)

    _READERS: ClassVar = {".txt": _read_text, ".jsonl": _read_json_lines, ".parquet": _read_parquet}


# A document, the position after it in its file, the bytes on the disk that were read.
_Step = tuple[Document, Position, int]


def _parse_json(text: str, text_column: str | None) -> Any:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:  # numbers or nesting beyond any limit, too
        reason = getattr(error, "msg", str(error))
        raise BadRecordError(
            "not JSON",
            f"is not JSON ({reason}); each line must be an object with a "
            f"{text_column or 'text'!r} field",
        ) from error
    if "\\ud" in text.lower():
        _check_surrogates(record)
    return record


def _check_surrogates(record: Any) -> None:
    try:
        json.dumps(record, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        surrogate = ord(error.object[error.start])
        raise BadRecordError(
            "not UTF-8",
            f"holds the lone surrogate U+{surrogate:04X}, which UTF-8 cannot express; write the "
            "file again with whole characters",
        ) from error


def _parquet_values(table: Any, name: str, start: int) -> Iterator[tuple[int, Any]]:
    """Yields (row, value) from a row on; row groups before it are not read."""
    row = 0
    for group in range(table.num_row_groups):
        metadata = table.metadata.row_group(group)
        if row + metadata.num_rows <= start:
            row += metadata.num_rows
            continue
        row_bytes = max(1, metadata.total_byte_size // max(1, metadata.num_rows))
        rows = max(1, min(_MOST_ROWS, _BATCH_BYTES // row_bytes))
        for batch in table.iter_batches(batch_size=rows, row_groups=[group], columns=[name]):
            for value in batch.column(0):
                if row >= start:
                    yield row, value
                row += 1


def _as_python(value: Any, name: str) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise BadRecordError(
            "not UTF-8",
            f"column {name!r} holds text that is not UTF-8 (byte 0x{byte:02x} cannot be decoded); "
            "write the file again with UTF-8 text",
        ) from error


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raises what goes wrong while a file is read as a DataError of that file."""
    import pyarrow

    try:
        yield
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(
            f"{path}: is damaged or cut short ({_one_line(error)}); copy it again"
        ) from error
    except (pyarrow.ArrowException, OSError) as error:
        if path.suffix == ".parquet":
            reason = _one_line(error)
            raise DataError(f"{path}: is not a readable parquet file ({reason})") from error
        raise _unreadable(path, error) from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _unreadable(path: Path, error: BaseException) -> DataError:
    reason = getattr(error, "strerror", None) or _one_line(error)
    return DataError(f"{path}: cannot be read ({reason}); check the file")


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise _unreadable(path, error) from error


def file_identity(path: Path) -> list[Any]:
    """Gives what tells a file's content without reading it: its place, size and time of change."""
    stat = _stat(path)
    return [str(path.resolve()), stat.st_size, stat.st_mtime_ns]


def find_files(name: str) -> list[LocalFile] | None:
    """Finds the files that a path, a folder or a pattern stands for.

    A folder gives all files of a known kind in it and its folders, sorted by path; hidden ones
    (a dot before the name) and empty ones are left out. None where nothing local has that name.

    Raises:
        DataError: What is there is empty, of an unknown kind, or cannot be looked at.
    """
    path = Path(name)
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except OSError as error:
        raise _unreadable(path, error) from error
    if is_file:
        return [_one_file(path)]
    if is_folder:
        return _known_files(sorted(_walk(path)), f"{name}: the folder holds no")
    if glob.has_magic(name):
        found = sorted(Path(match) for match in glob.glob(name, recursive=True))
        return _known_files([p for p in found if p.is_file()], f"{name}: the pattern matches no")
    return None


def _one_file(path: Path) -> LocalFile:
    if _stat(path).st_size == 0:
        raise DataError(f"{path}: is empty; give a file with text in it")
    file = LocalFile.recognise(path)
    if file is None:
        raise DataError(
            f"{path}: unknown file type {path.suffix!r}; known: {', '.join(KINDS)}, the first two "
            f"also with {', '.join(_OPENERS)} after it"
        )
    return file


def _walk(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise _unreadable(Path(error.filename or folder), error) from error

    for place, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(place) / name for name in names if not name.startswith("."))


def _known_files(paths: list[Path], problem: str) -> list[LocalFile]:
    files = [file for path in paths if (file := LocalFile.recognise(path))]
    files = [file for file in files if file.size > 0]
    if not files:
        raise DataError(
            f"{problem} {', '.join(KINDS[:-1])} or {KINDS[-1]} file with text in it; check the "
            "path, and put a pattern in quotes"
        )
    return files
