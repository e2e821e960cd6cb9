"""The plots: each tells one story beat by beat, every beat in several phrasings.

A plot fixes who, what, where and how many before its first sentence, so whatever comes back later
is what was there before. `a` is whom the story is about, `b` the other one; their pronouns differ.
"""

from __future__ import annotations

from collections.abc import Callable

from i3lm.data.corpora.plots.giving import (
    birthday_gift,
    broken_thing,
    chain_of_swaps,
    found_purse,
    lost_and_found,
    missing_ingredient,
    pocket_treasure,
    sharing,
    wrong_letter,
)
from i3lm.data.corpora.plots.venturing import (
    hide_and_seek,
    missing_duckling,
    moon_in_the_pond,
    new_friend,
    patient_gardener,
    rainy_walk,
    slow_and_fast,
    strange_noise,
    tall_tower,
)
from i3lm.data.corpora.teller import Teller

PLOTS: tuple[Callable[[Teller], None], ...] = (
    lost_and_found,
    sharing,
    birthday_gift,
    broken_thing,
    pocket_treasure,
    missing_ingredient,
    chain_of_swaps,
    wrong_letter,
    found_purse,
    rainy_walk,
    patient_gardener,
    strange_noise,
    slow_and_fast,
    new_friend,
    missing_duckling,
    hide_and_seek,
    tall_tower,
    moon_in_the_pond,
)
