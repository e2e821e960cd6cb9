from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest

from i3lm.data.sources import Source, read_documents
from i3lm.data.split import is_held_out
from i3lm.errors import ConfigurationError
from i3lm.tokenizers import train_tokenizer
from i3lm.training.data import open_training_text
from i3lm.training.options import DataOptions, SourceOptions

TEXTS = list(read_documents("stories", size=60))
TOKENIZER = train_tokenizer("character", TEXTS)


def silent(name: str):
    return nullcontext(lambda done, total: None)


def opened(folder: Path, **options):
    data = DataOptions(held_out_fraction=0.3, cache=str(folder), **options)
    return open_training_text(data, TOKENIZER, seed=0, progress=silent)


def an_epoch(documents, count: int) -> list[str]:
    texts = [TOKENIZER.decode(next(documents).tokens).strip() for _ in range(count)]
    return sorted(texts)


@pytest.mark.parametrize("streaming", [False, True])
def test_held_out_documents_are_not_trained_on(tmp_path: Path, streaming: bool):
    text = opened(tmp_path, source="stories", size=60, streaming=streaming)
    held_out = [document for document in TEXTS if is_held_out(document, 0.3)]
    training = [document for document in TEXTS if not is_held_out(document, 0.3)]
    assert len(held_out) > 5
    assert text.held_out.documents == len(held_out)
    assert an_epoch(text.documents, len(training)) == sorted(map(str.strip, training))


def test_a_mixture_holds_out_from_every_source(tmp_path: Path):
    mixture = [
        SourceOptions("stories", size=60, weight=2),
        SourceOptions("stories", size=30, name="fewer stories"),
    ]
    text = opened(tmp_path, mixture=mixture)
    assert len(text.summary) == 2
    assert text.summary[1].startswith("fewer stories: ")
    parts = [opened(tmp_path, source="stories", size=size).held_out for size in (60, 30)]
    assert text.held_out.documents == sum(part.documents for part in parts)
    for _ in range(40):
        next(text.documents)
    shares = {name: progress.tokens for name, progress in text.documents.progress.items()}
    assert shares["stories"] / shares["fewer stories"] == pytest.approx(2, rel=0.15)


def test_with_a_template_a_tokenized_source_is_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    said = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Otto."}]
    lines = [json.dumps({"messages": [*said, {"role": "user", "content": t}]}) for t in TEXTS]
    (tmp_path / "talks.jsonl").write_text("\n".join(lines))
    tokenizer = train_tokenizer("character", [*TEXTS, "User: Assistant: Who?"])
    data = DataOptions(str(tmp_path / "talks.jsonl"), held_out_fraction=0.3, cache=str(tmp_path))
    first = open_training_text(data, tokenizer, seed=0, progress=silent)
    assert tokenizer.chat_template is not None
    monkeypatch.setattr(Source, "read", lambda source, cursor=None: pytest.fail("was read"))
    again = open_training_text(data, tokenizer, seed=0, progress=silent)
    assert again.summary == first.summary


def test_one_source_twice_needs_two_names(tmp_path: Path):
    with pytest.raises(ConfigurationError, match=r"^stories is in the mixture more than once"):
        opened(tmp_path, mixture=[SourceOptions("stories", size=60)] * 2)


def test_records_that_a_stream_skips_are_told(tmp_path: Path):
    lines = [json.dumps({"text": text}) for text in TEXTS]
    (tmp_path / "t.jsonl").write_text("\n".join([*lines[:30], "{broken", *lines[30:]]))
    text = opened(tmp_path, source=str(tmp_path / "t.jsonl"), streaming=True)
    for _ in [document for document in TEXTS if not is_held_out(document, 0.3)]:
        next(text.documents)
    (line,) = text.skipped()
    path = tmp_path / "t.jsonl"
    assert line == f"{path}: skipped 1 record: 1 not JSON (first: {path}, line 31)"
