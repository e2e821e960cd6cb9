"""Documents from wherever the user's text is."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from i3lm.data.corpora import BUILT_IN, load_corpus
from i3lm.errors import DataError

END_OF_TEXT = "<|endoftext|>"
# Documents cut from running text have about this many characters; a hundredth of a small file,
# so that some of them are held out.
_BLOCK_CHARACTERS, _LEAST_BLOCK_CHARACTERS = 2_000, 200


def read_documents(
    source: str,
    *,
    text_column: str = "text",
    split: str = "train",
    seed: int = 0,
    size: int | None = None,
) -> Iterator[str]:
    """Yields the documents of a source, one string each, in the source's order.

    Args:
        source: A built-in corpus (``stories``, ``pydocs``), the path of a ``.txt``, ``.jsonl``
            or ``.parquet`` file, or the name of a data set on the Hub (``owner/name``).
        text_column: Where a record of a ``.jsonl`` or ``.parquet`` file or of a Hub data set
            holds its text.
        split: Which split of a Hub data set to read.
        seed: Seed of a generated corpus.
        size: How many documents to yield at most; None means all (for a generated corpus, its
            default size).

    Raises:
        DataError: The source is missing, empty, not UTF-8, damaged, or has no such column.
    """
    if size is not None and size < 1:
        raise DataError(f"size ({size}) must be at least 1 document; leave it out for all")
    count = 0
    for document in _open(source, text_column, split, seed, size):
        if document.strip():
            yield document
            count += 1
            if count == size:
                return
    if count == 0:
        raise DataError(f"{source}: holds no text; give a source with at least one document")


def _open(source: str, text_column: str, split: str, seed: int, size: int | None) -> Iterable[str]:
    if source in BUILT_IN:
        return load_corpus(source, seed=seed, size=size)
    path = Path(source)
    readers = {".txt": _read_text, ".jsonl": _read_json_lines, ".parquet": _read_parquet}
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
        size_in_bytes = path.stat().st_size if is_file else 0
    except OSError as error:
        raise _unreadable(path, error) from error
    if is_folder:
        raise DataError(f"{source}: is a folder; give one .txt, .jsonl or .parquet file")
    if is_file:
        if size_in_bytes == 0:
            raise DataError(f"{source}: is empty; give a file with text in it")
        if path.suffix not in readers:
            raise DataError(
                f"{source}: unknown file type {path.suffix!r}; known: {', '.join(readers)}"
            )
        return readers[path.suffix](path, text_column)
    looks_like_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", source) and path.suffix not in readers
    if looks_like_hub:
        return _read_hub(source, text_column, split)
    raise DataError(
        f"{source}: no such file; give a path to a .txt, .jsonl or .parquet file, a Hub name "
        f"(owner/name), or a built-in corpus ({', '.join(BUILT_IN)})"
    )


def _decoded_lines(path: Path) -> Iterator[str]:
    """Yields the lines of a UTF-8 file, line ends kept as ``\\n``."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from file
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise DataError(
            f"{path}: is not UTF-8 (byte 0x{byte:02x} cannot be decoded); convert it first, for "
            "example with: iconv -f latin1 -t utf-8"
        ) from error
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path}: cannot be read ({error.strerror or error}); check the file")


def _read_text(path: Path, text_column: str) -> Iterator[str]:
    """Cuts a text file into documents.

    A file with ``<|endoftext|>`` marks is cut there. Any other file is cut between paragraphs
    (at blank lines; between lines where there are none) into blocks of about 2,000 characters
    (fewer in a file under 200 kB), so that neighbouring text stays together and a held-out part
    can be set aside.
    """
    style = _cut_style(path)
    hundredth = path.stat().st_size // 100
    block_length = max(_LEAST_BLOCK_CHARACTERS, min(_BLOCK_CHARACTERS, hundredth))
    block: list[str] = []
    length, previous_blank = 0, False
    for line in _decoded_lines(path):
        blank = not line.strip()
        if style == "marks":
            cut, drop = line.strip() == END_OF_TEXT, True
        else:
            boundary = not blank and (previous_blank or style == "lines")
            cut, drop = length >= block_length and boundary, False
        if cut:
            yield "".join(block).strip()
            block, length = [], 0
        if not (cut and drop):
            block.append(line)
            length += len(line)
        previous_blank = blank
    yield "".join(block).strip()


def _cut_style(path: Path) -> str:
    """How to cut a text file, judged by its first 10,000 lines."""
    style = "lines"
    for line, _ in zip(_decoded_lines(path), range(10_000), strict=False):
        if line.strip() == END_OF_TEXT:
            return "marks"
        if not line.strip():
            style = "paragraphs"
    return style


def _read_json_lines(path: Path, text_column: str) -> Iterator[str]:
    for number, line in enumerate(_decoded_lines(path), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # numbers or nesting beyond any limit, too
            reason = getattr(error, "msg", str(error))
            raise DataError(
                f"{path}, line {number}: is not JSON ({reason}); each line must be an object "
                f"with a {text_column!r} field"
            ) from error
        yield _text_of(record, text_column, where=f"{path}, line {number}")


def _text_of(record: object, text_column: str, *, where: str) -> str:
    if not isinstance(record, dict):
        raise DataError(
            f"{where}: holds {type(record).__name__}, not an object with a {text_column!r} field"
        )
    text = record.get(text_column)
    if not isinstance(text, str):
        columns = ", ".join(map(str, record)) or "none"
        raise DataError(
            f"{where}: has no text in column {text_column!r}; its columns are {columns}; name "
            "one with the text_column option"
        )
    return text


def _read_parquet(path: Path, text_column: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if text_column not in names:
                _text_of(dict.fromkeys(names), text_column, where=str(path))
            for batch in file.iter_batches(columns=[text_column]):
                for record in batch.to_pylist():
                    yield _text_of(record, text_column, where=str(path))
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise DataError(
            f"{path}: column {text_column!r} holds text that is not UTF-8 (byte 0x{byte:02x} "
            "cannot be decoded); write the file again with UTF-8 text"
        ) from error
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: is not a readable parquet file ({reason})") from error


def _read_hub(name: str, text_column: str, split: str) -> Iterator[str]:
    from datasets import load_dataset

    count = 0
    try:
        for record in load_dataset(name, split=split, streaming=True):
            yield _text_of(record, text_column, where=name)
            count += 1
    except DataError:
        raise
    except Exception as error:  # the library raises a dozen kinds, from a dozen libraries
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        problem = f"stopped after {count:,} records" if count else "could not be opened"
        raise DataError(
            f"{name}: {problem} on the Hub (split {split!r}): {reason}; check the name and the "
            "network, or give the path of a local file"
        ) from error
