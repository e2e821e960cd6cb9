"""The character tokenizer: one id per character, as i3-tiny uses it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from i3lm.tokenizers.pieces import (
    ANY_CHARACTER,
    UNKNOWN,
    build_piece_tokenizer,
    lowercase_like_python,
)
from i3lm.tokenizers.texts import require_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def train_character_tokenizer(
    texts: Iterable[str], *, lowercase: bool = False
) -> PreTrainedTokenizerFast:
    """Give the tokenizer with one id for each character (code point) that occurs in ``texts``.

    ``<UNK>`` is 0 and stands for any other character; the rest follow in code-point order, so the
    ids depend on which characters occur and not on the order or number of the texts.

    Args:
        texts: Any iterable of strings; read once, as a stream.
        lowercase: Whether text is lower-cased, here and whenever the tokenizer encodes.

    Raises:
        TokenizerError: The texts hold no character, or one that UTF-8 cannot express.
    """
    normalize = lowercase_like_python().normalize_str if lowercase else str
    characters: set[str] = set()
    for text in require_texts(texts):
        characters.update(normalize(text))
    vocabulary = {piece: index for index, piece in enumerate([UNKNOWN, *sorted(characters)])}
    return build_piece_tokenizer(vocabulary, ANY_CHARACTER, lowercase=lowercase)
