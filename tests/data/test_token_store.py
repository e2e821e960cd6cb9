from __future__ import annotations

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from i3lm.data import token_store
from i3lm.data.chat import text_of
from i3lm.data.encoding import encode_batch
from i3lm.data.sources import Source, read_documents
from i3lm.data.split import held_out_documents, is_held_out, training_documents
from i3lm.data.token_store import TokenStore, prepare_stores
from i3lm.data.tokens import tokenize_documents
from i3lm.errors import DataError, OutputError
from i3lm.tokenizers import train_tokenizer
from tests.data.test_chat import MESSAGES, TEMPLATE

SIZE = 300


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer("bpe", read_documents("stories", size=50), vocab_size=400)


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("i3lm.data.encoding.BATCH_DOCUMENTS", 10)
    monkeypatch.setattr(token_store, "SHARD_TOKENS", 5_000)
    monkeypatch.setattr(token_store, "SAFE_TOKENS", 3_000)


def prepare(tokenizer, folder: Path, source: Source | None = None, **options):
    options = {"held_out_fraction": 0.1, "folder": folder, **options}
    return prepare_stores(source or Source("stories", size=SIZE), tokenizer, **options)


def files_of(folder: Path) -> dict[str, bytes]:
    """The content of a store's files; what is no part of it is left out."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def test_documents(tokenizer, tmp_path: Path):
    training, held_out = prepare(tokenizer, tmp_path)
    texts = list(read_documents("stories", size=SIZE))
    for store, pick in ((training, training_documents), (held_out, held_out_documents)):
        expected = [encode_batch([text], tokenizer).tokens for text in pick(texts, 0.1)]
        assert store.documents == len(expected)
        for number in reversed(range(store.documents)):
            assert store.read(number).tolist() == expected[number].tolist()
            assert store.lengths[number] == len(expected[number])
        assert store.tokens == sum(map(len, expected))
        assert store.read(3, 2, 7).tolist() == expected[3][2:7].tolist()
        assert store.read(3, 5).tolist() == expected[3][5:].tolist()
        assert store.read(3, 9, 4).tolist() == []
        assert store.read_mask(0) is None
        with pytest.raises(IndexError, match=rf"document \({len(expected)}\) must be 0 to"):
            store.read(len(expected))
    assert len(list(training.folder.glob("*.tokens"))) > 5
    assert training.dtype == np.uint16


def test_the_text_is_what_evaluation_reads(tokenizer, tmp_path: Path):
    _, held_out = prepare(tokenizer, tmp_path)
    documents = held_out_documents(read_documents("stories", size=SIZE), 0.1)
    expected, text = tokenize_documents(documents, tokenizer), held_out.text()
    assert text.tokens.tolist() == expected.tokens.tolist()
    assert (text.documents, text.bytes) == (expected.documents, expected.bytes)
    assert held_out.bytes == expected.bytes


def test_workers_write_the_same_bytes(tokenizer, tmp_path: Path):
    prepare(tokenizer, tmp_path / "one")
    prepare(tokenizer, tmp_path / "two", workers=2)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_conversations(tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    records = [[{**m, "content": f"{m['content']} {n}"} for m in MESSAGES] for n in range(200)]
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join(json.dumps({"messages": record}) for record in records))
    training, held_out = prepare(tokenizer, tmp_path, Source(str(path)))
    assert len(list(training.folder.glob("*.learnt"))) > 1
    learned = [record for record in records if not is_held_out(text_of(record), 0.1)]
    assert training.documents == len(learned)
    assert training.documents + held_out.documents == 200
    for number in (0, 50, len(learned) - 1):
        ids, mask = training.read(number), training.read_mask(number)
        said = [m["content"] for m in learned[number] if m["role"] == "assistant"]
        assert tokenizer.decode(ids[mask]) == f"{said[0]}[end]\n{said[1]}[end]\n"
        assert training.read_mask(number, 4, 9).tolist() == mask[4:9].tolist()


def test_a_finished_store_is_found_again(tokenizer, tmp_path: Path, monkeypatch):
    prepare(tokenizer, tmp_path)
    before = files_of(tmp_path)
    monkeypatch.setattr(Source, "read", lambda *_: pytest.fail("read again"))
    first, _ = prepare(tokenizer, tmp_path)
    assert first.documents > 0
    assert files_of(tmp_path) == before


def test_other_sources_tokenizers_and_fractions_have_other_stores(tokenizer, tmp_path: Path):
    other = train_tokenizer("character", read_documents("stories", size=50))
    stores = [
        prepare(tokenizer, tmp_path),
        prepare(tokenizer, tmp_path, Source("stories", size=SIZE, seed=1)),
        prepare(tokenizer, tmp_path, held_out_fraction=0.2),
        prepare(other, tmp_path),
    ]
    assert len({store.fingerprint for pair in stores for store in pair}) == 8
    assert len(list(tmp_path.iterdir())) == 4


def test_progress_and_skipped_records(tokenizer, tmp_path: Path):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": text}) for text in read_documents("stories", size=100)]
    path.write_text("\n".join([*lines, "{bad", *lines]))
    seen: list[tuple] = []
    source = Source(str(path))
    training, _ = prepare(
        tokenizer, tmp_path, source, progress=lambda done, total: seen.append((done, total))
    )
    size = path.stat().st_size
    assert seen == sorted(seen)
    assert seen[-1] == (size, size)
    assert len(seen) == 20
    assert training.skipped == {"not JSON": [1, f"{path}, line 101"]}
    assert source.skipped == {"not JSON": 1}


def test_an_empty_part(tokenizer, tmp_path: Path):
    with pytest.raises(DataError, match=r"no document falls into the held-out part with held_out_"):
        prepare(tokenizer, tmp_path, Source("stories", size=1), held_out_fraction=0.001)
    training, held_out = prepare(tokenizer, tmp_path, held_out_fraction=0)
    assert (training.documents, held_out.documents) == (SIZE, 0)
    assert held_out.text().tokens.tolist() == [tokenizer.eos_token_id]


def test_work_that_broke_off_goes_on(tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    prepare(tokenizer, tmp_path / "whole")
    begun: list[int] = []
    real = Source.read

    def breaking(source, cursor=None):
        begun.append(0 if cursor is None else cursor["documents"])
        for count, item in enumerate(real(source, cursor)):
            if count == 90:
                raise KeyboardInterrupt
            yield item

    monkeypatch.setattr(Source, "read", breaking)
    for _ in range(20):
        try:
            prepare(tokenizer, tmp_path / "pieces")
            break
        except KeyboardInterrupt:
            with pytest.raises(DataError, match=r"meta.json: cannot be used \(it is not there"):
                TokenStore(next((tmp_path / "pieces").iterdir()) / "training")
    assert begun == sorted(set(begun))  # each try begins where the one before was safe
    assert len(begun) > 3
    assert files_of(tmp_path / "pieces") == files_of(tmp_path / "whole")


PROGRAM = """
import sys, time
import i3lm.data.encoding as encoding
from i3lm.data import token_store
from i3lm.data.sources import Source
from i3lm.tokenizers import load_tokenizer

