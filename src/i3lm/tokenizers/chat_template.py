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
