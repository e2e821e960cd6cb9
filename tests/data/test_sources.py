from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from i3lm.data.sources import END_OF_TEXT, Source, read_documents
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


def write_compressed(name: str, content: bytes) -> None:
    """Writes a file as its suffix says."""
    if name.endswith(".zst"):
        with pyarrow.CompressedOutputStream(name, "zstd") as file:
            file.write(content)
        return
    writers = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    with writers.get(Path(name).suffix, open)(name, "wb") as file:
        file.write(content)


COMPRESSIONS = ["", ".gz", ".bz2", ".xz", ".zst"]


@pytest.mark.parametrize("suffix", COMPRESSIONS[1:])
def test_compressed(suffix: str):
    Path("a.txt").write_text("\n\n".join(f"paragraph {n} " + "x" * 90 for n in range(4000)))
    write_compressed(f"b.txt{suffix}", Path("a.txt").read_bytes())
    assert read(f"b.txt{suffix}") == read("a.txt")
    write_compressed(f"c.jsonl{suffix}", b'{"text": "one"}\n{"text": "two"}\n')
    assert read(f"c.jsonl{suffix}") == ["one", "two"]


@pytest.mark.parametrize("suffix", COMPRESSIONS[1:])
def test_compressed_and_damaged(suffix: str):
    name = f"a.txt{suffix}"
    lines = "".join(f"line {n} {hash(n)}\n" for n in range(20_000))
    write_compressed(name, lines.encode())
    whole = Path(name).read_bytes()
    Path(name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=rf"^{name}: (is damaged or cut short|cannot be read) \(.+"):
        read(name)
    Path(name).write_bytes(b"not compressed at all")
    with pytest.raises(DataError, match=rf"^{name}: (is damaged or cut short|cannot be read) \(.+"):
        read(name)


def test_folders_and_patterns():
    Path("data/deep/.hidden").mkdir(parents=True)
    for name in ("b.txt", "deep/a.txt", "deep/.hidden/x.txt", ".x.txt"):
        Path("data", name).write_text(f"text of {name}")
    Path("data/c.jsonl").write_text('{"text": "text of c"}')
    Path("data/README.md").write_text("not a document")
    Path("data/empty.txt").touch()
    assert read("data") == ["text of b.txt", "text of c", "text of deep/a.txt"]
    assert read("data/**/*.txt") == ["text of b.txt", "text of deep/a.txt"]
    Path("none").mkdir()
    with pytest.raises(DataError, match=r"none: the folder holds no .txt, .jsonl or .parquet"):
        read("none")
    with pytest.raises(DataError, match=r"data/\*.csv: the pattern matches no .txt, .jsonl or"):
        read("data/*.csv")


def test_conversations():
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    shared = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    records = [{"messages": messages}, {"conversations": shared}, {"conversations": []}]
    Path("a.jsonl").write_text("\n".join(map(json.dumps, records)))
    source = Source("a.jsonl")
    assert [document for document, _ in source.read()] == [messages, messages]
    assert source.skipped == {"without text in column 'conversations'": 1}
    pyarrow.parquet.write_table(pyarrow.table({"messages": [messages]}), "a.parquet")
    assert [document for document, _ in Source("a.parquet").read()] == [messages]
    assert read("a.jsonl") == ["Hi\nHello"] * 2  # as text


def test_bad_records_are_skipped_and_counted():
    lines = [
        b'{"text": "one"}', b'{"te', b"[1]", b'{"text": 5}', b'{"text": "\xe9"}',
        b'{"text": "\\ud800"}', b'{"text": "\\ud83d\\ude00"}', b'{"no": 1}', b'{"text": " "}',
    ]  # fmt: skip
    Path("a.jsonl").write_bytes(b"\n".join(lines))
    source = Source("a.jsonl")
    assert [document for document, _ in source.read()] == ["one", "😀"]
    assert source.skipped == {
        "not JSON": 1, "not an object": 1, "without text in column 'text'": 2, "not UTF-8": 2,
    }  # fmt: skip
    assert source.skipped.places["not UTF-8"] == "a.jsonl, line 5"
    list(source.read())
    assert source.skipped.total() == 6  # a new reading counts anew


def test_a_line_of_a_text_that_is_not_utf8_is_skipped():
    lines = [b"line %d" % n for n in range(100)]
    Path("a.txt").write_bytes(b"\n".join([*lines, b"caf\xe9", *lines]))
    source = Source("a.txt")
    text = "\n".join(document for document, _ in source.read())
    assert text == "\n".join(line.decode() for line in lines * 2)
    assert str(source.skipped) == "skipped 1 record: 1 not UTF-8 (first: a.txt, line 101)"


