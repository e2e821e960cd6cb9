"""The dialogues: two speakers by turns, one line each, every answer fitting its question."""

from __future__ import annotations

from collections.abc import Callable

from i3lm.data.corpora.teller import Teller
from i3lm.data.corpora.words import (
    COLOURS,
    DAYS,
    FARM,
    FOODS,
    INDOORS,
    NUMBERS,
    OPPOSITES,
    OUTDOORS,
    PLACES,
    SMALL_THINGS,
    TEACHER,
    TREASURES,
    WAITER,
    Person,
    counted_to,
    with_article,
)


def _meet(t: Teller, a: Person, b: Person) -> None:
    """Says who talks and where; now and then the talk begins at once."""
    place = t.pick(PLACES)
    if t.chance(0.75):
        t.say(
            f"{a} and {b} were sitting {place.at}.",
            f"{a} met {b} {place.at}.",
            f"{b} was {place.at} when {a} came by.",
            f"On the way {place.to}, {a} and {b} had a talk.",
            f"{a} ran into {b} {place.at}.",
        )


def where_is_it(t: Teller) -> None:
    """Somebody looks for a thing and is told where it is."""
    a, b = t.pair()
    thing = t.described(TREASURES + SMALL_THINGS)
    wrong, right = t.sample(INDOORS + OUTDOORS, 2)
    _meet(t, a, b)
    t.reply(
        a,
        f"Have you seen my {thing}?",
        f"Where is my {thing}?",
        f"Do you know where my {thing} is?",
    )
    t.reply(b, f"Is it {wrong}?", f"Did you look {wrong}?", f"Maybe it is {wrong}?")
    t.reply(a, "No, I looked there already.", "No, it is not there.", f"I looked {wrong} twice.")
    t.reply(
        b,
        "When did you have it last?",
        "Where did you play with it?",
        "Think. Where did you leave it?",
    )
    t.reply(
        a,
        f"This morning I had it {right}.",
        f"I think it was {right}.",
        f"I played with it {right}.",
    )
    t.reply(
        b, "Then let us look there.", "Come, we will go and see.", "I am sure it is still there."
    )
    t.paragraph()
    t.say(
        f"They went to look, and there was {thing.the}, {right}.",
        f"And it was true. {thing.the.capitalize()} lay {right}.",
        f"{a} looked {right} and found {thing.the}.",
    )


def favourites(t: Teller) -> None:
    """Two tell what they like best, and one remembers it."""
    a, b = t.pair()
    colour_a, colour_b = t.sample(COLOURS, 2)
    food_a, food_b = t.sample(FOODS, 2)
    _meet(t, a, b)
    t.reply(a, "What is your favourite colour?", "Which colour do you like best?")
    t.reply(
        b, f"I like {colour_b} best. And you?", f"My favourite colour is {colour_b}. What is yours?"
    )
    t.reply(a, f"Mine is {colour_a}.", f"I like {colour_a} more than {colour_b}.")
    t.reply(b, "And what do you like to eat?", "What is your favourite food?")
    t.reply(a, f"I love {food_a.many}. What about you?", f"{food_a.many.capitalize()}! And yours?")
    t.reply(b, f"I like {food_b.many}.", f"I could eat {food_b.many} all day.")
    gift, box = with_article(f"{colour_b} bag"), with_article(f"{colour_a} box")
    t.paragraph()
    t.say(
        f"The next day, {a} gave {b} {gift} full of {food_b.many}.",
        f"So {b} gave {a} {box} with {food_a.count(t.number(2, 6))} in it.",
        f"{a} wrote it down: {b} likes {colour_b} and {food_b.many}.",
        f"Now {b} knew that {a} liked {colour_a} and {food_a.many}.",
    )


def animal_riddle(t: Teller) -> None:
    """An animal is described and guessed, with one wrong guess."""
    a, b = t.pair()
    right = t.pick(FARM)
    alike = [animal for animal in FARM if animal.legs == right.legs and animal is not right]
    wrong = t.pick(alike or FARM[:9])
    _meet(t, a, b)
    t.reply(
        a,
        "I am thinking of an animal. Can you guess it?",
        "Guess my animal!",
        "Do you want to hear a riddle?",
    )
    t.reply(b, "Give me a hint.", "What does it look like?", "How many legs does it have?")
    t.reply(a, f"It has {NUMBERS[right.legs]} legs and {right.wears}.")
    t.reply(b, f"Is it {wrong.noun.a}?", f"I think it is {wrong.noun.a}. Am I right?")
    t.reply(
        a,
        f"No, {wrong.noun.a} {wrong.says}, and my animal {right.says}.",
        f"No. My animal {right.says}, and its young one is called {with_article(right.young)}.",
    )
    t.reply(b, f"Then it is {right.noun.a}!", f"Now I know. It is {right.noun.a}!")
    t.reply(
        a,
        "Yes, you guessed it!",
        f"Right! It is {right.noun.a}.",
        "That is right. Now it is your turn.",
    )