if __name__ == "__main__":
    encoding.BATCH_DOCUMENTS, token_store.SHARD_TOKENS, token_store.SAFE_TOKENS = 10, 5000, 3000
    folder, tokenizer, workers, pause = sys.argv[1:]
    token_store.prepare_stores(
        Source("stories", size=300), load_tokenizer(tokenizer), held_out_fraction=0.1,
        folder=folder, workers=int(workers), progress=lambda *_: time.sleep(float(pause)),
    )
"""


@pytest.fixture
def start(tokenizer, tmp_path: Path, process_environment: dict[str, str]):
    """Starts a process that prepares the stores, with a pause after each batch."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "prepare.py").write_text(PROGRAM)
    processes = []

    def begin(folder: Path, *, workers: int = 0, pause: float = 0.0) -> subprocess.Popen:
        command = [tmp_path / "prepare.py", folder, tmp_path / "tokenizer", workers, pause]
        process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            env=process_environment, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        processes.append(process)
        return process

    yield begin
    for process in processes:
        process.kill()
        process.communicate()


def wait_for(path: Path, pattern: str) -> None:
    for _ in range(3000):
        if list(path.glob(pattern)):
            return
        time.sleep(0.01)
    pytest.fail(f"{pattern} did not appear")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_killed_process(tokenizer, tmp_path: Path, start, workers: int):
    process = start(tmp_path / "killed", workers=workers, pause=0.05)
    wait_for(tmp_path / "killed", "*/progress.json")
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)  # ends when its workers, who hold the pipe too, have ended
    folder = next((tmp_path / "killed").iterdir())
    cursor = json.loads((folder / "progress.json").read_text())["cursor"]
    assert 0 < cursor["documents"] < SIZE
    assert not (folder / "training" / "meta.json").exists()
    prepare(tokenizer, tmp_path / "killed")
    prepare(tokenizer, tmp_path / "whole")
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")


