"""The people, things, places and facts that the stories are made of.

Agreement is settled here, once: a person carries their pronouns and a noun its plural and article,
so that a plot cannot get them wrong.
"""

from __future__ import annotations

from dataclasses import dataclass, field


def with_article(phrase: str) -> str:
    """The phrase behind "a" or "an", whichever its first sound asks for."""
    sounds_like_consonant = phrase.startswith(("one", "uni", "use"))
    vowel = phrase[0] in "aeiou" and not sounds_like_consonant
    return f"an {phrase}" if vowel or phrase.startswith("hour") else f"a {phrase}"


# subject, object, possessive, reflexive, and the verbs that follow the subject
_PRONOUNS = {
    "he": ("he", "him", "his", "himself", "was", "is", "has"),
    "she": ("she", "her", "her", "herself", "was", "is", "has"),
    "they": ("they", "them", "their", "themselves", "were", "are", "have"),
}


@dataclass(slots=True)
class Person:
    """Somebody in a story: a name, what they are, and every pronoun form a sentence can need.

    The forms are filled in once, because a story reads them dozens of times.
    """

    name: str
    he: str
    kind: str
    """What they are: "girl", "squirrel"; for a helper such as "the baker", the same noun."""

    him: str = field(init=False)
    his: str = field(init=False)
    himself: str = field(init=False)
    he_was: str = field(init=False)
    he_is: str = field(init=False)
    he_has: str = field(init=False)
    He: str = field(init=False)
    His: str = field(init=False)
    He_was: str = field(init=False)
    He_has: str = field(init=False)
    full: str = field(init=False)
    """Name for a first mention: "Mina", but "Hazel the squirrel"."""
    intro: str = field(init=False)
    """Somebody not yet known to the reader: "a girl named Mina"."""

    def __post_init__(self) -> None:
        _, self.him, self.his, self.himself, was, present, has = _PRONOUNS[self.he]
        self.he_was, self.he_is = f"{self.he} {was}", f"{self.he} {present}"
        self.he_has = f"{self.he} {has}"
        self.He, self.His = self.he.capitalize(), self.his.capitalize()
        self.He_was, self.He_has = f"{self.He} {was}", f"{self.He} {has}"
        human = self.kind in ("girl", "boy", "child")
        self.full = self.name if human else f"{self.name} the {self.kind}"
        self.intro = f"{with_article(self.kind)} named {self.name}"

    def __str__(self) -> str:
        return self.name

    def verb(self, singular: str, plural: str) -> str:
        """The present-tense form that follows this person's pronoun."""
        return plural if self.he == "they" else singular


@dataclass(slots=True)
class Noun:
    """A thing that can be counted, named first ("a red kite") and named again ("the kite")."""

    one: str
    many: str
    short: str = ""
    """The bare noun when `one` carries an adjective."""

    a: str = field(init=False)
    the: str = field(init=False)

    def __post_init__(self) -> None:
        self.short = self.short or self.one
        self.a = with_article(self.one)
        self.the = f"the {self.short}"

    def __str__(self) -> str:
        return self.one

    def count(self, number: int) -> str:
        """The number in words and the noun in its number: "one plum", "three plums"."""
        return f"{NUMBERS[number]} {self.one if number == 1 else self.many}"

    def described(self, adjective: str) -> Noun:
        """The same noun with an adjective in front."""
        return Noun(f"{adjective} {self.one}", f"{adjective} {self.many}", self.short)


@dataclass(slots=True)
class Place:
    """A place, where one is at it ("by the river") and how one goes there ("to the river")."""

    the: str
    at: str
    to: str


@dataclass(slots=True)
class Animal:
    """An animal and what is always true of it."""

    noun: Noun
    says: str
    """The sound as a verb in the third person: "quacks"."""
    home: str
    young: str
    legs: int
    wears: str
    moves: tuple[str, str]
    """What one does and what two do: ("swims", "swim")."""


@dataclass(slots=True)
class Verb:
    """A verb in the three tenses that the sentences practise, with what may follow it."""

    base: str
    third: str
    past: str
    rest: tuple[str, ...]


# fmt: off
NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
    "nineteen", "twenty",
)
# fmt: on
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
SEASONS = ("spring", "summer", "autumn", "winter")