def at_school(t: Teller) -> None:
    """A teacher asks sums, days and opposites; the answers are right."""
    pupil, other = t.pair()
    teacher = t.helper([TEACHER])
    t.say(
        f"{pupil} and {other} sat in the first row.",
        "The bell rang, and the class was quiet.",
        f"It was {t.pick(DAYS[:5])}, and school had just begun.",
    )
    x, y = t.number(1, 9), t.number(1, 9)
    today = t.number(0, 6)
    word, opposite = t.pick(OPPOSITES)
    t.reply(teacher, f"What is {NUMBERS[x]} and {NUMBERS[y]}, {pupil}?")
    t.paragraph()
    sum_line = f"{NUMBERS[x].capitalize()} and {NUMBERS[y]} make {NUMBERS[x + y]}"
    t.say(f'"{sum_line}," said {pupil}.', f'{pupil} counted and said, "{sum_line}."')
    t.reply(teacher, f"Very good. {other}, which day comes after {DAYS[today]}?")
    t.paragraph()
    t.say(f'"{DAYS[(today + 1) % 7]} comes after {DAYS[today]}," answered {other}.')
    if t.chance(0.6):
        t.reply(teacher, f"And what is the opposite of {word}?")
        t.paragraph()
        t.say(f'"The opposite of {word} is {opposite}," said both of them.')
    t.paragraph()
    t.say(
        f"{pupil} and {other} were proud of themselves.",
        '"Well done," said the teacher, and the bell rang.',
        "Then it was time to play.",
        "The teacher smiled and gave each of them a star.",
    )


def at_the_market(t: Teller) -> None:
    """Fruit is bought; number times price is what is paid."""
    a, b = t.pair()
    food = t.pick(FOODS)
    number, price = t.number(2, 5), t.number(2, 4)
    total = number * price
    t.say(
        f"{b} was selling {food.many} at the market, and {a} came by.",
        f"At the market, {b} had a stall with {food.many}. {a} stopped.",
        f"{a} went to {b}'s stall to buy {food.many}.",
    )
    t.reply(a, f"How much is one {food.one}?", f"What does one {food.one} cost?")
    t.reply(b, f"One {food.one} costs {NUMBERS[price]} coins.")
    t.reply(
        a, f"Then I would like {food.count(number)}, please.", f"May I have {food.count(number)}?"
    )
    t.reply(b, f"{food.count(number).capitalize()} cost {NUMBERS[total]} coins.")
    t.reply(
        a, f"Here are {NUMBERS[total]} coins.", f"One moment. Here you are, {NUMBERS[total]} coins."
    )
    t.reply(
        b,
        "Thank you, and come again!",
        "Thank you. Have a good day!",
        "Here is your bag. Enjoy them!",
    )
    t.paragraph()
    t.say(
        f"{a} walked home with {food.count(number)} in {a.his} bag.",
        f"{a} ate one on the way home, so only {food.count(number - 1)} got there.",
    ) if number > 2 else t.say(f"{a} walked home with {food.count(number)} in {a.his} bag.")


def cannot_sleep(t: Teller) -> None:
    """Two at bedtime; one cannot sleep, the other knows something."""
    a, b = t.pair()
    food = t.pick(("sheep", "stars", "little boats", "clouds", "white geese"))
    count = t.number(3, 7)
    t.say(
        f"It was late. {a} and {b} lay in their beds.",
        f"The moon was high, and {a} and {b} were in bed.",
        f"{a} was staying at {b}'s house for the night.",
    )
    t.reply(a, "I can't sleep.", f"Are you asleep, {b}?", "It is so dark in here.")
    t.reply(
        b,
        f"Try to count {food}.",
        f"When I can't sleep, I count {food}.",
        f"Close your eyes and count {food}.",
    )
    t.reply(a, f"Good, I will count {food}. {counted_to(count).capitalize()}.")
    t.reply(b, "Are you tired now?", "Does it help?", "And now?")
    t.paragraph()
    t.say(
        f"But {a} did not answer, for {a.he_was} asleep.",
        f"There was no answer. {a} was dreaming of {NUMBERS[count]} {food}.",
        f"{a} only snored, and soon {b} slept too.",
    )


