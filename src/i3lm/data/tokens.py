"""Text as one flat array of token ids, and its cut into rows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from i3lm.data.encoding import batches, encode_batch, separator_ids, token_dtype
from i3lm.errors import DataError


@dataclass(frozen=True)
class TokenizedText:
    """Documents as one stream of token ids.

    Attributes:
        tokens: Token ids, shape (N,), uint16 or uint32. The stream begins with the separator,
            so that the first token of the first document is predicted from something too.
        documents: Number of documents.
        bytes: UTF-8 bytes of the documents, without separators: what bits per byte divide by.
    """

    tokens: np.ndarray
    documents: int
    bytes: int


def tokenize_documents(documents: Iterable[str], tokenizer: Any) -> TokenizedText:
    """Encodes documents into one stream, a separator before the first and after each.

    The stream is encoded a batch at a time and kept as two or four bytes a token.
    """
    pieces, count, size = [], 0, 0
    for batch, _ in batches((document, None) for document in documents):
        encoded = encode_batch(batch, tokenizer)
        pieces.append(encoded.tokens)
        count += len(batch)
        size += int(encoded.bytes.sum())
    pieces.append(np.array(separator_ids(tokenizer), dtype=token_dtype(tokenizer)))
    return TokenizedText(np.concatenate(pieces), count, size)


class ContiguousRows(Dataset):
    """The stream cut into rows of `context_length` tokens, each with the token that follows it.

    Row i is a function of i alone, so a seeded order of indices is a seeded order of batches.

    Args:
        text: The stream.
        context_length: Tokens T per row.

    Raises:
        DataError: The stream is shorter than one row.
    """

    def __init__(self, text: TokenizedText, context_length: int) -> None:
        if len(text.tokens) < context_length + 1:
            raise DataError(
                f"the text has {len(text.tokens):,} tokens, and one row needs "
                f"{context_length + 1:,} (the context length and one more): give more text or a "
                "smaller context_length"
            )
        self.tokens, self.context_length = text.tokens, context_length

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.context_length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Gives ``input_ids`` and ``labels``, both (T,); labels are the ids one step ahead."""
        start = index * self.context_length
        row = torch.from_numpy(
            self.tokens[start : start + self.context_length + 1].astype(np.int64)
        )
        return {"input_ids": row[:-1], "labels": row[1:]}
