"""What every trainer asks of its stream of texts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain

from i3lm.errors import TokenizerError


def require_texts(texts: Iterable[str]) -> Iterator[str]:
    """Give back the texts that are not empty, still as a stream, after checking there is one.

    Args:
        texts: Any iterable of strings; it is consumed once and never held as a whole.

    Raises:
        TokenizerError: No text holds a character, or (while streaming) one cannot be encoded.
        TypeError: A single string was passed, which would be read as one text per character.
    """
    if isinstance(texts, str):
        raise TypeError("texts is one string: pass an iterable of strings, for example [text]")
    stream = _valid_texts(texts)
    first = next(stream, None)
    if first is None:
        raise TokenizerError(
            "there is no text to train a tokenizer on (0 characters): "
            "pass at least one non-empty text"
        )
    return chain([first], stream)


def check_text(text: str, number: int) -> None:
    """Raise TokenizerError if ``text``, the ``number``-th counted from 0, has no UTF-8 form."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        surrogate = ord(text[error.start])
        raise TokenizerError(
            f"text {number} holds the lone surrogate U+{surrogate:04X} at character {error.start}, "
            "which UTF-8 cannot express: read the file with errors='replace'"
        ) from error


def _valid_texts(texts: Iterable[str]) -> Iterator[str]:
    for number, text in enumerate(texts):
        check_text(text, number)
        if text:
            yield text
