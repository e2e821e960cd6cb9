"""Tokenizers that are a regular expression, which cuts the text, and a table of the pieces.

The character and the chunk tokenizer are both of this kind. Nothing here is specific to Python:
the expression and the table live in ``tokenizer.json`` and run in the Rust ``tokenizers``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from i3lm.tokenizers.pretrained import as_pretrained

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

UNKNOWN = "<UNK>"
ANY_CHARACTER = r"[\s\S]"  # "." leaves out the newline

_CASED = r"[\p{Cased}&&[^\p{Case_Ignorable}]]"
_IGNORABLE = r"(?>\p{Case_Ignorable}*)"
# \K drops what stands before the sigma from the match. A look-behind of open length would say the
# same, but each time it fails it walks back to the start of the text.
_FINAL_SIGMA = rf"{_CASED}{_IGNORABLE}\K\x{{03A3}}(?!{_IGNORABLE}{_CASED})"


def lowercase_like_python() -> normalizers.Normalizer:
    """Give the normaliser that lower-cases exactly as ``str.lower`` does.

    Rust's Lowercase looks at one character at a time. The only rule of Unicode's default
    lower-casing that looks around is Final_Sigma (The Unicode Standard, section 3.13, table 3-17):
    a capital sigma becomes "ς" after a cased letter and not before one, with case-ignorable
    characters (apostrophes, accents) skipped on both sides, and "σ" elsewhere.

    Both sides follow the Unicode version that they were built with, and so does ``str.lower``:
    characters younger than the running Python's Unicode may be lower-cased here and not there.
    """
    return normalizers.Sequence(
        [normalizers.Replace(Regex(_FINAL_SIGMA), "ς"), normalizers.Lowercase()]
    )


def build_piece_tokenizer(
    vocabulary: Mapping[str, int], pattern: str, *, lowercase: bool
) -> PreTrainedTokenizerFast:
    """Give the tokenizer that cuts text by ``pattern`` and looks each piece up.

    Args:
        vocabulary: Piece to id; ``<UNK>`` stands for every piece that is not listed.
        pattern: An Oniguruma expression whose matches cover any text without a gap.
        lowercase: Whether text is lower-cased first, as ``str.lower`` does.
    """
    tokenizer = Tokenizer(models.WordLevel(dict(vocabulary), unk_token=UNKNOWN))
    if lowercase:
        tokenizer.normalizer = lowercase_like_python()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    # Without a decoder, decoding would put a space between pieces.
    tokenizer.decoder = decoders.Fuse()
    # The five characters "<UNK>" in a text are five characters, not the unknown piece.
    return as_pretrained(tokenizer, {"unk_token": UNKNOWN}, split_special_tokens=True)
