"""What is tried, feared, looked for or waited for, and how it turns out."""

from __future__ import annotations

from i3lm.data.corpora.teller import Teller
from i3lm.data.corpora.words import (
    BLOOMS,
    CROPS,
    DAYS,
    FARM,
    FOODS,
    INDOORS,
    NUMBERS,
    ORDINALS,
    OUTDOORS,
    PLACES,
    SMALL_THINGS,
    Noun,
    counted_to,
    with_article,
)


def rainy_walk(t: Teller) -> None:
    """Weather spoils a plan, a shelter is found, and the wait turns out well."""
    a, b = t.pair()
    goal = t.pick(PLACES)
    food, number = t.pick(FOODS), t.number(2, 6)
    shelter = t.pick(("old barn", "hollow tree", "small cave", "empty hut", "wooden boat shed"))
    t.open(a)
    time = t.time()
    t.say(
        f"{time}, {a.he} and {b.full} set out for a walk {goal.to}.",
        f'{time}, {a} said to {b.full}, "Let\'s walk {goal.to}!"',
        f"{time}, {a} wanted to show {b.full} the way {goal.to}.",
    )
    t.maybe(
        f"{b} put {food.count(number)} into {b.his} bag.",
        f"They took {food.count(number)} along.",
    )
    t.paragraph()
    t.say(
        "Halfway there, a dark cloud covered the sun.",
        "The sky turned grey, and the wind began to blow.",
        "Plip, plop! A drop fell on a leaf, and then another.",
    )
    t.say(
        "Then the rain came down in buckets.",
        "Soon it rained so hard that they could not see the path.",
        "There was a flash and a loud boom of thunder.",
    )
    t.speak(a, "We are getting wet!", "Quick, we must find a roof!", "Where can we go?")
    t.speak(b, f"Look, {with_article(shelter)}!", f"I can see {with_article(shelter)}!")
    t.say(
        f"They ran as fast as they could and crept into the {shelter}.",
        "They ran and ran until they were inside, wet to the skin.",
        "Hand in hand they ran, and soon they were dry.",
    )
    t.paragraph()
    game = t.pick(
        (
            f"To pass the time, {a} told a story about a whale who was afraid of water.",
            f"{b} sang every song that {b.he} knew, and {a} clapped along.",
            f"{a} was afraid of the thunder, so {b} held {a.his} hand.",
            f"They counted between the flash and the boom: {counted_to(number)}.",
        )
    )
    t.say(game)
    t.maybe(
        f"They heard the rain grow softer and softer, until {a} fell asleep.",
        "The hours went by like minutes.",
        f"{b} laughed at {b.his} own wet nose.",
    )
    t.say(
        "When the rain stopped, a rainbow stood in the sky.",
        "At last the sun came out, and every leaf was shining.",
        "Then it was still, and the whole world smelled fresh and green.",
    )
    t.say(
        f"They never got {goal.to} that day, but nobody minded.",
        f"{a} forgot all about {goal.the}, for this had been much better.",
        "Rain can spoil a walk, but not a friendship.",
        f'"I hope it rains tomorrow too," said {b}.',
        f"And because the rain had stopped, they walked on {goal.to} after all.",
    )