def counted_to(number: int) -> str:
    """The numbers from one on, as somebody counts aloud: "one, two, three"."""
    return ", ".join(NUMBERS[1 : number + 1])


def was(number: int) -> str:
    """The past of "to be" that agrees with the number."""
    return "was" if number == 1 else "were"


def _children(he: str, kind: str, names: str) -> list[Person]:
    return [Person(name, he, kind) for name in names.split()]


CHILDREN = (
    _children("she", "girl", "Mina Ada Ruby Nora Lena Zoe Priya Amara Freya Sana Clara Elsie Juno")
    + _children("he", "boy", "Otto Ben Sam Theo Omar Hugo Felix Leo Kofi Ravi Milo Jonah Emil")
    + _children("they", "child", "Robin Remy Quinn Charlie")
)

ANIMAL_FRIENDS = [
    Person("Hazel", "she", "squirrel"),
    Person("Olive", "she", "owl"),
    Person("Tilda", "she", "turtle"),
    Person("Rosie", "she", "rabbit"),
    Person("Nell", "she", "otter"),
    Person("Fern", "she", "fox"),
    Person("Dot", "she", "hen"),
    Person("Bruno", "he", "bear"),
    Person("Hector", "he", "hedgehog"),
    Person("Barnaby", "he", "badger"),
    Person("Monty", "he", "mole"),
    Person("Wilf", "he", "wolf"),
    Person("Toby", "he", "toad"),
    Person("Oscar", "he", "goose"),
    Person("Pip", "they", "mouse"),
    Person("Pepper", "they", "cat"),
]

PEOPLE = CHILDREN + ANIMAL_FRIENDS

HELPERS = [
    Person("the baker", "he", "baker"),
    Person("the farmer", "she", "farmer"),
    Person("the old sailor", "he", "sailor"),
    Person("the gardener", "she", "gardener"),
    Person("the miller", "he", "miller"),
    Person("the clock maker", "she", "clock maker"),
    Person("the shepherd", "he", "shepherd"),
    Person("the weaver", "she", "weaver"),
]


TEACHER = Person("the teacher", "she", "teacher")
WAITER = Person("the waiter", "he", "waiter")


def _nouns(words: str) -> list[Noun]:
    """Nouns from "one/many" pairs; a bare word adds "s"."""
    pairs = (word.partition("/") for word in words.split())
    return [Noun(one, many or f"{one}s") for one, _, many in pairs]


TREASURES = _nouns(
    "kite ball drum bell whistle hat scarf/scarves lantern cup book map umbrella ribbon feather "
    "blanket flute puppet basket cap mug picture box/boxes bag"
)
BREAKABLES = _nouns("kite drum whistle lantern cup flute puppet basket mug umbrella clock lamp jug")
SMALL_THINGS = _nouns("marble button key shell coin stone bead ring acorn pencil spoon thimble")
FOODS = _nouns(
    "apple pear plum cherry/cherries bun biscuit pancake muffin walnut berry/berries carrot peach/"
    "peaches tart dumpling orange fig cookie strawberry/strawberries"
)
BLOOMS = _nouns("rose tulip sunflower daisy/daisies lily/lilies poppy/poppies violet")
CROPS = _nouns("pumpkin tomato/tomatoes bean carrot melon turnip cucumber onion")

# fmt: off
COLOURS = (
    "red", "blue", "green", "yellow", "orange", "purple", "brown", "white", "black", "grey",
    "pink", "silver",
)
# fmt: on
# fmt: off
LOOKS = (
    "small", "old", "tiny", "striped", "new", "little", "pretty", "round", "funny", "big",
)
# fmt: on

