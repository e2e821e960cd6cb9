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
        bytes: UTF-8 bytes of what is learnt, without separators: what bits per byte divide by.
        lengths: Tokens of each document with the separator before it, shape (documents,).
        learnt: True where a token is to be learnt (of a conversation, what the assistant says),
            shape (N,), bool; None means everywhere.
    """

    tokens: np.ndarray
    documents: int
    bytes: int
    lengths: np.ndarray
    learnt: np.ndarray | None = None

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
    batched = batches((document, None) for document in documents)
    encoded = [encode_batch(batch, tokenizer) for batch, _ in batched]
    separator = np.array(separator_ids(tokenizer), dtype=token_dtype(tokenizer))
    learnt: np.ndarray | None = None
    marks = [part.learnt for part in encoded if part.learnt is not None]
    if marks:  # then all have them: texts and conversations do not mix
        learnt = np.concatenate([*marks, np.zeros(len(separator), dtype=bool)])
    lengths = np.concatenate([np.zeros(0, np.uint32), *(part.lengths for part in encoded)])
    return TokenizedText(
        np.concatenate([*(part.tokens for part in encoded), separator]),
        len(lengths),
        sum(int(part.bytes.sum()) for part in encoded),
        lengths,
        learnt,
    )


def join_texts(texts: Sequence[TokenizedText], tokenizer: Any) -> TokenizedText:
    """Gives several texts, tokenized by one tokenizer, as one."""
    separator = len(separator_ids(tokenizer))  # each text ends with one, and the next begins so
    ends = [len(text.tokens) - separator for text in texts[:-1]] + [len(texts[-1].tokens)]
    learnt = None
    if any(text.learnt is not None for text in texts):
        learnt = np.concatenate([_marks(text)[:end] for text, end in zip(texts, ends, strict=True)])
    return TokenizedText(
        np.concatenate([text.tokens[:end] for text, end in zip(texts, ends, strict=True)]),
        sum(text.documents for text in texts),
        sum(text.bytes for text in texts),
        np.concatenate([text.lengths for text in texts]),
        learnt,
    )


def _marks(text: TokenizedText) -> np.ndarray:
    return np.ones(len(text.tokens), dtype=bool) if text.learnt is None else text.learnt