def patient_gardener(t: Teller) -> None:
    """A seed is planted; the days of the week pass; patience bears fruit."""
    a, b = t.pair()
    crop = t.pick(BLOOMS + CROPS)
    start, total = t.number(0, 6), t.number(2, 9)
    days = [DAYS[(start + offset) % 7] for offset in range(4)]
    spot = t.pick(OUTDOORS)
    t.open(a)
    t.say(
        f"On {days[0]}, {a.he} planted a {crop} seed {spot}."
        if crop.a.startswith("a ")
        else f"On {days[0]}, {a.he} planted an {crop} seed {spot}.",
        f"On {days[0]}, {a} dug a hole {spot} and put one small seed in it.",
    )
    t.say(
        f"On {days[1]}, {a.he} watered it and waited. Nothing happened.",
        f"On {days[1]}, {a} looked at the ground all day. It stayed brown.",
        f"{days[1]} came, and there was nothing to see but earth.",
    )
    t.say(
        f"On {days[2]}, {a} wanted to dig the seed up again.",
        f"On {days[2]}, {a} began to lose hope.",
        f'"Perhaps it is asleep," said {a} on {days[2]}.',
    )
    t.paragraph()
    t.say(
        f"{b.full} looked over the fence.",
        f"{b.full} came by and sat down on the grass.",
        f"Then {b.full} came to visit.",
    )
    t.speak(
        b,
        "A seed needs time.",
        "Be patient. Good things grow slowly.",
        "It is working under the ground where you can't see it.",
    )
    t.maybe(
        f"So {a} sat down and told the seed a story.",
        f"So {a} watered it again and kept the birds away.",
        f"{a} nodded, but it was not easy to wait.",
    )
    t.say(
        f"And on {days[3]}, there was a tiny green leaf!",
        f"On {days[3]}, something small and green looked out of the earth.",
        f"When {a} came back on {days[3]}, a little sprout was standing there.",
    )
    t.say(
        "It grew and grew, through sun and through rain.",
        "Week after week it grew a little taller.",
        f"By summer it was as tall as {a}.",
    )
    t.paragraph()
    t.say(
        f"In the end there were {crop.count(total)} {spot}.",
        f"From one small seed came {crop.count(total)}.",
        f'{a} counted: "{counted_to(total).capitalize()}. I have {crop.count(total)}!"',
    )
    keep = total - 1
    t.say(
        f"{a} gave one to {b} and kept {NUMBERS[keep]}.",
        f"One was for {b}, because {b.he} had told {a} to wait.",
        f"{a} kept {NUMBERS[keep]} and gave {b} the finest one.",
    )
    t.maybe(
        "Those who wait with care are rewarded.",
        "Nobody can hurry a seed.",
        "Little by little, a lot comes.",
    )


def strange_noise(t: Teller) -> None:
    """A noise in the night frightens somebody, until they look."""
    a, b = t.pair()
    noise, cause = t.pick(
        (
            ("tap, tap, tap", "a branch that knocked against the window"),
            ("scratch, scratch", "a small mouse with a very large crumb"),
            ("hoo, hoo", "an owl that sat on the roof"),
            ("drip, drop", "water that fell from the roof into a bucket"),
            ("creak, creak", "the garden gate, which moved in the wind"),
            ("flap, flap", "a shirt that somebody had left on the line"),
            ("rumble, rumble", "a fat cat that purred in its sleep"),
        )
    )
    light = t.pick(("a candle", "a small lamp", "a lantern"))
    spot = t.pick([spot for spot in INDOORS if spot.startswith(("under", "behind", "beneath"))])
    t.open(a)
    t.say(
        f"One night, {a.he} could not sleep.",
        f"One dark night, {a} woke up all at once.",
        f"{a} was in bed, and the moon was behind the clouds.",
    )
    t.say(
        f"{noise.capitalize()}! What was that?",
        f"There was a sound in the dark: {noise}.",
        f"Something went {noise}, and then it was quiet again.",
    )
    t.say(
        f"{a} pulled the blanket over {a.his} head.",
        f"{a.His} heart beat fast.",
        f"{a} hid {spot} and did not move.",
        f"{a} held {a.his} breath and listened.",
    )
    t.paragraph()
    t.say(
        f"In the other bed lay {b.full}, who was staying for the night.",
        f"{b.full} was staying with {a} that week.",
    )
    t.speak(a, "Did you hear that?", "Are you awake?", "I think there is a monster!")
    t.speak(b, "Let us go and see.", "I heard it too.", "Monsters don't knock. Let us look.")
    t.say(
        f"{b.He} took {light}, and they went on tiptoe through the dark hall.",
        f"{a} was still afraid, but {a.he} took {light} and went first.",
        f"With {light} in one hand and {b}'s hand in the other, {a} opened the door.",
    )
    t.say(
        f"{noise.capitalize()}, it went again, much louder now.",
        "The sound came closer and closer.",
    )
    t.paragraph()
    t.say(
        f"And what did they find? It was only {cause}!",
        f"It was not a monster at all. It was {cause}.",
        f"Then {a} began to laugh, for it was {cause}.",
    )
    t.maybe(
        f'"Good evening," said {a}, and {a.he} bowed.',
        f'"So that is our monster," said {b}.',
        f"{b} laughed so much that {b.he} had to sit down.",
    )
    t.say(
        f"They went back to bed, and {a} slept until morning.",
        f"After that, {a} was not afraid of {noise} any more.",
        "Fear grows in the dark and shrinks in the light.",
        f"To be brave, {a} learned, is to be afraid and look all the same.",
    )


