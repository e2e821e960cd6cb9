"""The voice that tells one document: seeded choices, and the paragraphs so far."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

from i3lm.data.corpora.words import (
    ANIMAL_FRIENDS,
    CHILDREN,
    COLOURS,
    HELPERS,
    HOMES,
    LOOKS,
    TIMES,
    TRAITS,
    Noun,
    Person,
)

T = TypeVar("T")

_TAGS = {"?": ("asked",), "!": ("said", "called", "cried"), ".": ("said",)}
_REPLY_TAGS = ("said", "said", "answered", "replied")


class Teller:
    """Everything that one document needs while it is being told.

    Only ``random.random()`` is drawn from: Python promises its sequence for a given seed, but not
    that of ``choice`` or ``shuffle``.
    """

    def __init__(self, seed: int, index: int) -> None:
        self._random = random.Random(f"i3lm-stories-{seed}-{index}").random
        self._paragraphs: list[list[str]] = [[]]
        self._heard: list[str] = []
        self._after_question = False
        # A pronoun may stand for a speaker only while it can mean one person.
        self._pronouns_are_clear = True

    def pick(self, options: Sequence[T]) -> T:
        """One of the options, all equally likely."""
        return options[int(self._random() * len(options))]

    def chance(self, probability: float) -> bool:
        """True with the given probability."""
        return self._random() < probability

    def number(self, low: int, high: int) -> int:
        """A whole number from low to high, both included."""
        return low + int(self._random() * (high - low + 1))

    def sample(self, options: Sequence[T], count: int) -> list[T]:
        """Different options, in random order."""
        remaining = list(options)
        return [remaining.pop(int(self._random() * len(remaining))) for _ in range(count)]

    def described(self, nouns: Sequence[Noun]) -> Noun:
        """One of the nouns with a colour or a look: "red kite"."""
        adjective = self.pick(COLOURS) if self.chance(0.7) else self.pick(LOOKS)
        return self.pick(nouns).described(adjective)

    def pair(self) -> tuple[Person, Person]:
        """Two people of one world whose pronouns differ, so that "he" or "she" says which one."""
        world = CHILDREN if self.chance(0.65) else ANIMAL_FRIENDS
        first = second = self.pick(world)
        while second.he == first.he:
            second = self.pick(world)
        return first, second

    def trio(self) -> tuple[Person, Person, Person]:
        """Two people as in `pair` and a third of the same world."""
        first, second = self.pair()
        world = ANIMAL_FRIENDS if first in ANIMAL_FRIENDS else CHILDREN
        third = first
        while third in (first, second):
            third = self.pick(world)
        self._pronouns_are_clear = False
        return first, second, third

    def helper(self, known_by_trade: Sequence[Person] = HELPERS) -> Person:
        """A grown-up known by trade, such as "the baker"."""
        self._pronouns_are_clear = False
        return self.pick(known_by_trade)

    def say(self, *phrasings: str) -> None:
        """Adds one of the phrasings, beginning with a capital letter."""
        chosen = self.pick(phrasings)
        self._paragraphs[-1].append(chosen[0].upper() + chosen[1:])
        self._after_question = False

    def maybe(self, *phrasings: str) -> None:
        """Adds one of the phrasings every other time."""
        if self._random() < 0.5:
            self.say(*phrasings)

    def speak(self, who: Person, *phrasings: str) -> None:
        """Adds one of the phrasings between quotation marks and says who spoke."""
        text = self.pick(phrasings)
        tag = self.pick(
            _REPLY_TAGS if self._after_question and text[-1] == "." else _TAGS[text[-1]]
        )
        known = who.name in self._heard and self._pronouns_are_clear
        self._heard.append(who.name)
        by_pronoun = known and self.chance(0.35)
        quoted = f"{text[:-1]}," if text[-1] == "." else text
        # "Ada asked" should not stand before a statement that a question follows.
        mixed = text[-1] == "?" and (". " in text or "! " in text)
        if self.chance(0.25) and not mixed:
            self.say(f'{who.he if by_pronoun else who} {tag}, "{text}"')
        else:
            self.say(f'"{quoted}" {who.he} {tag}.' if by_pronoun else f'"{quoted}" {tag} {who}.')
        self._after_question = text[-1] == "?"

    def reply(self, who: Person, *phrasings: str) -> None:
        """Adds a turn of a dialogue on its own line; who spoke is often clear without a word."""
        self.paragraph()
        if who.name in self._heard and self.chance(0.3):
            text = self.pick(phrasings)
            self.say(f'"{text}"')
            self._after_question = text[-1] == "?"
        else:
            self.speak(who, *phrasings)

    def paragraph(self) -> None:
        """Begins a new paragraph."""
        if self._paragraphs[-1]:
            self._paragraphs.append([])

    def text(self, separator: str) -> str:
        """The document, its paragraphs joined by the separator."""
        return separator.join(" ".join(sentences) for sentences in self._paragraphs if sentences)

    def time(self) -> str:
        """When it happened: "one windy day"."""
        return self.pick(TIMES)

    def open(self, who: Person) -> None:
        """Introduces the person whom the story is about."""
        home, trait = self.pick(HOMES), self.pick(TRAITS)
        self.say(
            f"Once there was {who.intro} who {trait}.",
            f"{who} was {who.intro.partition(' named ')[0]} who {trait}.",
            f"{who.full} lived {home}.",
            f"{home}, there lived {who.intro}.",
            f"{who.intro} lived {home} and {trait}.",
            f"Long ago, {who.intro} lived {home}.",
            f"This is a story about {who.intro} who {trait}.",
            f"There once was {who.intro} who lived {home}.",
        )
