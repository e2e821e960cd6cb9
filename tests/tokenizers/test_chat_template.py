from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from i3lm.data.corpora import load_corpus
from i3lm.errors import DataError, TokenizerError
from i3lm.tokenizers import load_tokenizer, lowercases, tokenizer_fingerprint, train_tokenizer
from i3lm.tokenizers.chat_template import encode_chat, ensure_chat_template, render_chat

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Where is the dog?"},
    {"role": "assistant", "content": "At home.\nIt sleeps."},
    {"role": "user", "content": " Thanks! "},
    {"role": "assistant", "content": "Bye."},
]
LINES = "System: Be brief.\nUser: Where is the dog?\nAssistant: At home.\nIt sleeps.{end}"
LINES += "User: Thanks!\nAssistant: Bye.{end}"


@pytest.fixture(scope="module", params=["character", "chunk", "bpe"])
def tokenizer(request: pytest.FixtureRequest):
    texts = [*load_corpus("stories", size=300), render_chat(TALK)]
    size = 400 if request.param == "bpe" else None
    trained = train_tokenizer(request.param, texts, vocab_size=size)
    ensure_chat_template(trained)
    return trained


def test_a_conversation_reads_as_lines(tokenizer):
    end = tokenizer.eos_token or "\n"
    assert tokenizer.apply_chat_template(TALK, tokenize=False) == LINES.format(end=end)
    assert render_chat(TALK, end) == LINES.format(end=end)


def test_answers_and_their_ends_are_learnt_and_nothing_else(tokenizer):
    ids, learnt = encode_chat(tokenizer, TALK)
    assert len(ids) == len(learnt)
    whole = tokenizer.decode([i for i, mark in zip(ids, learnt, strict=True) if mark])
    end = tokenizer.eos_token or "\n"
    expected = f" At home.\nIt sleeps.{end} Bye.{end}"
    if not lowercases(tokenizer):
        assert whole == expected
        return
    # A chunk that lies across the edge of an answer counts as the answer's, up to two characters.
    assert len(whole) <= len(expected) + 2 * 4
    for answer in (" at home.\nit sleeps.", " bye."):
        assert answer in whole


def test_what_asks_for_an_answer_begins_the_conversation(tokenizer):
    ids, learnt = encode_chat(tokenizer, TALK)
    asked = tokenizer.apply_chat_template(TALK[:2], add_generation_prompt=True)["input_ids"]
    assert ids[: len(asked)] == asked
    assert not any(learnt[: len(asked)])
    assert learnt[len(asked)]


@given(
    contents=st.lists(st.text("ab .?\n", max_size=12), min_size=1, max_size=6),
    first=st.sampled_from(["system", "user"]),
)
@settings(max_examples=60, deadline=None)
def test_a_longer_conversation_only_adds_text(contents: list[str], first: str):
    roles = [first, *["user", "assistant"] * 3]
    talk = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    for end in ("\n", "<EOS>"):
        for length in range(1, len(talk)):
            assert render_chat(talk, end).startswith(render_chat(talk[:length], end))


def test_saved_with_the_tokenizer(tokenizer, tmp_path: Path):
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert encode_chat(loaded, TALK) == encode_chat(tokenizer, TALK)
    assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(tokenizer)


def test_a_template_that_is_there_stays():
    tokenizer = train_tokenizer("character", ["x"])
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    ensure_chat_template(tokenizer)
    assert tokenizer.chat_template == "{{ messages[0]['content'] }}"
    with pytest.raises(TokenizerError, match="does not mark the assistant's turns"):
        encode_chat(tokenizer, TALK)


@pytest.mark.parametrize("text", ["xyz", "b"])
def test_a_vocabulary_that_cannot_tell_the_roles_apart(text: str):
    tokenizer = train_tokenizer("character", [text])
    with pytest.raises(TokenizerError, match=r"knows too little of 'User:' and 'Assistant:'"):
        ensure_chat_template(tokenizer)
    assert tokenizer.chat_template is None


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "a conversation has no messages"),
        ([{"role": "user"}], "message 0 of a conversation has no text under 'content'"),
        ([TALK[0], "hello"], "message 1 of a conversation has no text under 'role'"),
        ([{"role": "user", "content": ["parts"]}], "has no text under 'content'"),
        ([{"role": "user", "content": "a \ud800"}], "lone surrogate at character 2 of its content"),
    ],
)
def test_what_is_no_conversation(tokenizer, messages: list, reason: str):
    with pytest.raises(DataError, match=reason):
        encode_chat(tokenizer, messages)


def test_a_conversation_that_a_template_refuses():
    tokenizer = train_tokenizer("character", ["x"])
    tokenizer.chat_template = (
        "{% generation %}{% endgeneration %}{{ raise_exception('Roles must alternate') }}"
    )
    with pytest.raises(DataError, match=r"^the chat template refuses a conversation: Roles must"):
        encode_chat(tokenizer, TALK)