def slow_and_fast(t: Teller) -> None:
    """A race that is lost on the way and won in another manner."""
    a, b = t.pair()
    start, goal = t.sample(PLACES, 2)
    stop = t.pick(
        (
            ("a beetle lay on its back", "turned it over"),
            ("a little bird had fallen from its nest", "put it back"),
            ("an old woman had dropped her apples", "picked them up"),
            ("a lamb was caught in a bush", "set it free"),
            ("a small child had lost a shoe", "found it"),
        )
    )
    t.say(
        f"{a.full} was fast, and {a.he} told everyone about it.",
        f"Nobody could run as fast as {a.full}, and {a} knew it.",
        f"{a.full} was the fastest runner for miles around.",
    )
    t.say(
        f"{b.full} was slow, but {b.he} did not mind.",
        f"{b.full} liked to take {b.his} time.",
        f"{b.full} walked slowly and saw a great many things.",
    )
    t.speak(
        a, f"I bet I can beat you from {start.the} to {goal.the}!", f"Shall we race to {goal.the}?"
    )
    t.speak(b, "Why not?", "Very well.", "I will try my best.")
    t.paragraph()
    t.say(
        f"They started {start.at}. One, two, three, go!",
        f"{start.at}, somebody waved a red flag, and off they went.",
    )
    t.say(
        f"{a} was soon out of sight.",
        f"{a} shot away like an arrow.",
        f"{a} ran so fast that {a.his} ears hummed.",
    )
    t.say(
        f"On the way {stop[0]}. {a} saw it and ran past.",
        f"Beside the path, {stop[0]}. {a} had no time for that.",
    )
    t.say(
        f"{b} came by much later, and {b.he} stopped and {stop[1]}.",
        f"When {b} came along, {b.he} stopped at once and {stop[1]}.",
    )
    t.paragraph()
    if t.chance(0.5):
        t.say(
            f"{a} got to {goal.the} first, but nobody was there to clap.",
            f"{a} won the race and waited {goal.at}, all alone.",
        )
        t.say(
            f"When {b} arrived, a whole crowd came with {b.him}, and everyone was singing.",
            f"Then {b} came, and everyone came with {b.him} and sang, for {b.he} had been so kind.",
        )
    else:
        t.say(
            f"Near {goal.the} {a} felt so sure of {a.himself} that {a.he} lay down for a nap.",
            f"{a} was so far ahead that {a.he} sat down to look at the view.",
        )
        t.say(
            f"{b} walked quietly past {a.him} and got there first.",
            f"Step by step, {b} went by, and {b.he} won the race.",
        )
    t.say(
        f'"Next time I will walk with you," said {a}.',
        f"{a} thought about it for a long time.",
        f"The next day {a} walked beside {b}, quite slowly, and saw a great many things.",
    )
    t.maybe(
        "It is good to be fast, but it is better to be kind.",
        "Those who never stop see only the road.",
        "There is more than one way to win.",
    )


