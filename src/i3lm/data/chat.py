"""Documents: plain text, or the messages of a conversation."""

from __future__ import annotations

from typing import Any, TypeAlias

from i3lm.errors import TokenizerError

Message: TypeAlias = dict[str, str]
# Plain text, or messages with "role" and "content".
Document: TypeAlias = str | list[Message]

# What the "from" of a ShareGPT record calls the roles.
_ROLES = {"human": "user", "gpt": "assistant"}


def as_messages(value: object) -> list[Message] | None:
    """Gives the messages in a record's column, or None where it holds no conversation.

    Args:
        value: A list of ``{"role", "content"}``, or of ``{"from", "value"}`` as ShareGPT writes
            them; other keys of a message are left out.
    """
    if not isinstance(value, list) or not value:
        return None
    messages = []
    for item in value:
        if not isinstance(item, dict):
            return None
        role, content = item.get("role"), item.get("content")
        if role is None and content is None:
            speaker, content = item.get("from"), item.get("value")
            role = _ROLES.get(speaker, speaker) if isinstance(speaker, str) else None
        if not isinstance(role, str) or not isinstance(content, str):
            return None
        messages.append({"role": role, "content": content})
    return messages


def text_of(document: Document) -> str:
    """Gives a document's text; of a conversation, what is said, a line break between messages."""
    if isinstance(document, str):
        return document
    return "\n".join(message["content"] for message in document)


def chat_segments(messages: list[Message], tokenizer: Any) -> list[tuple[str, bool]]:
    """Gives a conversation as the chat template writes it, in parts that are learnt or not.

    What the assistant says is learnt, up to and including the template's mark for the end of its
    turn. The mark for its beginning is not: whoever asks the model writes it (only where the
    assistant speaks first is it learnt too, since few templates can write an empty conversation).
    Each part is meant to be encoded by itself, as it is when the model answers.

    Args:
        messages: The conversation.
        tokenizer: A tokenizer of transformers with a chat template.

    Returns:
        Pairs of text and whether it is learnt; the texts together are the whole conversation.

    Raises:
        TokenizerError: The tokenizer has no chat template, or one that changes earlier turns
            when a later one is added.
    """
    if not tokenizer.chat_template:
        raise TokenizerError(
            "the source holds conversations, and the tokenizer has no chat template: set its "
            "chat_template, or name a column with plain text (text_column)"
        )
    segments: list[tuple[str, bool]] = []
    written = ""
    for count, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(messages[:count], tokenizer, prompt=True) if count else written
        after = _render(messages[: count + 1], tokenizer)
        if not (before.startswith(written) and after.startswith(before)):
            raise TokenizerError(
                "the tokenizer's chat template writes earlier turns differently when a later one "
                "is added, so the assistant's part cannot be told: use a template that does not"
            )
        segments += [(before[len(written) :], False), (after[len(before) :], True)]
        written = after
    whole = _render(messages, tokenizer)
    segments.append((whole[len(written) :], False))
    return [(text, learnt) for text, learnt in segments if text]


def _render(messages: list[Message], tokenizer: Any, *, prompt: bool = False) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
