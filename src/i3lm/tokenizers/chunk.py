"""The chunk tokenizer of i3-12m, i3-22m and i3-80m, with exactly the original's ids.

The rule, on lower-cased text, at each position:

1. Aim for three characters if they are one of 28 common English trigrams, or the character before
   them is a space, or the character after them is a space; else aim for two.
2. If the vocabulary lacks that chunk, try its beginnings, longest first.
3. If it lacks the single character as well, one character becomes ``<UNK>``.

How far a step goes depends on the text around it and on the vocabulary, never on earlier steps,
so each step is one match of one regular expression: the vocabulary's chunks, written as a trie,
behind the conditions above. The Rust ``tokenizers`` runs it, and ``tokenizer.json`` holds it.

Source of the rule: https://github.com/FlameF0X/open-i3 (Apache-2.0), ``ChunkTokenizer``.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from i3lm.errors import TokenizerError
from i3lm.tokenizers.pieces import (
    ANY_CHARACTER,
    UNKNOWN,
    build_piece_tokenizer,
    lowercase_like_python,
)
from i3lm.tokenizers.texts import require_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# The original's list, as alternatives of an expression; the ids depend on it.
_TRIGRAMS = (
    "all|and|are|but|can|ent|ere|for|hat|hav|her|his|ing|ion|"
    "not|one|our|out|ter|tha|the|thi|tio|was|whe|whi|wit|you"
)
_BESIDE_A_SPACE = rf"(?:(?<= )|(?={ANY_CHARACTER}{{3}} ))"
# More branches than this are halved behind a look-ahead: see _any_branch.
_BRANCHES_IN_A_ROW = 16
# Oniguruma refuses a class of more than 10,000 ranges.
_LARGEST_CLASS = 5_000
_NO_LIMIT = 2**40


def train_chunk_tokenizer(
    texts: Iterable[str], *, max_vocab_size: int | None = None
) -> PreTrainedTokenizerFast:
    """Give the chunk tokenizer whose vocabulary is the chunks that step 1 of the rule cuts.

    ``<UNK>`` is 0, the others follow by falling count, equal counts in code-point order.

    Args:
        texts: Any iterable of strings; read once, as a stream.
        max_vocab_size: Keep this many ids, ``<UNK>`` included; all if None, as the original does.
            The ids that are kept do not change. Text whose chunk was dropped falls back to
            shorter pieces, and single characters are rare in a vocabulary (they occur where a
            text ends), so a small limit turns ordinary text into ``<UNK>``.

    Raises:
        TokenizerError: There is no text, or ``max_vocab_size`` leaves no room for a chunk.
    """
    if max_vocab_size is not None and max_vocab_size < 2:
        raise TokenizerError(
            f"max_vocab_size ({max_vocab_size}) must be at least 2 ({UNKNOWN} and one chunk): "
            "raise it, or leave it out to keep every chunk"
        )
    tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
    tokenizer.normalizer = lowercase_like_python()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_aim_pattern()), behavior="isolated")
    trainer = trainers.WordLevelTrainer(
        vocab_size=max_vocab_size or _NO_LIMIT,
        min_frequency=0,
        special_tokens=[UNKNOWN],
        show_progress=False,
    )
    tokenizer.train_from_iterator(require_texts(texts), trainer)
    return build_chunk_tokenizer(tokenizer.get_vocab())


def build_chunk_tokenizer(vocabulary: Mapping[str, int]) -> PreTrainedTokenizerFast:
    """Give the chunk tokenizer with this vocabulary; its ids are exactly the original's.

    Exact for every text and every vocabulary, the text "<UNK>" included (it is read as five
    characters), up to the Unicode version that lower-casing follows: see
    :func:`i3lm.tokenizers.pieces.lowercase_like_python`. Text with lone surrogates, which a
    Python string can hold and UTF-8 cannot, is refused by the Rust library.

    Args:
        vocabulary: Chunk to id: 0 for ``<UNK>`` and no gaps. Chunks longer than three characters
            or with capital letters keep their id, but no text leads to them.

    Raises:
        TokenizerError: The ids are not 0 to n-1 with ``<UNK>`` at 0, or a chunk is empty.
    """
    _check_vocabulary(vocabulary)
    return build_piece_tokenizer(vocabulary, _vocabulary_pattern(vocabulary), lowercase=True)


def read_original_chunk_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """Give the tokenizer that the original's ``tokenizer.json`` describes.

    Args:
        path: A JSON file with ``chunk_to_idx``, ``idx_to_chunk``, ``vocab_size`` and optionally
            ``unk_token`` and ``unk_idx``.

    Raises:
        TokenizerError: The file cannot be read, or its parts contradict each other.
    """
    path = Path(path)
    content = read_json(path)
    missing = [key for key in ("chunk_to_idx", "idx_to_chunk", "vocab_size") if key not in content]
    if missing:
        raise TokenizerError(
            f"{path} is not a chunk tokenizer of the original: it lacks {', '.join(missing)}; "
            "give the tokenizer.json that was saved with the model"
        )
    problem = _find_contradiction(content)
    if problem:
        raise TokenizerError(f"{path} is damaged: {problem}; copy it again from where it was saved")
    try:
        return build_chunk_tokenizer(content["chunk_to_idx"])
    except TokenizerError as error:
        raise TokenizerError(f"{path} is damaged: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Give the object in a JSON file, or raise TokenizerError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TokenizerError(
            f"the tokenizer file {path} cannot be read ({error.strerror}): check the path"
        ) from error
    except ValueError as error:  # bad JSON or bad UTF-8
        raise TokenizerError(
            f"{path} is damaged: not a JSON file ({error}); copy it again from where it was saved"
        ) from error
    if not isinstance(content, dict):
        raise TokenizerError(
            f"{path} holds a JSON {type(content).__name__}, and a tokenizer file holds an object: "
            "give the tokenizer.json that was saved with the model"
        )
    return content


def _find_contradiction(content: Mapping[str, Any]) -> str | None:
    """Say what is wrong between the parts of the original's file, if anything is."""
    forward, backward = content["chunk_to_idx"], content["idx_to_chunk"]
    if not isinstance(forward, dict) or not isinstance(backward, dict):
        return "chunk_to_idx and idx_to_chunk must be objects"
    if len(forward) != content["vocab_size"]:
        return f"chunk_to_idx has {len(forward)} entries, vocab_size says {content['vocab_size']}"
    if {str(index): chunk for chunk, index in forward.items()} != backward:
        return "idx_to_chunk is not the reverse of chunk_to_idx"
    unknown = content.get("unk_token", UNKNOWN), content.get("unk_idx", 0)
    if unknown != (UNKNOWN, 0):
        return f"unk_token and unk_idx are {unknown}, they must be {(UNKNOWN, 0)}"
    return None


