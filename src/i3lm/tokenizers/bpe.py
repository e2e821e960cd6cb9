"""The byte-level BPE tokenizer, as i3-200m and its successors use it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from i3lm.errors import TokenizerError
from i3lm.tokenizers.pretrained import as_pretrained
from i3lm.tokenizers.texts import require_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = {
    "unk_token": "<UNK>",
    "pad_token": "<PAD>",
    "bos_token": "<BOS>",
    "eos_token": "<EOS>",
}
_SMALLEST_VOCABULARY = len(SPECIAL_TOKENS) + 256


def train_bpe_tokenizer(
    texts: Iterable[str], *, vocab_size: int, min_frequency: int = 2
) -> PreTrainedTokenizerFast:
    """Give a byte-level BPE tokenizer trained on a stream of texts.

    Ids 0 to 3 are ``<UNK> <PAD> <BOS> <EOS>``, the next 256 are the bytes, the rest are merges
    (Sennrich et al., arXiv:1508.07909, on bytes as in GPT-2). Because every byte is in the
    vocabulary, any text survives encoding and decoding. Encoding adds no token by itself; a text
    that spells a special token, such as "<EOS>", is read as that token.

    Args:
        texts: Any iterable of strings; read once, a few hundred at a time.
        vocab_size: Number of ids at most. A small text gives fewer: merges run out.
        min_frequency: How often a pair must occur to be merged.

    Raises:
        TokenizerError: ``vocab_size`` cannot hold the bytes, or there is no text.
    """
    if vocab_size < _SMALLEST_VOCABULARY:
        raise TokenizerError(
            f"vocab_size ({vocab_size}) must be at least {_SMALLEST_VOCABULARY} for a byte-level "
            f"BPE tokenizer ({len(SPECIAL_TOKENS)} special tokens and 256 bytes): raise vocab_size "
            "or use the character tokenizer"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(require_texts(texts), trainer)
    return as_pretrained(tokenizer, SPECIAL_TOKENS)
