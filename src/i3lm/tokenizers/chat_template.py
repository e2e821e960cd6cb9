"""Conversations as text: a template for tokenizers that have none, and who is to be learnt.

The roles are plain words, so that every vocabulary can write them, and a model that was trained
on text alone has seen their characters:

    System: Be brief.
    User: Where is the dog?
    Assistant: At home.

An answer ends with the end-of-text token, where the tokenizer has one, and else with its line.
A conversation that goes on only adds text, so a state that was kept after a turn stays valid.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from i3lm.errors import DataError, TokenizerError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, str]
"""``role`` (system, user, assistant) and ``content``."""

# The space before an answer is the answer's: a prompt that ends with it would be cut otherwise
# than in training, where byte-level BPE joins it to the word.
CHAT_TEMPLATE = r"""
{%- for message in messages -%}
  {{- message['role'] | capitalize }}:
  {%- if message['role'] == 'assistant' -%}
    {% generation %} {{ message['content'] | trim }}{{ eos_token or '\n' }}{% endgeneration %}
  {%- else %} {{ message['content'] | trim }}{{ '\n' }}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}Assistant:{%- endif -%}
"""
_MARKERS = ("User:", "Assistant:")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatTokens(NamedTuple):
    """A conversation in tokens."""

    ids: list[int]
    learnt: list[bool]  # True at the tokens of the assistant's answers, their end included


def ensure_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Gives a tokenizer without a chat template the plain one; it is saved with the tokenizer.

    A template that is there stays. The fingerprint does not change: ids mean the same text.

    Raises:
        TokenizerError: The vocabulary cannot tell the names of the roles apart.
    """
    if tokenizer.chat_template is not None:
        return
    known = {
        tuple(i for i in ids if i != tokenizer.unk_token_id)
        for ids in tokenizer(list(_MARKERS), add_special_tokens=False)["input_ids"]
    }
    if len(known) < len(_MARKERS) or () in known:
        raise TokenizerError(
            f"the tokenizer knows too little of {' and '.join(map(repr, _MARKERS))}, which mark "
            "who speaks, to tell them apart: train one on conversations, or give it a "
            "chat_template of its own"
        )
    tokenizer.chat_template = CHAT_TEMPLATE


def render_chat(messages: Sequence[Message], end: str = "\n") -> str:
    """Gives a conversation in the plain template, for example to train a tokenizer on.

    Args:
        messages: Who says what, in order.
        end: What ends an answer.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered, _ = render_jinja_template(
        conversations=[list(messages)], chat_template=CHAT_TEMPLATE, eos_token=end
    )
    return rendered[0]


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> ChatTokens:
    """Gives the ids of a conversation, and which of them the model is to learn.

    A token counts as the assistant's if any of its characters is.

    Args:
        tokenizer: One with a chat template (see `ensure_chat_template`).
        messages: Who says what, in order.

    Raises:
        TokenizerError: The tokenizer's template does not mark the assistant's turns, or the
            tokenizer cannot tell which characters a token stands for.
        DataError: It is no list of messages with a role and a content, or the template refuses it.
    """
    from jinja2 import TemplateError

    _check_marks(tokenizer)
    _check_messages(messages)
    try:
        encoded = tokenizer.apply_chat_template(
            list(messages),
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"verbose": False},
        )
    except TemplateError as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"the chat template refuses a conversation: {reason}") from error
    learnt = [bool(mark) for mark in encoded["assistant_masks"]]
    return ChatTokens(encoded["input_ids"], learnt)


def _check_marks(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.is_fast:
        raise TokenizerError(
            f"a tokenizer of class {type(tokenizer).__name__} cannot tell which characters a "
            "token stands for, so the answers cannot be marked: use one with a tokenizer.json"
        )
    if not _GENERATION.search(tokenizer.get_chat_template()):
        raise TokenizerError(
            "the tokenizer's chat template does not mark the assistant's turns: put "
            "{% generation %} and {% endgeneration %} around them in chat_template.jinja"
        )


def _check_messages(messages: Sequence[Message]) -> None:
    if not messages:
        raise DataError("a conversation has no messages: leave it out")
    for number, message in enumerate(messages):
        for key in ("role", "content"):
            value = message.get(key) if isinstance(message, Mapping) else None
            if not isinstance(value, str):
                raise DataError(
                    f"message {number} of a conversation has no text under {key!r}: a message is "
                    '{"role": "user", "content": "..."}'
                )
            try:
                value.encode("utf-8")
            except UnicodeEncodeError as error:
                raise DataError(
                    f"message {number} of a conversation holds a lone surrogate at character "
                    f"{error.start} of its {key}, which UTF-8 cannot express"
                ) from error
