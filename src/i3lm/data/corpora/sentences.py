"""The little lessons: a few plain sentences whose facts, sums and verb forms are always right."""

from __future__ import annotations

from collections.abc import Callable

from i3lm.data.corpora.teller import Teller
from i3lm.data.corpora.words import (
    ANIMALS_BY_SIZE,
    CAUSE_FACTS,
    COLOUR_FACTS,
    DAYS,
    FARM,
    FOODS,
    INDOORS,
    NUMBERS,
    OPPOSITES,
    SEASONS,
    SENSE_FACTS,
    SMALL_THINGS,
    TOOL_FACTS,
    TREASURES,
    VERBS,
    with_article,
)


def colours(t: Teller) -> None:
    """Two things and their colours."""
    (first, colour), (second, other) = t.sample(COLOUR_FACTS, 2)
    t.say(f"{first} is {colour}.", f"What colour is {first}? It is {colour}.")
    t.say(f"{second} is {other} too." if colour == other else f"{second} is {other}.")


def animals(t: Teller) -> None:
    """What one animal says, where it lives and what its young one is called."""
    animal = t.pick(FARM)
    t.say(f"{animal.noun.a} {animal.says}.", f"What does {animal.noun.a} do? It {animal.says}.")
    t.say(
        f"It lives in {with_article(animal.home)}.",
        f"Its home is {with_article(animal.home)}.",
        f"A young {animal.noun} is called {with_article(animal.young)}.",
        f"It has {NUMBERS[animal.legs]} legs and {animal.wears}.",
    )


def more_animals_come(t: Teller) -> None:
    """One or more, then more: the verb and the noun follow the number."""
    animal = t.pick(FARM)
    first, second = t.number(1, 5), t.number(1, 5)
    total = first + second
    came = "comes" if second == 1 else "come"
    t.say(f"{animal.noun.count(first)} {animal.moves[first > 1]}.")
    t.say(f"{NUMBERS[second]} more {came}.")
    t.say(
        f"Now there are {animal.noun.count(total)}.",
        f"Now {animal.noun.count(total)} {animal.moves[1]}.",
    )


def opposites(t: Teller) -> None:
    """Two pairs of opposites."""
    (one, other), (two, another) = t.sample(OPPOSITES, 2)
    t.say(f"The opposite of {one} is {other}.")
    t.say(f"The opposite of {two} is {another}.", f"And the opposite of {two} is {another}.")


def days(t: Teller) -> None:
    """Yesterday, today and tomorrow in the right order."""
    today = t.number(0, 6)
    before, now, after = DAYS[today - 1], DAYS[today], DAYS[(today + 1) % 7]
    t.say(
        f"Today is {now}. Yesterday was {before}, and tomorrow will be {after}.",
        f"{now} comes after {before}. After {now} comes {after}.",
        f"If today is {now}, then tomorrow is {after}.",
        f"The day before {now} is {before}.",
    )


def seasons(t: Teller) -> None:
    """The seasons in order."""
    now = t.number(0, 3)
    t.say(
        f"After {SEASONS[now]} comes {SEASONS[(now + 1) % 4]}.",
        f"{SEASONS[now - 1]} comes before {SEASONS[now]}.",
    )
    t.maybe("A year has four seasons.", "A week has seven days.", "A year has twelve months.")


def sums(t: Teller) -> None:
    """An addition and a subtraction below twenty."""
    x, y = t.number(1, 10), t.number(1, 10)
    t.say(f"{NUMBERS[x]} and {NUMBERS[y]} make {NUMBERS[x + y]}.")
    total = t.number(2, 12)
    part = t.number(1, total - 1)
    t.maybe(f"{NUMBERS[total]} take away {NUMBERS[part]} leaves {NUMBERS[total - part]}.")


def one_more(t: Teller) -> None:
    """Somebody has some, gets or loses some, and has the right number."""
    who, _ = t.pair()
    food = t.pick(FOODS + SMALL_THINGS)
    x, y = t.number(2, 8), t.number(1, 5)
    t.say(f"{who} has {food.count(x)}.")
    if t.chance(0.5) or y >= x:
        t.say(
            f"{who.He} {who.verb('gets', 'get')} {NUMBERS[y]} more.",
            f"Then {who.he} {who.verb('finds', 'find')} {NUMBERS[y]} more.",
        )
        t.say(f"Now {who.he_has} {food.count(x + y)}.")
    else:
        t.say(
            f"{who.He} {who.verb('gives', 'give')} away {NUMBERS[y]}.",
            f"Then {who.he} {who.verb('loses', 'lose')} {NUMBERS[y]}.",
        )
        t.say(f"Now {who.he_has} {food.count(x - y)}.")


