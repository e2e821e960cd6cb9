"""Find, train and compare tokenizers, whatever their kind."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from i3lm.errors import TokenizerError
from i3lm.tokenizers.bpe import train_bpe_tokenizer
from i3lm.tokenizers.character import train_character_tokenizer
from i3lm.tokenizers.chunk import read_json, read_original_chunk_tokenizer, train_chunk_tokenizer
from i3lm.tokenizers.pretrained import as_pretrained
from i3lm.tokenizers.texts import check_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
# What the original wrote over time, newest first.
_BARE_FILES = ("tokenizer.json", "vocab.json", "tokenizer_bert.json", "chunk_vocab_combined.json")
_ROLES = ("unk", "pad", "bos", "eos", "cls", "sep", "mask")
_DEFAULT_BPE_SIZE = 32_000  # i3-200m and its successors


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Give the tokenizer found at a path, or on the Hugging Face Hub under a name.

    Args:
        path: One of: a folder that ``save_pretrained`` wrote; a chunk tokenizer of the original,
            as a file or the folder it lies in; a ``tokenizer.json`` of the ``tokenizers`` library
            without its ``tokenizer_config.json``, likewise (a byte-level one of the original
            drops, without a word, the bytes that its training text lacked); a name such as
            ``gpt2`` or ``owner/name``, if no such path exists.

    Raises:
        TokenizerError: Nothing is there, it is damaged, or the Hub cannot be reached.
    """
    place = Path(path)
    if place.is_dir():
        return _load_folder(place)
    if place.exists():
        # The configuration beside the file says more than the file alone.
        if place.name == "tokenizer.json" and (place.parent / "tokenizer_config.json").exists():
            return _load_folder(place.parent)
        return _load_file(place)
    if _HUB_NAME.fullmatch(str(path)):
        return _load_auto(str(path), local_files_only=False)
    raise TokenizerError(
        f"there is no tokenizer at {path}: "
        "give a folder, a tokenizer.json or a Hub name (owner/name)"
    )


def train_tokenizer(
    kind: str, texts: Iterable[str], *, vocab_size: int | None = None
) -> PreTrainedTokenizerBase:
    """Give a tokenizer of the named kind, trained on a stream of texts.

    Args:
        kind: ``bpe``, ``chunk`` or ``character``.
        texts: Any iterable of strings; read once, as a stream.
        vocab_size: Number of ids at most. If None: 32,000 for ``bpe``, no limit for ``chunk``.
            ``character`` takes none: leaving characters out is not a choice to make by number.

    Raises:
        TokenizerError: The kind is unknown, the size does not fit it, or there is no text.
    """
    if kind not in _TRAINERS:
        raise TokenizerError(
            f"tokenizer kind {kind!r} is unknown: choose one of {', '.join(_TRAINERS)}, "
            "or load a saved tokenizer by its path"
        )
    return _TRAINERS[kind](texts, vocab_size)