def new_friend(t: Teller) -> None:
    """Somebody new is alone, until somebody asks."""
    a, b = t.pair()
    place = t.pick(PLACES)
    game = t.pick(("hide and seek", "tag", "leap frog", "marbles", "catch", "pirates", "chess"))
    habit = t.pick(
        (
            "drew pictures in the sand",
            "read a thick book",
            "built a tower of stones",
            "whistled softly",
        )
    )
    t.say(
        f"{b.full} was new in the village and knew nobody.",
        f"{b.full} had come from far away and had no friends yet.",
        f"Nobody knew {b.full}, who had moved in only last week.",
    )
    t.say(
        f"Every day {b.he} sat {place.at} and {habit}, all by {b.himself}.",
        f"Each afternoon {b.he} went {place.to}, sat down alone and {habit}.",
        f"While the others played, {b} sat {place.at} and {habit}.",
    )
    t.paragraph()
    time = t.time()
    t.say(
        f"{time}, {a.full} came by.",
        f"{time}, {a.full} saw {b.him} there.",
        f"Then, {time}, somebody stopped. It was {a.full}.",
    )
    t.maybe(
        f"{a} was shy too, and it took {a.him} a while to find a word.",
        f"{a} walked past, stopped, and walked back again.",
        f"{a} did not know what to say, so {a.he} said hello.",
    )
    t.speak(
        a,
        f"Do you want to play {game} with me?",
        f"Do you know how to play {game}?",
        "May I sit with you?",
    )
    t.speak(
        b,
        "I would like that very much.",
        "I don't know how, but I can learn.",
        "Nobody ever asked me before.",
    )
    t.say(
        f"So they played {game} until it was dark.",
        f"{a} showed {b} how to play {game}, and they laughed a great deal.",
        f"They played {game}. {a} won once, and {b} won twice.",
    )
    t.paragraph()
    t.say(
        f"Then {b} showed {a} something too. {b.He} {habit}, and {a} wanted to learn it.",
        f"It turned out that {b} knew many jokes. {a} laughed until {a.his} sides hurt.",
        f"{b} told {a} about {b.his} old home, where the winters were long and white.",
    )
    t.say(
        f"The next day, two friends sat {place.at}.",
        f"After that day, {b} was never alone {place.at} again.",
        f"When a new child came to the village, {b} was the first to say hello."
        if b.kind in ("girl", "boy", "child")
        else f"When somebody new came to the village, {b} was the first to say hello.",
        "One small question can open a big door.",
        "Every friend was a stranger once.",
    )


_COUNTED_YOUNG = {
    "duckling": "ducklings",
    "puppy": "puppies",
    "piglet": "piglets",
    "chick": "chicks",
    "gosling": "goslings",
    "kitten": "kittens",
    "owlet": "owlets",
}


def missing_duckling(t: Teller) -> None:
    """A mother counts her young, one is missing, and it is brought home."""
    a, b = t.pair()
    animal = t.pick([animal for animal in FARM if animal.young in _COUNTED_YOUNG])
    mother, young = animal.noun.one, animal.young
    many = _COUNTED_YOUNG[young]
    total = t.number(3, 8)
    spot = t.pick(OUTDOORS)
    t.open(a)
    t.say(
        f"Near the house lived a mother {mother} with {NUMBERS[total]} {many}.",
        f"{a.He} knew a mother {mother} who had {NUMBERS[total]} {many}.",
    )
    time = t.time()
    t.say(
        f"{time}, {a} saw that the mother {mother} was upset.",
        f"{time}, {a} and {b.full} heard the mother {mother} call.",
    )
    t.paragraph()
    t.say(
        f"{a} counted the {many}: {counted_to(total - 1)}.",
        f'"{counted_to(total - 1).capitalize()}," {a} counted.',
    )
    t.say(
        f"There should be {NUMBERS[total]}. One {young} was missing!",
        f"Only {NUMBERS[total - 1]} were there. Where was the {ORDINALS[total - 1]} {young}?",
    )
    t.say(
        f"{a} called {b}, and they began to search.",
        f"{b} came to help, and {b.he} looked on one side while {a} looked on the other.",
    )
    t.say(
        f"They listened. Something small was crying {spot}.",
        f"They searched high and low. Then {b} heard a tiny voice {spot}.",
        f"{a} saw something move {spot}.",
    )
    t.say(
        f"It was the little {young}, and its foot was stuck.",
        f"There sat the lost {young}, cold and tired.",
        f"The {young} had followed a butterfly and had lost its way.",
    )
    t.paragraph()
    t.say(
        f"{a} picked it up very gently and carried it home.",
        f"{b} wrapped it in {b.his} scarf, and {a} led the way back.",
        f"{a} held it in {a.his} two hands and spoke to it softly.",
    )
    t.say(
        f"Now the mother {mother} had {NUMBERS[total]} {many} again.",
        f"They counted once more: {counted_to(total)}. Nobody was missing.",
    )
    t.say(
        f"The mother {mother} looked at {a} as if to say thank you.",
        f"That evening all the {many} slept in one warm heap.",
        "Even the smallest one counts.",
        f"And the little {young} never followed a butterfly again. Well, only once.",
    )