INDOORS = (
    "under the bed",
    "behind the door",
    "in the basket",
    "on the top shelf",
    "under the rug",
    "behind the curtain",
    "beneath the stairs",
    "in the bottom drawer",
    "next to the stove",
    "on top of the cupboard",
    "under the table",
    "behind the clock",
)
OUTDOORS = (
    "under the apple tree",
    "behind the shed",
    "next to the well",
    "under a pile of leaves",
    "behind the stone wall",
    "in the tall grass",
    "beside the gate",
    "under the bridge",
    "inside the hollow log",
    "behind the barn",
    "near the rose bush",
    "under the old cart",
)
PLACES = (
    Place("the river", "by the river", "to the river"),
    Place("the pond", "at the pond", "to the pond"),
    Place("the garden", "in the garden", "to the garden"),
    Place("the market", "at the market", "to the market"),
    Place("the hill", "on the hill", "up the hill"),
    Place("the beach", "on the beach", "to the beach"),
    Place("the forest", "in the forest", "into the forest"),
    Place("the meadow", "in the meadow", "to the meadow"),
    Place("the park", "in the park", "to the park"),
    Place("the old bridge", "at the old bridge", "to the old bridge"),
    Place("the orchard", "in the orchard", "to the orchard"),
    Place("the windmill", "at the windmill", "to the windmill"),
    Place("the lake", "at the lake", "to the lake"),
    Place("the village square", "in the village square", "to the village square"),
)
HOMES = (
    "in a yellow house by the river",
    "at the edge of the woods",
    "in a small village",
    "near the old mill",
    "at the end of a long lane",
    "beside a quiet lake",
    "on top of a windy hill",
    "in a valley full of flowers",
    "not far from the sea",
    "behind the bakery",
    "in a cosy little cottage",
    "between two tall mountains",
)
TRAITS = (
    "loved to sing",
    "asked a hundred questions a day",
    "was never in a hurry",
    "liked to draw",
    "knew every path and every tree",
    "was brave but a little shy",
    "laughed at almost everything",
    "could not sit still for long",
    "liked to help",
    "collected pebbles",
    "wanted to see the whole world",
    "always got up before the sun",
    "was small but very clever",
    "hummed the same song all day long",
)
TIMES = (
    "one sunny morning",
    "one windy day",
    "one cold morning",
    "one bright afternoon",
    "one day in spring",
    "one quiet evening",
    "on a warm summer day",
    "on the first day of autumn",
    "early one morning",
    "one grey afternoon",
    "one day after breakfast",
    "one evening before supper",
) + tuple(f"one {day}" for day in DAYS)

FARM = (
    Animal(Noun("duck", "ducks"), "quacks", "pond", "duckling", 2, "feathers", ("swims", "swim")),
    Animal(Noun("dog", "dogs"), "barks", "kennel", "puppy", 4, "fur", ("runs", "run")),
    Animal(Noun("cow", "cows"), "moos", "barn", "calf", 4, "hair", ("walks", "walk")),
    Animal(Noun("sheep", "sheep"), "bleats", "fold", "lamb", 4, "wool", ("grazes", "graze")),
    Animal(Noun("horse", "horses"), "neighs", "stable", "foal", 4, "hair", ("gallops", "gallop")),
    Animal(Noun("pig", "pigs"), "oinks", "sty", "piglet", 4, "bristles", ("digs", "dig")),
    Animal(Noun("hen", "hens"), "clucks", "coop", "chick", 2, "feathers", ("pecks", "peck")),
    Animal(Noun("lion", "lions"), "roars", "grassland", "cub", 4, "fur", ("leaps", "leap")),
    Animal(Noun("frog", "frogs"), "croaks", "pond", "tadpole", 4, "smooth skin", ("hops", "hop")),
    Animal(Noun("bee", "bees"), "buzzes", "hive", "larva", 6, "tiny hairs", ("flies", "fly")),
    Animal(Noun("owl", "owls"), "hoots", "hollow tree", "owlet", 2, "feathers", ("flies", "fly")),
    Animal(Noun("mouse", "mice"), "squeaks", "hole", "pup", 4, "fur", ("nibbles", "nibble")),
    Animal(
        Noun("goose", "geese"), "honks", "meadow", "gosling", 2, "feathers", ("waddles", "waddle")
    ),
    Animal(Noun("wolf", "wolves"), "howls", "den", "cub", 4, "fur", ("trots", "trot")),
    Animal(Noun("cat", "cats"), "meows", "house", "kitten", 4, "fur", ("climbs", "climb")),
)

