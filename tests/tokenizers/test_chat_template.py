from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from i3lm.data.corpora import load_corpus
from i3lm.errors import TokenizerError
from i3lm.tokenizers import load_tokenizer, tokenizer_fingerprint, train_tokenizer
from i3lm.tokenizers.chat_template import ensure_chat_template, render_chat, write_question

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


@given(contents=st.lists(st.text("ab .?\n", max_size=12), min_size=1, max_size=7))
@settings(max_examples=60, deadline=None)
def test_questions_and_answers_make_up_the_conversation(contents: list[str]):
    tokenizer = train_tokenizer("character", [render_chat(TALK)])
    ensure_chat_template(tokenizer)
    contents = contents[: len(contents) - (len(contents) + 1) % 2]  # a question is the last
    roles = ["user", "assistant"] * 4
    talk = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    written = ""
    for number in range(0, len(talk), 2):
        ending, question = write_question(contents[number], tokenizer, talk[:number])
        written += ending + question
        if number + 1 < len(talk):
            written += " " + contents[number + 1].strip()
    assert written == tokenizer.apply_chat_template(
        talk, tokenize=False, add_generation_prompt=True
    )


def test_only_what_is_new_is_written_whatever_the_template_does_to_earlier_turns():
    tokenizer = train_tokenizer("character", ["x"])
    tokenizer.chat_template = (
        "Begin.{% for m in messages %}[{{ m['role'] }}{{ loop.revindex if m['role'] == 'user' }}]"
        "{{ m['content'] }}[end]\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    assert write_question("a", tokenizer) == ("", "Begin.[user1]a[end]\n[assistant]")
    before = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert write_question("c", tokenizer, before) == ("[end]\n", "[user1]c[end]\n[assistant]")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no users here') }}", r"cannot write this conv.* \(no users here\)"),
        ("{{ messages[0]['content'] }}", "writes an answer 0 times, not once"),
        (
            "{% for m in messages %}{{ m['content'] }}{{ '.' if loop.last }}{% endfor %}",
            r"ends an answer with '\.', but not where a question follows",
        ),
    ],
)
def test_templates_by_which_no_conversation_goes_on(template: str, message: str):
    tokenizer = train_tokenizer("character", ["x"])
    tokenizer.chat_template = template
    with pytest.raises(TokenizerError, match=message):
        write_question("b", tokenizer, TALK[1:3])


def test_saved_with_the_tokenizer(tokenizer, tmp_path: Path):
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.chat_template == tokenizer.chat_template
    assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(tokenizer)


def test_a_template_that_is_there_stays():
    tokenizer = train_tokenizer("character", ["x"])
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    ensure_chat_template(tokenizer)
    assert tokenizer.chat_template == "{{ messages[0]['content'] }}"


@pytest.mark.parametrize("text", ["xyz", "b"])
def test_a_vocabulary_that_cannot_tell_the_roles_apart(text: str):
    tokenizer = train_tokenizer("character", [text])
    with pytest.raises(TokenizerError, match=r"knows too little of 'User:' and 'Assistant:'"):
        ensure_chat_template(tokenizer)
    assert tokenizer.chat_template is None