def test_two_processes_at_once(tokenizer, tmp_path: Path, start, caplog):
    first = start(tmp_path / "both", pause=0.03)
    wait_for(tmp_path / "both", "*/progress.json")
    with caplog.at_level(logging.WARNING):
        prepare(tokenizer, tmp_path / "both")
    assert "another process is tokenising this text; waiting for it" in caplog.text
    assert first.wait(timeout=30) == 0, first.stderr.read()
    prepare(tokenizer, tmp_path / "whole")
    assert files_of(tmp_path / "both") == files_of(tmp_path / "whole")


@pytest.mark.parametrize("name", ["00001.tokens", "lengths", "starts", "meta.json"])
def test_a_file_that_is_missing_or_cut(tokenizer, tmp_path: Path, name: str):
    training, _ = prepare(tokenizer, tmp_path)
    path = training.folder / name
    way_out = rf"; remove the folder {training.folder.parent} to tokenise the text again$"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=rf"^{path}: cannot be used \(.+\){way_out}"):
        TokenStore(training.folder)
    path.unlink()
    with pytest.raises(DataError, match=rf"^{path}: cannot be used \(.+\){way_out}"):
        TokenStore(training.folder)


def read_all(store: TokenStore) -> None:
    for number in range(store.documents):
        store.read(number)


def test_a_shard_that_is_damaged(tokenizer, tmp_path: Path):
    training, _ = prepare(tokenizer, tmp_path)
    path = training.folder / "00001.tokens"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    store = TokenStore(training.folder)
    store.read(0)
    store.read(store.documents - 1)  # the other shards are whole
    with pytest.raises(DataError, match=r"00001.tokens: cannot be used \(its content has changed"):
        read_all(store)
    path.unlink()
    with pytest.raises(DataError, match=r"00001.tokens: cannot be used \(No such file"):
        read_all(store)


def test_lengths_that_are_damaged(tokenizer, tmp_path: Path):
    training, _ = prepare(tokenizer, tmp_path)
    path = training.folder / "lengths"
    path.write_bytes(b"\0" + path.read_bytes()[1:])
    with pytest.raises(DataError, match=r"lengths: cannot be used \(its content has changed\)"):
        TokenStore(training.folder)


def test_a_full_disk(tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    count = 0

    def full(writer) -> None:
        nonlocal count
        count += 1
        if count > 6:
            raise OSError(errno.ENOSPC, "full")
        flush(writer)

    flush = token_store._Writer.flush
    monkeypatch.setattr(token_store._Writer, "flush", full)
    with pytest.raises(OutputError, match="cannot be written: no space is left on the disk"):
        prepare(tokenizer, tmp_path / "full")
    monkeypatch.undo()
    monkeypatch.setattr("i3lm.data.encoding.BATCH_DOCUMENTS", 10)
    monkeypatch.setattr(token_store, "SHARD_TOKENS", 5_000)
    monkeypatch.setattr(token_store, "SAFE_TOKENS", 3_000)
    prepare(tokenizer, tmp_path / "full")
    prepare(tokenizer, tmp_path / "whole")
    assert files_of(tmp_path / "full") == files_of(tmp_path / "whole")
