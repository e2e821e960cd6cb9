"""Corpora that need no network: generated English and the text that Python ships."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import NamedTuple

from i3lm.data.corpora.pydocs import pydocs
from i3lm.data.corpora.stories import stories
from i3lm.errors import DataError


class BuiltIn(NamedTuple):
    """A corpus that comes with the package."""

    load: Callable[[int], Iterator[str]]
    """Takes a seed, gives the documents."""
    default_size: int | None
    """Number of documents unless asked otherwise; None for all there are."""


BUILT_IN: dict[str, BuiltIn] = {
    # The language reference that Python ships, one topic each.
    "pydocs": BuiltIn(lambda seed: pydocs(), None),
    # Generated tiny English stories, dialogues and sentences, without end.
    "stories": BuiltIn(stories, 20_000),
}


def load_corpus(name: str, *, seed: int = 0, size: int | None = None) -> Iterator[str]:
    """The documents of a built-in corpus, one after the other.

    Args:
        name: A key of `BUILT_IN`.
        seed: Which of the generated corpora; a fixed text is the same for every seed.
        size: Number of documents at most; the corpus's own default when None.

    Raises:
        DataError: There is no such corpus, or the size is negative.
    """
    if name not in BUILT_IN:
        allowed = ", ".join(sorted(BUILT_IN))
        raise DataError(
            f"unknown corpus {name!r}; the built-in corpora are {allowed}; "
            "to use text of your own, give the path of a file instead"
        )
    if size is not None and size < 0:
        raise DataError(
            f"size ({size}) must be zero or more documents; leave it out for the default"
        )
    corpus = BUILT_IN[name]
    return islice(corpus.load(seed), corpus.default_size if size is None else size)
