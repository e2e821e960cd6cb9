"""Conversations as text: a template for tokenizers that have none.

The roles are plain words, so that every vocabulary can write them, and a model that was trained
on text alone has seen their characters:

    System: Be brief.
    User: Where is the dog?
    Assistant: At home.

An answer ends with the end-of-text token, where the tokenizer has one, and else with its line.
A conversation that goes on only adds text, so a state that was kept after a turn stays valid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from i3lm.errors import TokenizerError

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
# Stands for an answer while a template shows what it writes around one.
_ANSWER = "\x1aanswer\x1a"


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


def write_question(
    text: str, tokenizer: PreTrainedTokenizerBase, before: Sequence[Message] = ()
) -> tuple[str, str]:
    """Gives what ends the answer before, and what asks a question, as the chat template has it.

    Only this is new in a conversation that goes on: what was said stays as it is, also where the
    template would write it differently by now, or the model wrote it in other tokens.

    Args:
        text: The question.
        tokenizer: A tokenizer with a chat template.
        before: What was said before, the last of it an answer; nothing for the first question,
            which has no answer to end.

    Raises:
        TokenizerError: The template refuses the conversation, leaves out the answers, or ends
            them differently when a question follows.
    """
    question = {"role": "user", "content": text}
    if not before:
        return "", _render([question], tokenizer, ask=True)
    answered = [*before[:-1], {"role": "assistant", "content": _ANSWER}]
    ending = _after_answer(_render(answered, tokenizer))
    added = _after_answer(_render([*answered, question], tokenizer, ask=True))
    if not added.startswith(ending):
        raise TokenizerError(
            f"the tokenizer's chat template ends an answer with {ending!r}, but not where a "
            "question follows, so the conversation cannot go on: give the tokenizer another "
            "chat_template"
        )
    return ending, added[len(ending) :]


def _render(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, *, ask: bool = False
) -> str:
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=ask
        )
    except TemplateError as error:
        raise TokenizerError(
            f"the tokenizer's chat template cannot write this conversation ({error}): give the "
            "tokenizer another chat_template"
        ) from error
    return str(text)


def _after_answer(text: str) -> str:
    _, *rest = text.split(_ANSWER)
    if len(rest) != 1:
        raise TokenizerError(
            f"the tokenizer's chat template writes an answer {len(rest)} times, not once, so the "
            "conversation cannot go on: give the tokenizer another chat_template"
        )
    return rest[0]