def a_visit(t: Teller) -> None:
    """A day is agreed on, which is not the first one proposed."""
    a, b = t.pair()
    first, second = t.sample(DAYS, 2)
    place = t.pick(PLACES)
    reason = t.pick(
        (
            "visit my aunt",
            "help my father",
            "go to the doctor",
            "bake bread",
            "go to my music lesson",
        )
    )
    hour = NUMBERS[t.number(2, 6)]
    t.reply(a, f"Can you come to {place.the} on {first}?", f"Shall we go {place.to} on {first}?")
    t.reply(
        b, f"Not on {first}. On {first} I {reason}.", f"I am sorry, I have to {reason} on {first}."
    )
    t.reply(a, f"What about {second}?", f"Then let us go on {second}. Is that better?")
    t.reply(
        b, f"Yes, on {second} I am free. At what time?", f"{second} is fine. When shall I come?"
    )
    t.reply(a, f"At {hour} o'clock.", f"Come at {hour}.")
    t.reply(b, "I will be there.", "Good. I will bring a cake.", f"I can't wait for {second}!")
    t.paragraph()
    t.say(
        f"On {second} at {hour} o'clock, {a} and {b} met {place.at}.",
        f"And on {second}, at {hour} o'clock, there {b.he_was}.",
        f"{a} counted the days until {second}.",
    )


def who_did_it(t: Teller) -> None:
    """Something is eaten, somebody denies it, and the crumbs tell."""
    a, b = t.pair()
    food = t.pick(FOODS)
    total = t.number(3, 8)
    left = t.number(1, total - 1)
    gone = total - left
    trace = t.pick(("your nose", "your chin", "your sleeve", "both your hands", "your shirt"))
    are = "is" if left == 1 else "are"
    t.reply(
        a, f"There were {food.count(total)} on this plate. Now there {are} only {NUMBERS[left]}!"
    )
    t.reply(b, "How strange.", "It must have been the cat.", "Perhaps the wind took them.")
    t.reply(
        a,
        "One is missing. Did you eat it?"
        if gone == 1
        else f"{NUMBERS[gone].capitalize()} are missing. Did you eat them?",
        f"Who ate {food.count(gone)}?",
    )
    t.reply(b, "It was not me.", "Why do you ask me?", "I have not been in the kitchen all day.")
    t.reply(a, f"Then why are there crumbs on {trace}?", f"And what is that on {trace}?")
    t.reply(
        b,
        "Oh. That is a very old crumb.",
        "All right, it was me. I am sorry.",
        "I only wanted to try one.",
    )
    t.paragraph()
    t.say(
        f"{a} had to laugh, and they ate the rest together.",
        f'"Next time, ask me first," said {a}, and {b} promised.',
        f"{b} washed {b.himself} and said sorry. Then they baked new ones.",
        f"The cat, who had heard it all, looked at {b} for a long time.",
    )


def what_is_your_name(t: Teller) -> None:
    """Strangers introduce themselves; names, ages and homes come back."""
    a, b = t.pair()
    age_a, age_b = t.sample(range(4, 11), 2)
    place_a, place_b = t.sample(PLACES, 2)
    near = t.pick(("near", "behind", "beside"))
    t.reply(
        a, f"Hello! My name is {a}. What is your name?", f"Good morning! I am {a}. Who are you?"
    )
    t.reply(b, f"I am {b}.", f"My name is {b}. I am happy to meet you.")
    t.reply(a, f"Where do you live, {b}?", "Do you live near here?")
    t.reply(
        b,
        f"I live {near} {place_b.the}. And you?",
        f"My house is {near} {place_b.the}. Where is yours?",
    )
    t.reply(
        a,
        f"I live near {place_a.the}. How old are you?",
        f"Near {place_a.the}. I am {NUMBERS[age_a]}. And you?",
    )
    t.reply(b, f"I am {NUMBERS[age_b]}.", f"I am {NUMBERS[age_b]} years old.")
    older, younger = (a, b) if age_a > age_b else (b, a)
    high, low = max(age_a, age_b), min(age_a, age_b)
    t.paragraph()
    t.say(
        f"So {a} was {NUMBERS[age_a]} and lived near {place_a.the}, and {b} was {NUMBERS[age_b]}.",
        f"{older} was {NUMBERS[high]} and {younger} was {NUMBERS[low]}, so {older} was older.",
        f"The next day, {a} went to {place_b.the} to visit {b}.",
    )


