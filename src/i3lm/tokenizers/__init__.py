"""The family's tokenizers: characters, chunks of two or three, byte-level BPE.

All of them are stock ``PreTrainedTokenizerFast`` objects whose whole behaviour is in one
``tokenizer.json``, so that any program that can read such a file can use them.
"""

from __future__ import annotations

from i3lm.tokenizers.bpe import train_bpe_tokenizer
from i3lm.tokenizers.character import train_character_tokenizer
from i3lm.tokenizers.chat_template import ensure_chat_template, render_chat, write_question
from i3lm.tokenizers.chunk import (
    build_chunk_tokenizer,
    read_original_chunk_tokenizer,
    train_chunk_tokenizer,
)
from i3lm.tokenizers.loading import (
    TOKENIZER_KINDS,
    encode_documents,
    load_tokenizer,
    lowercases,
    tokenizer_fingerprint,
    train_tokenizer,
)

__all__ = [
    "TOKENIZER_KINDS",
    "build_chunk_tokenizer",
    "encode_documents",
    "ensure_chat_template",
    "load_tokenizer",
    "lowercases",
    "read_original_chunk_tokenizer",
    "render_chat",
    "tokenizer_fingerprint",
    "train_bpe_tokenizer",
    "train_character_tokenizer",
    "train_chunk_tokenizer",
    "train_tokenizer",
    "write_question",
]
