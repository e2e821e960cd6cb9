"""From a Rust tokenizer to the object that transformers works with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def as_pretrained(
    tokenizer: Tokenizer,
    special_tokens: Mapping[str, str],
    *,
    split_special_tokens: bool = False,
) -> PreTrainedTokenizerFast:
    """Wrap ``tokenizer`` so that it saves, loads and pads like any other and decodes exactly.

    Args:
        tokenizer: The tokenizer; it is copied.
        special_tokens: Role to text; roles are ``unk_token``, ``pad_token`` and the like.
        split_special_tokens: Whether the text of a special token is read as plain text.
    """
    # Importing transformers takes a second; a caller who only lists names should not pay it.
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        # A causal model continues the last token of each row, so padding stands on the left.
        padding_side="left",
        # The clean-up would turn "a ." into "a." and break the round trip.
        clean_up_tokenization_spaces=False,
        split_special_tokens=split_special_tokens,
        **special_tokens,
    )