def opposites_game(t: Teller) -> None:
    """One says a word, the other its opposite, until it gets silly."""
    a, b = t.pair()
    rounds = t.sample(OPPOSITES, t.number(2, 4))
    t.say(
        f"{a} and {b} played the game of opposites.",
        f'"Let us play opposites," said {a}. "I say a word, and you say the other one."',
    )
    for word, opposite in rounds:
        t.paragraph()
        t.say(f'"{word.capitalize()}!" said {a}.', f'{a} said, "{word.capitalize()}."')
        t.paragraph()
        t.say(f'"{opposite.capitalize()}!" said {b}.', f'{b} said, "{opposite.capitalize()}."')
    question, answer = t.pick(
        (
            ("What is the opposite of a cake?", "An empty plate!"),
            ("And what is the opposite of an umbrella?", "A wet head!"),
            (
                "Now a hard one. What is the opposite of a cow?",
                "An owl, because it sleeps all day!",
            ),
            ("What is the opposite of a friend?", "I don't know. I have never had one."),
        )
    )
    t.reply(a, question)
    t.reply(b, answer)
    t.paragraph()
    t.say(
        "They laughed so much that they forgot the next word.",
        f"So they stopped, and {b} fetched some bread.",
    )


def ordering_food(t: Teller) -> None:
    """Two guests order; the waiter mixes it up; they swap."""
    a, b = t.pair()
    dishes = ("soup", "rice", "fish", "bread and cheese", "beans", "noodles", "salad", "eggs")
    dish_a, dish_b = t.sample(dishes, 2)
    waiter = t.helper([WAITER])
    t.say(
        f"{a} and {b} sat down at a round table.", f"{a} and {b} were at the little inn for lunch."
    )
    t.reply(waiter, "What would you like to eat?", "Good day! What can I bring you?")
    t.paragraph()
    t.say(
        f'"{dish_a.capitalize()} for me, please," said {a}.', f'"I would like {dish_a}," said {a}.'
    )
    t.paragraph()
    t.say(f'"And I will have {dish_b}," said {b}.', f'"For me {dish_b}, please," said {b}.')
    t.paragraph()
    if t.chance(0.6):
        t.say(
            f"The waiter came back and gave {a} the {dish_b} and {b} the {dish_a}.",
            f"Soon the waiter put the {dish_b} in front of {a} and the {dish_a} in front of {b}.",
        )
        t.paragraph()
        t.say(f'"I think this is yours," said {a}.', f'"{b}, you have my {dish_a}," said {a}.')
        t.paragraph()
        t.say(
            f"So they swapped. Now {a} had the {dish_a} and {b} had the {dish_b}.",
            f"{a} and {b} swapped their plates, and everyone was happy.",
        )
    else:
        t.say(
            f"The waiter brought {dish_a} for {a} and {dish_b} for {b}.",
            f"Soon {a} had a plate of {dish_a}, and {b} had a plate of {dish_b}.",
        )
        t.paragraph()
        t.say(
            f'"May I try some of your {dish_b}?" asked {a}.', f'"How is your {dish_a}?" asked {b}.'
        )
        t.paragraph()
        t.say(
            '"Of course," was the answer, and they both tried everything.',
            "It was very good, and they ate it all up.",
        )


def why_so_sad(t: Teller) -> None:
    """Somebody is sad for a reason, and the other finds a remedy for that reason."""
    a, b = t.pair()
    thing = t.described(TREASURES)
    reason, remedy, end = t.pick(
        (
            (f"My {thing} is broken.", "I am good at mending things.", f"they mended {thing.the}"),
            (f"I lost my {thing}.", "I will help you to find it.", f"they found {thing.the}"),
            ("Nobody wants to play with me.", "I want to play with you.", "they played until dark"),
            (
                "It is raining, and I wanted to swim.",
                "Let us jump in the puddles.",
                "they jumped in every puddle",
            ),
            (
                "My grandmother has gone home.",
                "Let us write her a letter.",
                "they wrote her a long letter",
            ),
            ("I fell and hurt my knee.", "I will put a bandage on it.", "the knee felt better"),
            ("I can't tie my shoes.", "I will show you how.", "both shoes were tied"),
            ("I dropped my cake in the mud.", "You can have half of mine.", "they shared the cake"),
        )
    )
    _meet(t, a, b)
    t.reply(
        b,
        f"Why are you so sad, {a}?",
        "What is the matter?",
        "You don't look happy. What happened?",
    )
    t.reply(a, reason, f"Oh, {b}. {reason}")
    t.reply(b, f"Don't worry. {remedy}", remedy, f"Is that all? {remedy}")
    t.reply(
        a, "Would you really do that?", "You are a good friend.", "Thank you, that would be lovely."
    )
    t.paragraph()
    t.say(
        f"And so {end}, and {a} smiled again.",
        f"In the end {end}, and {a} was glad.",
        f"Soon {end}. {a} thanked {b} with a big hug.",
    )


