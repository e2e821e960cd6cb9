"""Text as one flat array of token ids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from i3lm.data.chat import Document
from i3lm.data.encoding import batches, encode_batch, separator_ids, token_dtype


@dataclass(frozen=True)
class TokenizedText:
    """Documents as one stream of token ids.

    Attributes:
        tokens: Token ids, shape (N,), uint16 or uint32. The stream begins with the separator,
            so that the first token of the first document is predicted from something too.
        documents: Number of documents.
        bytes: UTF-8 bytes of the documents, without separators: what bits per byte divide by.
        lengths: Tokens of each document with the separator before it, shape (documents,).
    """

    tokens: np.ndarray
    documents: int
    bytes: int
    lengths: np.ndarray

    def begins(self) -> np.ndarray:
        """Where documents begin: True at the first token of their separator, shape (N,), bool."""
        begins = np.zeros(len(self.tokens), dtype=bool)
        begins[np.cumsum(self.lengths)[:-1]] = True
        begins[:1] = True
        return begins


def tokenize_documents(documents: Iterable[Document], tokenizer: Any) -> TokenizedText:
    """Encodes documents into one stream, a separator before the first and after each.

    The stream is encoded a batch at a time and kept as two or four bytes a token.
    """
    pieces: list[np.ndarray] = []
    lengths: list[np.ndarray] = []
    size = 0
    for batch, _ in batches((document, None) for document in documents):
        encoded = encode_batch(batch, tokenizer)
        pieces.append(encoded.tokens)
        lengths.append(encoded.lengths)
        size += int(encoded.bytes.sum())
    pieces.append(np.array(separator_ids(tokenizer), dtype=token_dtype(tokenizer)))
    each = np.concatenate([np.zeros(0, np.uint32), *lengths])
    return TokenizedText(np.concatenate(pieces), len(each), size, each)


def join_texts(texts: Sequence[TokenizedText], tokenizer: Any) -> TokenizedText:
    """Gives several texts, tokenized by one tokenizer, as one."""
    separator = len(separator_ids(tokenizer))  # each text ends with one, and the next begins so
    tokens = [text.tokens[:-separator] for text in texts[:-1]]
    return TokenizedText(
        np.concatenate([*tokens, texts[-1].tokens]),
        sum(text.documents for text in texts),
        sum(text.bytes for text in texts),
        np.concatenate([text.lengths for text in texts]),
    )