def three_tenses(t: Teller) -> None:
    """One verb in the past, the present and the future."""
    who, _ = t.pair()
    verb = t.pick(VERBS)
    past, present, future = t.sample(verb.rest, 3)
    t.say(f"Yesterday {who} {verb.past} {past}.")
    t.say(f"Today {who.he} {who.verb(verb.third, verb.base)} {present}.")
    t.say(f"Tomorrow {who.he} will {verb.base} {future}.")


def who_has_what(t: Teller) -> None:
    """Two swap, and each has what the other had."""
    a, b = t.pair()
    x, y = (t.described([noun]) for noun in t.sample(TREASURES + SMALL_THINGS, 2))
    t.say(f"{a} has {x.a}, and {b} has {y.a}.", f"{a} has {x.a}. {b} has {y.a}.")
    t.say(f"{a} gives {b} {x.the}, and {b} gives {a} {y.the}.", "They swap.")
    t.say(f"Now {a} has {y.the}, and {b} has {x.the}.")


def where_it_is(t: Teller) -> None:
    """A thing inside another is where the other is."""
    thing, box = t.described(SMALL_THINGS), t.pick(("box", "bag", "basket", "jar", "cup", "pot"))
    spot = t.pick([spot for spot in INDOORS if "basket" not in spot and "drawer" not in spot])
    t.say(f"The {thing} is in the {box}.")
    t.say(f"The {box} is {spot}.")
    t.say(f"So the {thing} is {spot} too.", f"Where is the {thing}? It is in the {box} {spot}.")


def comparing(t: Teller) -> None:
    """Three people or animals in order."""
    a, b = t.pair()
    c = a
    while c.name in (a.name, b.name):
        c, _ = t.pair()
    more, most = t.pick(
        (
            ("taller", "tallest"),
            ("older", "oldest"),
            ("faster", "fastest"),
            ("stronger", "strongest"),
        )
    )
    t.say(f"{a} is {more} than {b}.")
    t.say(f"{b} is {more} than {c}.")
    t.say(f"So {a} is {more} than {c}.", f"So {a} is the {most} of the three.")


def sizes(t: Teller) -> None:
    """Which animal is bigger."""
    low = t.number(0, len(ANIMALS_BY_SIZE) - 2)
    small = ANIMALS_BY_SIZE[low]
    big = ANIMALS_BY_SIZE[t.number(low + 1, len(ANIMALS_BY_SIZE) - 1)]
    t.say(
        f"{big.a} is bigger than {small.a}.",
        f"{small.a} is smaller than {big.a}.",
        f"Which is bigger, {small.a} or {big.a}? {big.the.capitalize()} is bigger.",
    )


def tools(t: Teller) -> None:
    """What a tool or a part of the body is for."""
    task, tool = t.pick(TOOL_FACTS)
    t.say(f"We {task} with {tool}.", f"To {task}, we need {tool}.")
    if t.chance(0.6):
        (do, part), (also, other) = t.sample(SENSE_FACTS, 2)
        t.say(f"We {do} with our {part} and {also} with our {other}.")


def causes(t: Teller) -> None:
    """What follows from what."""
    (cause, effect), (other, result) = t.sample(CAUSE_FACTS, 2)
    t.say(f"When {cause}, {effect}.", f"If {cause}, {effect}.")
    t.maybe(f"When {other}, {result}.", f"If {other}, {result}.")


def by_oneself(t: Teller) -> None:
    """The reflexive that belongs to the person."""
    a, b = t.pair()
    do, did = t.pick(
        (
            ("wash", "washed"),
            ("dress", "dressed"),
            ("teach", "taught"),
            ("feed", "fed"),
            ("dry", "dried"),
        )
    )
    extra = " to swim" if do == "teach" else ""
    t.say(
        f"{a} {did} {a.himself}{extra}.",
        f"Nobody had to {do} {a}{extra}. {a.He} {did} {a.himself}{extra}.",
    )
    t.say(f"{b} {did} {b.himself}{extra} too.", f"Then {b} {did} {b.himself}{extra}.")


LESSONS: tuple[Callable[[Teller], None], ...] = (
    colours,
    animals,
    more_animals_come,
    opposites,
    days,
    seasons,
    sums,
    one_more,
    three_tenses,
    who_has_what,
    where_it_is,
    comparing,
    sizes,
    tools,
    causes,
    by_oneself,
)


def little_lesson(t: Teller) -> None:
    """Different lessons in a row, three to eight sentences together."""
    enough = t.pick((3, 4, 5, 5))
    for lesson in t.sample(LESSONS, 4):
        lesson(t)
        # No lesson has more than four sentences or fewer than one.
        if sum(t.text(" ").count(mark) for mark in ".?!") >= enough:
            return