def hide_and_seek(t: Teller) -> None:
    """One counts, two hide, and each is found exactly where they hid."""
    a, b, c = t.trio()
    place = t.pick(PLACES)
    spot_b, spot_c = t.sample(OUTDOORS, 2)
    top = t.number(5, 10)
    time = t.time()
    t.say(
        f"{time}, {a.full}, {b.full} and {c.full} played hide and seek {place.at}.",
        f"{a.full}, {b.full} and {c.full} met {place.at} to play hide and seek.",
        f"{time}, three friends met {place.at}: {a.full}, {b.full} and {c.full}.",
    )
    t.say(
        f'"I will count," said {a}.',
        f"It was {a}'s turn to count.",
        f"{a} closed {a.his} eyes first.",
    )
    t.say(
        f'"{counted_to(top).capitalize()}!"',
        f"{a.He} counted slowly to {NUMBERS[top]}.",
    )
    t.paragraph()
    t.say(
        f"{b} hid {spot_b}, and {c} hid {spot_c}.",
        f"{b} ran and crouched down {spot_b}. {c} chose a place {spot_c}.",
        f"Quick as a mouse, {b} was {spot_b}. {c} took longer and hid {spot_c}.",
    )
    t.maybe(
        f"{b} had to hold {b.his} nose so as not to sneeze.",
        f"A snail crept over {c}'s foot, but {c} kept still.",
        "For a while there was not a sound but the wind.",
    )
    t.paragraph()
    t.speak(a, "Ready or not, here I come!", "Where can they be?")
    found_first, first_spot, found_last, last_spot = t.pick(
        ((b, spot_b, c, spot_c), (c, spot_c, b, spot_b))
    )
    t.say(
        f"{a} looked around and listened. First {a.he} found {found_first} {first_spot}.",
        f"Somebody giggled, and so {a} found {found_first} {first_spot}.",
        f"{a} saw a foot sticking out. There was {found_first}, {first_spot}!",
    )
    t.say(
        f"But where was {found_last}?",
        f"{found_last} was harder to find.",
        f"{found_first} helped to look for {found_last}.",
    )
    t.say(
        f"They looked up and down, and there was {found_last}, {last_spot}, fast asleep!",
        f"At long last {a} found {found_last} {last_spot}.",
        f"It was almost dark when somebody sneezed {last_spot}. It was {found_last}!",
    )
    t.paragraph()
    t.say(
        f'"You win, {found_last}," said {a}. "Next time you will count."',
        f"{found_last} was found last, so {found_last} had won.",
    )
    t.maybe(
        "They played again and again until somebody called them in for supper.",
        "All the way home they talked about the best places to hide.",
        "It is fun to hide, but the best part is to be found.",
    )


_BLOCKS = [
    Noun("block", "blocks"),
    Noun("brick", "bricks"),
    Noun("box", "boxes"),
    Noun("stone", "stones"),
]


