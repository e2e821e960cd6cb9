from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from i3lm.data.sources import Source, read_documents
from i3lm.data.split import is_held_out
from i3lm.errors import DataError


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def read(source: str, **options) -> list[str]:
    return list(read_documents(source, **options))


def test_marks():
    Path("a.txt").write_text("one\n\nstill one\n<|endoftext|>\n<|endoftext|>\ntwo\n<|endoftext|>")
    assert read("a.txt") == ["one\n\nstill one", "two"]


def test_paragraphs_are_kept_whole():
    paragraphs = [f"paragraph {n} " + "x" * 700 + "\nits second line" for n in range(300)]
    Path("a.txt").write_text("\n\n\n".join(paragraphs))
    documents = read("a.txt")
    assert len(documents) == 100  # three paragraphs reach 2,000 characters
    assert "\n\n\n".join(documents) == "\n\n\n".join(paragraphs)
    assert all(document.startswith("paragraph") for document in documents)


def test_a_small_text_is_cut_small_enough_to_hold_some_out():
    Path("a.txt").write_text("\n".join(f"line {n} of a small text" for n in range(800)))
    documents = read("a.txt")
    assert len(documents) > 60
    assert any(is_held_out(document, 0.05) for document in documents)


def test_lines_are_kept_whole():
    lines = [f"line {n} " + "x" * 100 for n in range(60)]
    Path("a.txt").write_text("\n".join(lines))
    documents = read("a.txt")
    assert len(documents) > 2
    assert "\n".join(documents).split("\n") == lines


def test_byte_order_mark_and_windows_line_ends():
    Path("a.txt").write_bytes(b"\xef\xbb\xbfone\r\n<|endoftext|>\r\ntwo\r\n")
    assert read("a.txt") == ["one", "two"]


def test_json_lines():
    records = [{"text": "one", "story": "1"}, {"text": "zwei ü", "story": "2"}]
    Path("a.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n\n")
    assert read("a.jsonl") == ["one", "zwei ü"]
    assert read("a.jsonl", text_column="story") == ["1", "2"]


def test_parquet():
    table = pyarrow.table({"text": ["one", "two", " "], "story": ["1", "2", "3"]})
    pyarrow.parquet.write_table(table, "a.parquet")
    assert read("a.parquet") == ["one", "two"]
    assert read("a.parquet", text_column="story") == ["1", "2", "3"]


@pytest.mark.parametrize("name", ["stories", "pydocs"])
def test_built_in(name: str):
    documents = read(name, size=5)
    assert len(documents) == 5
    assert read(name, size=5) == documents
    assert all(document.strip() for document in documents)


def test_size():
    Path("a.txt").write_text("<|endoftext|>\n".join(["one\n", "\n", "two\n", "three\n"]))
    assert read("a.txt", size=2) == ["one", "two"]
    assert read("a.txt", size=9) == ["one", "two", "three"]


def test_missing_columns():
    columns = r"has no text in column 'text'; its columns are story, number; name one with the "
    records = {"story": "one", "number": 1}
    Path("a.jsonl").write_text(json.dumps(records))
    with pytest.raises(DataError, match=r"a.jsonl, line 1: " + columns):
        read("a.jsonl")
    with pytest.raises(DataError, match=r"has no text in column 'number'"):
        read("a.jsonl", text_column="number")
    pyarrow.parquet.write_table(pyarrow.table({k: [v] for k, v in records.items()}), "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet: " + columns):
        read("a.parquet")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", r"a.txt: is empty; give a file with text in it"),
        ("a.txt", b"\n\n", r"a.txt: holds no text; give a source with at least one document"),
        ("a.txt", b"caf\xe9", r"a.txt: is not UTF-8 \(byte 0xe9 cannot be decoded\); convert it"),
        ("a.jsonl", b'{"text": "\xe9"}', r"a.jsonl, line 1: is not UTF-8 \(byte 0xe9"),
        ("a.jsonl", b'{"te', r"a.jsonl, line 1: is not JSON \(.*\); each line must be an object"),
        ("a.jsonl", b"9" * 5000, r"a.jsonl, line 1: is not JSON \(Exceeds the limit .*; each line"),
        ("a.jsonl", b"[" * 99_999, r"a.jsonl, line 1: is not JSON \(.+\); each line"),
        ("a.jsonl", b"[1]", r"a.jsonl, line 1: holds list, not an object with a 'text' field"),
        ("a.parquet", b"PAR1 cut", r"a.parquet: is not a readable parquet file \("),
        ("a.csv", b"a,b", r"a.csv: unknown file type '.csv'; known: .txt, .jsonl, .parquet"),
    ],
)
def test_files_that_cannot_be_read(name: str, content: bytes, message: str):
    Path(name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(name)


def test_places_that_cannot_be_read():
    with pytest.raises(DataError, match=r"no.txt: no such file; give the path of .txt"):
        read("no.txt")
    with pytest.raises(DataError, match=r"story: no such file; .* built-in corpus \(pydocs, stor"):
        read("story")
    with pytest.raises(DataError, match=r"size \(0\) must be at least 1 document"):
        read("stories", size=0)


def test_read_errors_are_reported(monkeypatch: pytest.MonkeyPatch):
    Path("a.txt").write_text("text")

    def refuse(*arguments, **settings):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    message = r"a.txt: cannot be read \(Permission denied\); check the file"
    with pytest.raises(DataError, match=message):
        read("a.txt")
    monkeypatch.undo()

    monkeypatch.setattr(Path, "stat", refuse)
    with pytest.raises(DataError, match=message):
        read("a.txt")


def damaged(content: bytes, start: int, end: int) -> bytes:
    return content[:start] + b"\xff" * (end - start) + content[end:]


def test_parquet_that_is_damaged_inside():
    words = [f"word {n} " * 20 for n in range(2000)]
    pyarrow.parquet.write_table(pyarrow.table({"text": words}), "a.parquet", compression="snappy")
    whole = Path("a.parquet").read_bytes()
    for start, end in ((4, 40), (1000, 3000), (len(whole) - 300, len(whole) - 8)):
        Path("a.parquet").write_bytes(damaged(whole, start, end))
        with pytest.raises(DataError, match=r"^a.parquet: is not a readable parquet file \(.+\)$"):
            read("a.parquet")


def test_parquet_whose_text_is_not_utf8():
    column = pyarrow.array([b"one", b"caf\xe9"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), "a.parquet")
    source = Source("a.parquet")
    assert [document for document, _ in source.read()] == ["one"]
    assert str(source.skipped) == "skipped 1 record: 1 not UTF-8 (first: a.parquet, row 2)"