def test_a_source_that_is_all_bad_is_not_read_to_its_end():
    Path("a.jsonl").write_text('{"story": 1}\n' * 500)
    source = Source("a.jsonl")
    message = (
        r"^a.jsonl, line 1: has no text in column 'text'; its columns are story; name one .* "
        r"\(none of the first 100 records holds text\)$"
    )
    with pytest.raises(DataError, match=message):
        list(source.read())
    assert source.skipped.total() == 100


def test_a_very_long_line_is_cut():
    words = " ".join(f"wörd{n}" for n in range(30_000))
    Path("a.txt").write_text(words + "\n" + "ü" * 200_000, encoding="utf-8")
    documents = read("a.txt")
    assert max(map(len, documents)) <= 2**17
    assert "".join("".join(documents).split()) == words.replace(" ", "") + "ü" * 200_000


BAD_OR_GOOD = [{"text": "a"}, {"text": ""}, {"text": None}, {"no": 1}]
# Each example writes its files anew, so they may share the test's folder.
in_one_folder = settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
# Lines of every kind, with what a cut must not split.
line = st.one_of(
    st.sampled_from(["", "", " ", END_OF_TEXT, "é" * 50, "x y " * 30]),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n\r"), max_size=40),
)


def check_every_cursor(name: str, **options) -> None:
    whole = list(Source(name, **options).read())
    for count, (_, cursor) in enumerate(whole, start=1):
        rest = Source(name, **options).read(json.loads(json.dumps(cursor)))
        assert list(rest) == whole[count:]


@given(st.lists(line, min_size=1), st.booleans(), st.sampled_from(COMPRESSIONS))
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_every_cursor_in_a_text_gives_exactly_the_rest(
    lines: list[str], windows: bool, suffix: str
):
    content = ("\r\n" if windows else "\n").join(["begin", *lines]).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("i3lm.data.sources.text._LEAST_BLOCK_CHARACTERS", 30)
        patch.setattr("i3lm.data.sources.text._LONGEST_UNMARKED", 64)
        patch.setattr("i3lm.data.sources.text._LONGEST_MARKED", 64)
        write_compressed(f"a.txt{suffix}", content)
        check_every_cursor(f"a.txt{suffix}")
        text = "".join(read(f"a.txt{suffix}")).replace(END_OF_TEXT, "")
        expected = content.decode().replace(END_OF_TEXT, "")
        assert "".join(text.split()) == "".join(expected.split())  # nothing lost, nothing doubled


@given(
    st.lists(
        st.sampled_from([{"text": "a"}, {"text": ""}, {"text": None}, {"no": 1}]), max_size=20
    ),
    st.integers(1, 25),
)
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_every_cursor_in_a_folder_gives_exactly_the_rest(records: list[dict], size: int):
    records = [{"text": "first"}, *records]
    numbered = [{**r, "text": r["text"] and f"{r['text']}{n}"} if "text" in r else r
                for n, r in enumerate(records)]  # fmt: skip
    Path("d").mkdir(exist_ok=True)
    Path("d/a.jsonl").write_text("\n".join(["", *map(json.dumps, numbered)]))
    table = pyarrow.table({"text": [record.get("text") for record in numbered]})
    pyarrow.parquet.write_table(table, "d/b.parquet", row_group_size=3)
    Path("d/c.txt").write_text("last")
    check_every_cursor("d", size=size)


@pytest.mark.parametrize("name", ["stories", "pydocs"])
def test_every_cursor_in_a_corpus_gives_exactly_the_rest(name: str):
    check_every_cursor(name, size=12)


def test_fingerprints():
    Path("a.jsonl").write_text('{"text": "one"}')
    first = Source("a.jsonl").fingerprint()
    assert Source("a.jsonl").fingerprint() == first
    assert Source("a.jsonl", text_column="story").fingerprint() != first
    assert Source("a.jsonl", size=1).fingerprint() != first
    Path("a.jsonl").write_text('{"text": "other"}')
    assert Source("a.jsonl").fingerprint() != first
    assert Source("stories").fingerprint() != Source("stories", seed=1).fingerprint()


def test_progress():
    Path("d").mkdir()
    Path("d/a.txt").write_text("\n\n".join(["x" * 500] * 2000))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", "two"]}), "d/b.parquet")
    source = Source("d")
    seen = [source.progress() for _ in source.read()]
    total = sum(path.stat().st_size for path in Path("d").iterdir())
    assert seen == sorted(seen)
    assert seen[-1] == (total, total)
    assert len(set(seen)) > 5