def tall_tower(t: Teller) -> None:
    """A tower falls twice and stands the third time, because somebody thinks."""
    a, b = t.pair()
    block = t.described(_BLOCKS)
    low = t.number(3, 5)
    high = t.number(low + 1, 7)
    final = t.number(high + 1, 12)
    t.open(a)
    time = t.time()
    t.say(
        f"{time}, {a.he} built a tower of {block.many}.",
        f"{time}, {a} wanted to build the tallest tower in the world out of {block.many}.",
    )
    t.say(
        f"{a.He} put one on top of another: {counted_to(low)}.",
        f"It was {NUMBERS[low]} {block.many} high.",
    )
    t.say(
        "Then it fell down. Crash!",
        "It shook, and it fell.",
        "A fly sat down on it, and down it came.",
    )
    t.paragraph()
    t.say(
        f"{a} tried again. This time it was {NUMBERS[high]} {block.many} high, and it fell again.",
        f"The second tower had {block.count(high)}. It fell too.",
    )
    t.say(
        f"{a} kicked a {block.short} and hurt {a.his} toe.",
        f'"I give up," said {a}.',
        f"{a} was so cross that {a.he} would not speak.",
        f"{a} was angry with {a.himself}.",
    )
    t.say(
        f"{b.full} had watched it all.",
        f"Then {b.full} came in and looked at the heap.",
    )
    t.speak(
        b,
        "A tower needs wide feet.",
        "Trees are wide at the bottom. Why not your tower?",
        "What if we begin with a big square?",
    )
    t.paragraph()
    t.say(
        f"So they put four {block.many} on the floor first, side by side.",
        f"{b} held the bottom, and {a} built slowly and carefully.",
        f"{a} made the bottom wide and strong, and {b} passed {a.him} the {block.many}.",
    )
    t.say(
        f"Up and up it went, until it was {NUMBERS[final]} {block.many} high.",
        f"Now it was {NUMBERS[final]} {block.many} high, and it did not even shake.",
    )
    t.maybe(
        f"{a} put {t.described(SMALL_THINGS).a} on the very top.",
        "They stood back and held their breath.",
        "Even the fly could sit on it.",
    )
    t.say(
        "What falls can be built again, and better.",
        f'"It is {NUMBERS[final - low]} {block.many} higher than the first one!" cried {a}.',
        f"{a} learned two things that day: to begin wide, and to begin again.",
        f'"We built it together," said {b}, and that was true.',
    )


# what is wanted, where it is seen, with what one tries to catch it, and how that fails
_WISHES = (
    ("the moon", "in the pond", "net", "the moon broke into a hundred pieces"),
    ("the wind", "on the hill", "big sack", "the sack was full for a moment and then flat again"),
    ("the rainbow", "behind the meadow", "long ladder", "the rainbow took one step back each time"),
    ("the sunbeam", "in the barn", "jar", "the jar was bright only until the lid was on it"),
    ("the echo", "in the valley", "wooden box", "the echo only said what they said"),
    ("the first snowflake", "in the yard", "warm cap", "it turned into a drop of water"),
    ("the shadow of a cloud", "on the lawn", "blanket", "it slipped out at the other side"),
)


def moon_in_the_pond(t: Teller) -> None:
    """Somebody wants to catch what cannot be caught, and gets something else."""
    a, b = t.pair()
    name, where, tool, failure = t.pick(_WISHES)
    t.open(a)
    t.say(
        f"One day {a.he} noticed {name} {where} and wanted to have it.",
        f'{a} noticed {name} {where} and said, "I will catch it!"',
        f'"Why does nobody own {name}?" {a} wondered, standing {where}.',
    )
    t.say(
        f"So {a.he} took a {tool} and asked {b.full} to help.",
        f"{a} fetched a {tool}, and {b.full} came along to watch.",
        f"{b.full} lent {a.him} a {tool}.",
    )
    t.paragraph()
    t.say(
        f"They tried once, but {failure}.",
        f"{a} was quick, but {failure}.",
        f"They crept closer and closer. Now! But {failure}.",
    )
    t.say(
        f"They tried a second time and a third time, but they could not catch {name}.",
        f"{b} tried too, with {b.his} eyes closed, but it was no use.",
        f"{a} tried until {a.his} arms were tired.",
    )
    t.speak(
        a,
        f"Why can't I keep {name}?",
        "It is too clever for me.",
        f"I only wanted {name} for {t.pick(('my room', 'my window', 'rainy days'))}.",
    )
    t.speak(
        b,
        "Perhaps it belongs to everybody.",
        "If you kept it, nobody else could have it.",
        "You can't hold it, but you can come back to it.",
    )
    t.paragraph()
    t.say(
        f"{a} thought about that, put down the {tool} and sat beside {b}.",
        f"So the two sat down, with the {tool} between them, and were quiet.",
        f"{a} nodded slowly and laid the {tool} away.",
    )
    t.say(
        f"That evening {a.he} made up a song about {name}, and it was a good song.",
        f"{name} stayed free, and {a} came back many times.",
        "Some things are ours only when we let them go.",
        f"And that was almost as good as having {name}.",
    )