def encode_documents(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Give the ids of each text, with nothing added, cut or padded, however long it is.

    Raises:
        TokenizerError: A text holds a lone surrogate.
    """
    if not tokenizer.is_fast:
        return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    backend: Tokenizer = tokenizer.backend_tokenizer
    # What an ordinary call of the tokenizer sets before it encodes.
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    try:
        # encode_batch_fast skips the offsets, a third of the time.
        encodings = backend.encode_batch_fast(list(texts), add_special_tokens=False)
    except TypeError:
        for number, text in enumerate(texts):
            check_text(text, number)
        raise
    return [encoding.ids for encoding in encodings]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Give a hex digest that two tokenizers share if they give the same ids to the same text.

    It is the SHA-256 of what defines the behaviour: the tokenizer's own JSON, the special tokens,
    and whether their text is split. Truncation and padding are left out (each call sets them), and
    so are fields that are null or false, as newer versions of the library add them for new options.
    """
    behaviour = {
        "tokenizer": _describe(tokenizer),
        "special_tokens": {role: str(token) for role, token in _special_tokens(tokenizer).items()},
        "split_special_tokens": tokenizer.split_special_tokens,
    }
    text = json.dumps(_without_unset(behaviour), sort_keys=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def lowercases(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Say whether the tokenizer lower-cases text, so that capitals cannot come back."""
    if not tokenizer.is_fast:
        return bool(getattr(tokenizer, "do_lower_case", False))
    normalizer = tokenizer.backend_tokenizer.normalizer
    return normalizer is not None and normalizer.normalize_str("A") == "a"


def _train_bpe(texts: Iterable[str], vocab_size: int | None) -> PreTrainedTokenizerFast:
    size = _DEFAULT_BPE_SIZE if vocab_size is None else vocab_size
    return train_bpe_tokenizer(texts, vocab_size=size)


def _train_chunk(texts: Iterable[str], vocab_size: int | None) -> PreTrainedTokenizerFast:
    return train_chunk_tokenizer(texts, max_vocab_size=vocab_size)


def _train_character(texts: Iterable[str], vocab_size: int | None) -> PreTrainedTokenizerFast:
    if vocab_size is not None:
        raise TokenizerError(
            f"vocab_size ({vocab_size}) does not apply to the character tokenizer, "
            "which has one id per character of its text: leave vocab_size out"
        )
    return train_character_tokenizer(texts)


_TRAINERS: dict[str, Callable[[Iterable[str], int | None], PreTrainedTokenizerFast]] = {
    "bpe": _train_bpe,
    "chunk": _train_chunk,
    "character": _train_character,
}
TOKENIZER_KINDS = tuple(_TRAINERS)


def _load_folder(folder: Path) -> PreTrainedTokenizerBase:
    if (folder / "tokenizer_config.json").exists():
        return _load_auto(str(folder), local_files_only=True)
    for name in _BARE_FILES:
        if (folder / name).exists():
            return _load_file(folder / name)
    raise TokenizerError(
        f"the folder {folder} holds no tokenizer: "
        f"it needs tokenizer_config.json and tokenizer.json, or one of {', '.join(_BARE_FILES)}"
    )


def _load_file(path: Path) -> PreTrainedTokenizerFast:
    content = read_json(path)
    if "chunk_to_idx" in content:
        return read_original_chunk_tokenizer(path)
    try:
        tokenizer = Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # the Rust library raises bare Exception
        raise TokenizerError(
            f"{path} is not a tokenizer that can be read ({_one_line(error)}): "
            "give a tokenizer.json of the tokenizers library or of the original"
        ) from error
    return as_pretrained(tokenizer, _recognise_special_tokens(tokenizer))


def _recognise_special_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """Give the roles of special tokens spelled ``<EOS>``, ``[EOS]`` or ``<eos>``, for every role.

    A tokenizer.json lists its special tokens without saying what they are for.
    """
    added = tokenizer.get_added_tokens_decoder().values()
    special = {token.content for token in added if token.special}
    return {
        f"{role}_token": spelling
        for role in _ROLES
        for spelling in (f"<{role}>", f"[{role.upper()}]", f"<{role.upper()}>")
        if spelling in special
    }


def _load_auto(name: str, *, local_files_only: bool) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            name, local_files_only=local_files_only, trust_remote_code=False
        )
    except Exception as error:  # OSError, ValueError, ImportError, and Rust's bare Exception
        where = (
            "the files may be damaged"
            if local_files_only
            else "no such path exists here, and the Hub has no such tokenizer or cannot be reached"
        )
        raise TokenizerError(
            f"the tokenizer {name!r} cannot be loaded ({_one_line(error)}): {where}; "
            "check the name, or give the path of a saved tokenizer"
        ) from error


def _one_line(error: Exception) -> str:
    """Give the first line of an error's message, or its type if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(" .:") if lines else type(error).__name__


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return {
        f"{role}_token": token
        for role in _ROLES
        if (token := getattr(tokenizer, f"{role}_token", None)) is not None
    }


def _describe(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Give everything that decides which ids a text gets, as JSON values."""
    if not tokenizer.is_fast:
        return {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    return description | {"truncation": None, "padding": None}


def _without_unset(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_unset(item) for item in value]
    if isinstance(value, dict):
        return {
            key: _without_unset(item)
            for key, item in value.items()
            if item is not None and item is not False
        }
    return value
