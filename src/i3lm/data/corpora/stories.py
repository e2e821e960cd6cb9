"""Tiny English stories, dialogues and sentences from a seeded generator.

Written so that a small model has something to learn within minutes: who did what to whom, pronouns
and verbs that agree, counts that add up, things that return, questions and their answers. Every
document is a pure function of (seed, index), on every machine and Python version.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count as count_up
from typing import NamedTuple

from i3lm.data.corpora.dialogues import DIALOGUES
from i3lm.data.corpora.plots import PLOTS
from i3lm.data.corpora.sentences import little_lesson
from i3lm.data.corpora.teller import Teller


class Document(NamedTuple):
    """One text and what sort of text it is."""

    kind: str
    """"story", "dialogue" or "sentences"."""
    text: str


def document(seed: int, index: int) -> Document:
    """The document at a position of the endless corpus that belongs to the seed."""
    teller = Teller(seed, index)
    lot = teller.number(1, 100)
    if lot <= 60:
        teller.pick(PLOTS)(teller)
        return Document("story", teller.text("\n\n"))
    if lot <= 85:
        teller.pick(DIALOGUES)(teller)
        return Document("dialogue", teller.text("\n"))
    little_lesson(teller)
    return Document("sentences", teller.text(" "))


def story(seed: int, index: int) -> str:
    """The text of the document at a position; independent of all the others."""
    return document(seed, index).text


def stories(seed: int = 0, count: int | None = None) -> Iterator[str]:
    """The documents of a seed from the first on; without end when count is None."""
    for index in count_up() if count is None else range(count):
        yield story(seed, index)