def _check_vocabulary(vocabulary: Mapping[str, int]) -> None:
    if vocabulary.get(UNKNOWN) != 0:
        raise TokenizerError(
            f"the id of {UNKNOWN} is {vocabulary.get(UNKNOWN)}, it must be 0: "
            f"add {UNKNOWN!r} with id 0 to the vocabulary"
        )
    if any(type(index) is not int for index in vocabulary.values()) or set(
        vocabulary.values()
    ) != set(range(len(vocabulary))):
        raise TokenizerError(
            f"the ids of the {len(vocabulary)} chunks must be the integers 0 to "
            f"{len(vocabulary) - 1}, each once: renumber the vocabulary"
        )
    for chunk, index in vocabulary.items():
        if not chunk or not _is_utf8(chunk):
            raise TokenizerError(
                f"the chunk with id {index} is {chunk!r}, it must be non-empty valid Unicode: "
                "remove it and renumber"
            )


def _is_utf8(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _aim_pattern() -> str:
    """Give the expression of step 1 alone: three characters, else two, else the last one."""
    any_two, any_three = ANY_CHARACTER * 2, ANY_CHARACTER * 3
    return f"{_TRIGRAMS}|{_BESIDE_A_SPACE}{any_three}|{any_two}|{ANY_CHARACTER}"


def _vocabulary_pattern(vocabulary: Iterable[str]) -> str:
    """Give the expression of the whole rule: at each position its first match is the step.

    Falling back shifts where the next step begins, so the vocabulary has to be part of the
    expression: cutting first and looking up afterwards gives other ids.
    """
    chunks = set(vocabulary)
    pairs = {chunk for chunk in chunks if len(chunk) == 2}
    triples = {chunk for chunk in chunks if len(chunk) == 3}
    alternatives = sorted(triples & set(_TRIGRAMS.split("|")))
    if triples:
        alternatives.append(_BESIDE_A_SPACE + _any_of(triples))
    if pairs:
        alternatives.append(_any_of(pairs))
    return "|".join([*alternatives, ANY_CHARACTER])


def _any_of(strings: Iterable[str]) -> str:
    """Give an expression for exactly these strings, all of one length of at least 1."""
    tails: dict[str, set[str]] = defaultdict(set)
    for string in strings:
        tails[string[0]].add(string[1:])
    return _any_branch([(head, frozenset(tails[head])) for head in sorted(tails)])


def _any_branch(branches: list[tuple[str, frozenset[str]]]) -> str:
    """Give an expression for each first character, in order, followed by one of its tails.

    Characters with the same tails share a branch, which keeps 10,000 English chunks in 80 kB.
    The engine tries branches one by one, which thousands of Chinese first characters would make
    slow; a look-ahead at the first character halves the choice instead.
    """
    heads: dict[frozenset[str], list[str]] = defaultdict(list)
    for head, tails in branches:
        heads[tails].append(head)
    if len(heads) > _BRANCHES_IN_A_ROW:
        middle = len(branches) // 2
        options = [
            f"(?=[{_escape(half[0][0])}-{_escape(half[-1][0])}]){_any_branch(half)}"
            for half in (branches[:middle], branches[middle:])
        ]
    else:
        options = [
            _any_character(group) + ("" if "" in tails else _any_of(tails))
            for tails, group in heads.items()
        ]
    return _alternation(options)


def _any_character(characters: list[str]) -> str:
    escaped = [_escape(character) for character in characters]
    return _alternation(
        [
            f"[{''.join(escaped[start : start + _LARGEST_CLASS])}]"
            for start in range(0, len(escaped), _LARGEST_CLASS)
        ]
    )


def _alternation(options: list[str]) -> str:
    return options[0] if len(options) == 1 else f"(?:{'|'.join(options)})"


def _escape(character: str) -> str:
    return character if character.isalnum() else rf"\x{{{ord(character):X}}}"