VERBS = (
    Verb("walk", "walks", "walked", ("to school", "to the river", "along the beach")),
    Verb("bake", "bakes", "baked", ("bread", "an apple pie", "six buns")),
    Verb("write", "writes", "wrote", ("a letter", "a poem", "a short story")),
    Verb("sing", "sings", "sang", ("a song", "in the kitchen", "with the birds")),
    Verb("swim", "swims", "swam", ("in the lake", "across the pond", "with the ducks")),
    Verb("draw", "draws", "drew", ("a horse", "a map", "a big tree")),
    Verb("eat", "eats", "ate", ("soup", "a pear", "two eggs")),
    Verb("go", "goes", "went", ("to the market", "up the hill", "to the park")),
    Verb("plant", "plants", "planted", ("beans", "a tree", "some tulips")),
    Verb("read", "reads", "read", ("a book", "a long letter", "the newspaper")),
    Verb("build", "builds", "built", ("a tower", "a small boat", "a bird house")),
    Verb("catch", "catches", "caught", ("a ball", "a fish", "the early train")),
    Verb("fly", "flies", "flew", ("a kite", "a paper plane", "a toy plane")),
    Verb("ride", "rides", "rode", ("a bicycle", "a pony", "the bus")),
    Verb("sweep", "sweeps", "swept", ("the floor", "the yard", "the stairs")),
    Verb("feed", "feeds", "fed", ("the hens", "the cat", "the goats")),
)

OPPOSITES = (
    ("hot", "cold"),
    ("big", "small"),
    ("day", "night"),
    ("up", "down"),
    ("wet", "dry"),
    ("fast", "slow"),
    ("open", "closed"),
    ("full", "empty"),
    ("light", "dark"),
    ("loud", "quiet"),
    ("soft", "hard"),
    ("old", "young"),
    ("happy", "sad"),
    ("left", "right"),
    ("early", "late"),
    ("near", "far"),
    ("long", "short"),
    ("clean", "dirty"),
    ("strong", "weak"),
    ("thick", "thin"),
)
COLOUR_FACTS = (
    ("snow", "white"),
    ("grass", "green"),
    ("coal", "black"),
    ("milk", "white"),
    ("a ripe banana", "yellow"),
    ("a ripe tomato", "red"),
    ("a carrot", "orange"),
    ("an elephant", "grey"),
    ("a lemon", "yellow"),
    ("chocolate", "brown"),
    ("a crow", "black"),
    ("a frog", "green"),
    ("a swan", "white"),
    ("a flamingo", "pink"),
    ("a strawberry", "red"),
    ("the clear sky", "blue"),
)
TOOL_FACTS = (
    ("cut paper", "scissors"),
    ("sweep the floor", "a broom"),
    ("eat soup", "a spoon"),
    ("dig a hole", "a spade"),
    ("write a letter", "a pen"),
    ("drive a nail", "a hammer"),
    ("open a lock", "a key"),
    ("tell the time", "a clock"),
    ("comb our hair", "a comb"),
    ("sew a button", "a needle and thread"),
    ("catch fish", "a net"),
    ("see small things", "a lens"),
)
SENSE_FACTS = (
    ("see", "eyes"),
    ("hear", "ears"),
    ("smell", "nose"),
    ("taste", "tongue"),
    ("walk", "feet"),
    ("hold things", "hands"),
    ("chew", "teeth"),
)
CAUSE_FACTS = (
    ("it rains", "the ground gets wet"),
    ("the sun shines on snow", "the snow melts"),
    ("the wind blows", "the leaves dance"),
    ("water gets very cold", "it turns to ice"),
    ("water boils", "it turns to steam"),
    ("you drop a glass", "it breaks"),
    ("you heat butter", "it melts"),
    ("the sun goes down", "the sky grows dark"),
    ("the sun comes up", "the birds begin to sing"),
    ("a plant gets no water", "its leaves droop"),
    ("you let go of a balloon", "it floats away"),
    ("winter comes", "many birds fly south"),
    ("spring comes", "the trees grow new leaves"),
    ("you plant a seed and water it", "it begins to grow"),
    ("you are tired", "sleep makes you strong again"),
    ("you run fast", "your heart beats faster"),
)
# Each row is smaller than the next, so any two may be compared.
ANIMALS_BY_SIZE = tuple(
    Noun(one, many)
    for one, many in (
        ("ant", "ants"),
        ("bee", "bees"),
        ("mouse", "mice"),
        ("rabbit", "rabbits"),
        ("goat", "goats"),
        ("horse", "horses"),
        ("elephant", "elephants"),
        ("whale", "whales"),
    )
)