def big_plans(t: Teller) -> None:
    """What each wants to be one day, and what they would do together."""
    a, b = t.pair()
    jobs = (
        ("a baker", "bake bread for the whole town"),
        ("a sailor", "sail around the world"),
        ("a doctor", "make sick people well"),
        ("a farmer", "grow the biggest pumpkins"),
        ("a teacher", "teach everyone to read"),
        ("a painter", "paint every wall blue"),
        ("a pilot", "fly above the clouds"),
        ("a singer", "sing in front of a king"),
        ("an inventor", "build a machine that does the dishes"),
        ("a gardener", "plant a thousand trees"),
    )
    (job_a, task_a), (job_b, task_b) = t.sample(jobs, 2)
    _meet(t, a, b)
    t.reply(a, "What do you want to be when you grow up?", "What will you be one day?")
    t.reply(
        b,
        f"I want to be {job_b}. Then I will {task_b}.",
        f"I will be {job_b} and {task_b}. And you?",
    )
    t.reply(a, f"I want to be {job_a}.", f"I will be {job_a} and {task_a}.")
    question, answer = t.pick(
        (
            (f"Why {job_a}?", f"Because I want to {task_a}."),
            (f"And what does {job_a} do?", f"Well, {job_a} can {task_a}."),
            ("Is that hard to learn?", f"Maybe, but then I can {task_a}."),
        )
    )
    t.reply(b, question)
    t.reply(a, answer)
    t.reply(
        b,
        "We could help each other.",
        "But today we are still small.",
        "That sounds like hard work.",
    )
    t.paragraph()
    t.say(
        f"Many years later, {a} was {job_a} and {b} was {job_b}.",
        f"{a} drew a picture of {job_a} and {job_b}, side by side.",
        "Then they went to play, for there was plenty of time.",
    )


def what_can_you_see(t: Teller) -> None:
    """One watches from above and reports; the numbers agree."""
    a, b = t.pair()
    animal, second = t.sample(FARM, 2)
    n, m = t.number(1, 6), t.number(1, 6)
    verb, second_verb = animal.moves[n > 1], second.moves[m > 1]
    there = "is" if n == 1 else "are"
    t.say(
        f"{a} climbed up the tall tree, and {b} stood below.",
        f"{a} looked out of the window. {b} was still in bed.",
        f"{a} stood on the hill with a spyglass, and {b} waited.",
    )
    t.reply(b, "What can you see?", "Do you see anything?")
    t.reply(
        a, f"I can see {animal.noun.count(n)}.", f"There {there} {animal.noun.count(n)} over there."
    )
    t.reply(b, "What else?", "Anything else?")
    t.reply(a, f"I also see {second.noun.count(m)}.", f"Over there I see {second.noun.count(m)}.")
    t.reply(b, "What are they doing?", "And what happens there?")
    t.paragraph()
    doing = f"{animal.noun.count(n)} {verb}, and {second.noun.count(m)} {second_verb}".capitalize()
    t.say(f'"{doing}," said {a}.', f'{a} said, "{doing}."')
    t.reply(b, "I want to see that too!", "Make some room. I am coming!")
    t.paragraph()
    t.say(
        f"Soon both of them were looking at {animal.noun.count(n)} and {second.noun.count(m)}.",
        f"{NUMBERS[n + m].capitalize()} animals in all, they counted.",
    )


DIALOGUES: tuple[Callable[[Teller], None], ...] = (
    where_is_it,
    favourites,
    animal_riddle,
    at_school,
    at_the_market,
    cannot_sleep,
    a_visit,
    who_did_it,
    what_is_your_name,
    opposites_game,
    ordering_food,
    why_so_sad,
    big_plans,
    what_can_you_see,
)
