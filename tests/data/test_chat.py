from __future__ import annotations

import pytest

from i3lm.data.chat import as_messages, chat_segments, text_of
from i3lm.data.corpora import load_corpus
from i3lm.data.encoding import encode_batch, separator_ids
from i3lm.errors import TokenizerError
from i3lm.tokenizers import ensure_chat_template, lowercases, render_chat, train_tokenizer

MESSAGES = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Farewell"},
    {"role": "user", "content": "?"},
]
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}[end]\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
# Writes only the newest answer.
FORGETFUL = "{% for m in messages %}{% if loop.last %}{{ m.content }}{% endif %}{% endfor %}"


def tokenizer_with(template: str | None):
    tokenizer = train_tokenizer("bpe", ["any text"], vocab_size=270)
    tokenizer.chat_template = template
    return tokenizer


def test_messages():
    pair = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert as_messages([{**message, "weight": 1} for message in pair]) == pair
    shared = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    assert as_messages(shared) == pair
    assert as_messages([{"from": "tool", "value": "5"}]) == [{"role": "tool", "content": "5"}]


@pytest.mark.parametrize(
    "value",
    [None, "text", [], ["text"], [{"role": "user"}], [{"role": "user", "content": [1]}], [{}]],
)
def test_what_is_no_conversation(value: object):
    assert as_messages(value) is None


def test_text():
    assert text_of("text") == "text"
    assert text_of(MESSAGES[:3]) == "Be kind.\nHi\nHello"


def test_segments():
    assert chat_segments(MESSAGES, tokenizer_with(TEMPLATE)) == [
        ("[system]Be kind.[end]\n[user]Hi[end]\n[assistant]", False),
        ("Hello[end]\n", True),
        ("[user]Bye[end]\n[assistant]", False),
        ("Farewell[end]\n", True),
        ("[user]?[end]\n", False),
    ]


def test_an_assistant_that_speaks_first():
    segments = chat_segments(MESSAGES[2:4], tokenizer_with(TEMPLATE))
    assert segments == [("[assistant]Hello[end]\n", True), ("[user]Bye[end]\n", False)]


def test_templates_that_do_not_fit():
    with pytest.raises(TokenizerError, match="the tokenizer has no chat template: set its chat_"):
        chat_segments(MESSAGES, tokenizer_with(None))
    with pytest.raises(TokenizerError, match="writes earlier turns differently when a later one"):
        chat_segments(MESSAGES, tokenizer_with(FORGETFUL))


@pytest.mark.parametrize("kind", ["character", "chunk", "bpe"])
def test_answers_and_their_ends_are_learnt_and_nothing_else(kind: str):
    texts = [*load_corpus("stories", size=300), render_chat(MESSAGES)]
    tokenizer = train_tokenizer(kind, texts, vocab_size=400 if kind == "bpe" else None)
    ensure_chat_template(tokenizer)
    encoded = encode_batch([MESSAGES], tokenizer)
    assert encoded.learnt is not None
    learnt = tokenizer.decode(encoded.tokens[encoded.learnt])
    end = tokenizer.eos_token or "\n"
    expected = f" Hello{end} Farewell{end}"
    assert learnt == (expected.lower() if lowercases(tokenizer) else expected)
    # What asks for an answer is encoded as it is when the model answers.
    asked = tokenizer.apply_chat_template(MESSAGES[:2], add_generation_prompt=True)["input_ids"]
    start = len(separator_ids(tokenizer))
    assert encoded.tokens[start : start + len(asked)].tolist() == asked
    assert encoded.learnt[start + len(asked)]
