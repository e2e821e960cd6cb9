"""What is lost, lent, given, made or swapped, and who has it in the end."""

from __future__ import annotations

from i3lm.data.corpora.teller import Teller
from i3lm.data.corpora.words import (
    BREAKABLES,
    DAYS,
    FOODS,
    INDOORS,
    NUMBERS,
    OUTDOORS,
    PLACES,
    SMALL_THINGS,
    TREASURES,
    Noun,
    was,
    with_article,
)


def lost_and_found(t: Teller) -> None:
    """Something dear is lost, looked for in two places, and found in a third."""
    a, b = t.pair()
    thing = t.described(TREASURES)
    first, second, third = t.sample(INDOORS, 3)
    t.open(a)
    t.say(
        f"Of all the things {a.he} had, {a.he} loved {a.his} {thing} best.",
        f"{a}'s dearest thing was {thing.a}.",
        f"{a.He} never went anywhere without {a.his} {thing}.",
        f"{a.He} had {thing.a} and kept it close, even at night.",
    )
    t.paragraph()
    time = t.time()
    t.say(
        f"{time}, {thing.the} was gone.",
        f"But {time}, {a} could not find {thing.the} anywhere.",
        f"{time}, {a} woke up, and {thing.the} was not there.",
    )
    t.say(
        f"{a.He} looked {first}. It was not there.",
        f"{a} looked {first}, but found only dust.",
        f"{first}, {a.he} found one old sock, but no {thing.short}.",
    )
    t.say(
        f"Then {a.he} looked {second}. It was not there either.",
        f"{a.He} looked {second} as well, but found nothing.",
        f"{second}, there was only a sleepy spider.",
    )
    t.paragraph()
    t.speak(b, "What are you looking for?", "Why do you look so worried?", "What is wrong?")
    t.speak(
        a,
        f"My {thing} is lost.",
        f"I am looking for my {thing}. I have looked {first} and {second}.",
        f"I can't find my {thing}!",
    )
    t.speak(
        b, "Two can look better than one.", "Let us look together.", "Don't cry. I will help you."
    )
    t.say(
        f"{b} looked {third}, and there it was!",
        f"So the two friends looked {third}, and there lay {thing.the}.",
        f"At last {b} thought of one more place. {thing.the.capitalize()} was {third}!",
    )
    t.paragraph()
    t.say(
        f"{a} hugged {b} and held {thing.the} tight.",
        f"{a} was so happy that {a.he} danced around the room.",
        f'"Thank you, {b}," said {a}, and {a.he} put {thing.the} back where it belonged.',
    )
    t.maybe(
        f"After that, {a} always put the {thing} in the same place.",
        "A thing is soon found when a friend helps to look.",
        f"From then on, nothing was ever lost {third} again.",
        "What is lost is often nearer than we think.",
    )


def sharing(t: Teller) -> None:
    """Somebody gives part of what they have; the count stays right to the end."""
    a, b = t.pair()
    food, place = t.pick(FOODS), t.pick(PLACES)
    total = t.number(3, 10)
    given = t.number(1, total - 1)
    left = total - given
    t.open(a)
    time = t.time()
    t.say(
        f"{time}, {a} went {place.to} with {food.count(total)} in a basket.",
        f"{time}, {a.he} filled a basket with {food.count(total)} and walked {place.to}.",
        f"{time}, {a} sat down {place.at}. In {a.his} basket there were {food.count(total)}.",
    )
    t.paragraph()
    t.say(
        f"There {a.he} met {b.full}, who looked very hungry.",
        f"Soon {b.full} came along. {b.His} stomach was growling.",
        f"{b.full} was there too, but {b.his} lunch bag was empty.",
    )
    t.speak(
        b,
        f"Your {food.many} smell so good.",
        "I forgot my lunch.",
        "I have had nothing to eat today.",
    )
    t.maybe(
        f"{a} looked at {a.his} {NUMBERS[total]} {food.many} and thought for a moment.",
        f"At first {a} wanted to keep them all.",
        f"{a} felt a little tug in {a.his} heart.",
    )
    t.speak(
        a,
        f"Here, take {NUMBERS[given]} of mine.",
        f"I have {food.count(total)}. You may have {NUMBERS[given]}.",
        "Sit down and eat with me.",
    )
    t.say(
        f"{a.He} gave {b} {food.count(given)}.",
        f"Then {a.he} handed {b} {food.count(given)}.",
        f"So {b} got {food.count(given)} from {a}.",
    )
    t.say(
        f"Now {a} had {food.count(left)} left.",
        f"That left {food.count(left)} for {a}.",
        f"{food.count(left)} {was(left)} still in the basket.",
    )
    t.paragraph()
    t.say(
        f"They ate and talked until the sun went down {place.at}.",
        f"The two of them ate {place.at} and watched the clouds.",
        f"{b} ate every crumb and smiled from ear to ear.",
    )
    back = t.described(SMALL_THINGS)
    t.maybe(
        f"The next day, {b} gave {a} {back.a} to say thank you.",
        f"A week later, {b} brought {a} {back.a}, and {a} kept it for years.",
    )
    t.say(
        f"The {food.many} tasted better because they were shared.",
        "Half a lunch with a friend is better than a whole one alone.",
        f"{a} went home with fewer {food.many} and one more friend.",
        f"{a} had less to eat that day, and yet {a.he} felt full.",
    )


def birthday_gift(t: Teller) -> None:
    """A gift is made in secret, given, and remembered."""
    a, b = t.pair()
    gift, colour_of_paper = t.described(TREASURES), t.pick(("red", "blue", "green", "silver"))
    day = t.pick(DAYS)
    t.open(a)
    t.say(
        f"{a.His} best friend was {b.full}.",
        f"{b.full} was {a.his} best friend.",
        f"Next door lived {a.his} friend {b}.",
    )
    t.say(
        f"{b}'s birthday was on {day}, and {a} wanted to give {b.him} something special.",
        f"On {day} {b} would have a birthday, but {a} had no money for a gift.",
        f'"It will be my birthday on {day}," {b} told {a}.',
    )
    t.paragraph()
    t.speak(
        a, f"I will make {gift.a}!", f"I know! {b} would love {gift.a}.", f"What about {gift.a}?"
    )
    t.say(
        f"{a.He} worked on it every evening and told nobody.",
        f"For three days {a.he} cut and glued and painted.",
        f"It was hard work, and {a} did it all by {a.himself}.",
        f"{a.He} made it by {a.himself}, and it took a long time.",
    )
    t.maybe(
        f"Once {b} almost saw it, but {a} hid it {t.pick(INDOORS)} just in time.",
        f'"What are you doing in there?" asked {b}. "Oh, nothing," said {a}.',
        "One corner was crooked, but that only made it look more friendly.",
    )
    t.say(
        f"Then {a.he} wrapped {gift.the} in {colour_of_paper} paper.",
        f"When it was done, {a.he} put it in a box with {colour_of_paper} paper.",
    )
    t.paragraph()
    t.say(
        f"When {day} came, {a} gave {b} the present.",
        f"On {day}, {a} knocked at {b}'s door with the present.",
        f"At last it was {day}. There was cake, there was music, and there was one present.",
    )
    t.say(
        f"{b} tore the {colour_of_paper} paper, and {b.his} eyes grew wide.",
        f"{b} took off the {colour_of_paper} paper very slowly.",
        f"Under the {colour_of_paper} paper {b} found {gift.a}.",
    )
    t.speak(
        b,
        "Did you make this for me?",
        "It is just what I wanted!",
        "Nobody else has one like this!",
    )
    t.say(
        f"{b.He} liked the gift so much that {b.he} showed it to everyone.",
        f"{b.He} kept {gift.the} for a long, long time and never forgot who made it.",
        f"{a} saw {b.his} smile, and that was the best gift of all.",
        f"Even today {gift.the} from {a} is in {b}'s room.",
    )


def broken_thing(t: Teller) -> None:
    """Something borrowed is broken, the truth is told, and the thing is mended."""
    a, b = t.pair()
    thing, place = t.described(BREAKABLES), t.pick(PLACES)
    t.say(
        f"{b.full} had {thing.a}, and {b.he_was} very proud of it.",
        f"{b.full} owned {thing.a} that everybody admired.",
        f"For {b.his} birthday, {b.full} had got {thing.a}.",
    )
    t.say(
        f"One day {a.full} came to visit.",
        f"{t.time()}, {a.full} saw it.",
        f"{a.full} had always wanted one.",
    )
    t.speak(a, f"May I borrow your {thing.short}?", f"Could I take your {thing.short} for a day?")
    t.speak(
        b,
        "Yes, but please be careful.",
        "Of course you may.",
        "Yes, if you bring it back tomorrow.",
    )
    t.paragraph()
    t.say(
        f"{a} carried {thing.the} {place.to}.",
        f"So {a} took {thing.the} and ran {place.to}.",
    )
    t.say(
        f"But {place.at} {a.he} tripped over a root, and {thing.the} broke.",
        f"There {a.he_was} not careful, and {thing.the} fell and broke.",
        f"{a.He} slipped in the mud. Crack! {thing.the.capitalize()} was broken.",
    )
    t.say(
        f"{a}'s face turned red. What would {b} say?",
        f"{a} sat down and did not know what to do.",
        f"{a} felt a cold stone in {a.his} stomach.",
    )
    t.maybe(
        f'"I could hide it {t.pick(OUTDOORS)}," thought {a}. But that did not feel right.',
        f"For a moment {a} wanted to say that the wind had done it.",
        f"{a} thought of running away, but {a.his} feet went straight to {b}'s house.",
    )
    t.paragraph()
    t.speak(
        a,
        f"I broke your {thing.short}, and I am sorry.",
        f"I must tell you something. Your {thing.short} broke, and it was my fault.",
        f"I was not careful with your {thing.short}. I am very sorry.",
    )
    t.say(
        f"{b} was quiet for a while.",
        f"{b} looked at the pieces and sighed.",
        f"{b} was sad at first, but {b.he_was} not angry.",
    )
    t.speak(
        b,
        "Thank you for telling me the truth.",
        "Things can be mended.",
        "I once broke something too. Let us mend it.",
    )
    t.say(
        f"They fetched some glue and string and mended {thing.the} together.",
        f"All afternoon the two friends worked, and by evening {thing.the} was whole again.",
        f"{a} held the pieces, and {b} tied them with string.",
    )
    t.say(
        f"It was not as pretty as before, but {b} liked it even more.",
        "The truth is sometimes heavy, but a lie is heavier.",
        f"The {thing} had a crack, and the friendship had none.",
        "A friend who tells the truth is worth more than any treasure.",
    )


def pocket_treasure(t: Teller) -> None:
    """A small thing picked up in the morning saves the evening."""
    a, b = t.pair()
    item, trouble, rescue = t.pick(
        (
            (
                "a piece of string",
                "{b}'s boat had come loose and was floating away",
                "{a} tied the string to a stone, threw it into the boat and pulled it back",
            ),
            (
                "a silver button",
                "{b} was cold, because a button was missing from {his} coat",
                "{a} sewed the silver button on, and the coat was warm again",
            ),
            (
                "a tin whistle",
                "{b} was lost in the fog and could not see the way home",
                "{a} blew the tin whistle until {b} heard it and followed the sound",
            ),
            (
                "a rusty key",
                "{b} stood in front of a locked gate and could not get out",
                "{a} tried the rusty key. It turned with a squeak, and the gate swung open",
            ),
            (
                "a long feather",
                "{b} could not write {his} letter, because {his} pen was broken",
                "{a} made a new pen from the long feather, and {b} finished the letter",
            ),
            (
                "a small mirror",
                "{b} was stuck on the other shore and nobody could hear {him} call",
                "{a} caught the sun in the small mirror and made it flash until a boat came",
            ),
            (
                "a wooden peg",
                "the wheel had come off {b}'s cart in the middle of the road",
                "{a} pushed the wooden peg through the hole, and the wheel held",
            ),
            (
                "a little bell",
                "{b}'s goat was hiding in the high corn and nobody could find it",
                "{a} rang the little bell, and the goat came running, for it loved bells",
            ),
        )
    )
    words = {"a": a, "b": b, "his": b.his, "him": b.him}
    trouble, rescue = trouble.format(**words), rescue.format(**words)
    short = item.partition(" ")[2]
    place, spot = t.pick(PLACES), t.pick(OUTDOORS)
    t.open(a)
    time = t.time()
    t.say(
        f"{time}, {a.he} found {item} {spot}.",
        f"{time}, {a} saw {item} {spot} and picked it up.",
        f"{spot}, {a} found {item}.",
    )
    t.say(
        f'"What do you want with that old thing?" asked {a.his} brother.',
        "Everybody laughed and shook their heads.",
        f'"That is good for nothing," said {a.his} aunt.',
        f"{a.His} friends said that it was useless.",
    )
    t.say(
        f'"You never know," said {a}, and {a.he} put the {short} in {a.his} pocket.',
        f"But {a} kept the {short} in {a.his} pocket all day.",
        f"{a} thanked the ground politely and put the {short} in {a.his} pocket.",
    )
    t.paragraph()
    t.maybe(
        f"Then {a.he} went {place.to} to play.",
        f"All afternoon {a.he} played {place.at} and forgot about it.",
        f"After lunch {a.he} helped to carry wood, and then {a.he} rested {place.at}.",
    )
    t.say(
        f"In the evening {a} saw {b.full}. Poor {b}! {trouble[0].upper()}{trouble[1:]}.",
        f"Later {b.full} was near tears. {trouble[0].upper()}{trouble[1:]}.",
        f"On the way home {a} heard {b.full} call. {trouble[0].upper()}{trouble[1:]}.",
    )
    t.speak(b, "Can anybody help me?", "What shall I do now?", "Help!")
    t.say(
        f"{a} reached into {a.his} pocket.",
        f"Then {a} remembered the {short}.",
        f'"Wait," said {a}. "I have just the thing."',
    )
    t.say(f"{rescue}.")
    t.paragraph()
    t.speak(
        b,
        "How lucky that you had it with you!",
        f"Who would have thought that {item} could help so much?",
        f"Thank you, {a}.",
    )
    t.say(
        f"From that day on, nobody laughed at the things in {a}'s pocket.",
        "Small things can do great good.",
        f'{a} only smiled and said, "You never know."',
        f"And the {short}? {a} kept it, of course.",
    )


# how it is made, in two tenses; the dish; the helper's share; what may be missing
_DISHES = (
    ("bake", "baked", "cake", "the biggest piece", "butter milk flour honey sugar"),
    ("bake", "baked", "loaf of bread", "the biggest slice", "salt flour milk"),
    ("bake", "baked", "plum pie", "the biggest piece", "butter flour honey sugar"),
    ("bake", "baked", "tray of biscuits", "one whole plate", "butter flour honey sugar"),
    ("cook", "cooked", "pot of soup", "one warm bowl", "salt pepper butter milk"),
    ("cook", "cooked", "pot of porridge", "one warm bowl", "salt honey butter milk"),
)


def missing_ingredient(t: Teller) -> None:
    """Something is to be baked, something is missing, and neighbours help."""
    a, b = t.pair()
    verb, made, dish, portion, missing = t.pick(_DISHES)
    missing = t.pick(missing.split())
    helper = t.helper()
    t.open(a)
    time = t.time()
    t.say(
        f"{time}, {a.he} wanted to {verb} a {dish} for {b.full}.",
        f"{time}, {a} decided to {verb} a {dish}, because {b.full} was coming to visit.",
    )
    t.say(
        f"{a.He} put a clean bowl on the table and looked on the shelf.",
        f"{a.He} washed {a.his} hands and put on an apron.",
        f"{a.He} read the recipe three times.",
    )
    t.say(
        f"Everything was there except the {missing}.",
        f"Oh dear! There was no {missing}.",
        f"But the jar for the {missing} was empty.",
    )
    t.paragraph()
    t.say(
        f"So {a.he} went to ask {helper}.",
        f"{a} ran down the road and knocked at {helper}'s door.",
        f"On the corner {a} met {helper}.",
    )
    t.speak(a, f"Could you lend me some {missing}?", f"Do you have a little {missing}, please?")
    price = t.pick(
        (
            ("sweep my floor", "swept the floor"),
            ("feed my hens", "fed the hens"),
            ("carry this basket", "carried the basket"),
            ("sing me a song", "sang a merry song"),
            ("find my glasses", f"found the glasses on {helper}'s own nose"),
        )
    )
    t.speak(
        helper,
        f"Yes, if you {price[0]}.",
        f"First you must {price[0]}.",
        f"I will give you {missing} if you {price[0]}.",
    )
    t.say(f"So {a} {price[1]}.", f"{a} {price[1]} at once.", f"That was easy. {a} {price[1]}.")
    t.say(
        f"Then {helper} gave {a.him} the {missing}.",
        f"In return, {a} got the {missing}.",
        f"{helper} kept the promise and gave {a} the {missing}.",
    )
    t.paragraph()
    t.say(
        f"Back at home, {a} {made} the {dish}, and the whole house smelled wonderful.",
        f"{a} stirred and tasted and hummed until the {dish} was ready.",
        f"Soon the {dish} stood on the table, hot and steaming.",
    )
    t.say(
        f"{b} came at six and asked for more, twice.",
        f"{b} took one bite and closed {b.his} eyes.",
        f"{b} was so hungry that {b.he} forgot to say hello.",
    )
    t.say(
        f"And {portion} was for {helper}.",
        f'"What is the secret?" asked {b}. "Good neighbours," said {a}.',
        f"{a} never forgot to buy {missing} again.",
        "A good neighbour is the best thing in any kitchen.",
    )


def chain_of_swaps(t: Teller) -> None:
    """Things change hands twice, and everybody has what they need."""
    a, b, c = t.trio()
    have, middle, wish = (t.described([noun]) for noun in t.sample(TREASURES, 3))
    t.say(
        f"{a.full} had {have.a}, but {a.he} dreamed of {wish.a}.",
        f"{a.full} wanted {wish.a} more than anything, but all {a.he} had was {have.a}.",
        f"All that {a.full} owned was {have.a}. What {a.he} wished for was {wish.a}.",
    )
    t.say(
        f'"I will go and look for one," {a.he} said, and off {a.he} went.',
        f"So, {t.time()}, {a.he} took {have.the} and went out into the world.",
    )
    t.paragraph()
    t.say(
        f"First {a} met {b.full}, who carried {middle.a}.",
        f"On the road {a} met {b.full} with {middle.a}.",
    )
    t.speak(
        b,
        f"What a fine {have.short}! Will you trade it for my {middle.short}?",
        f"I need {with_article(have.short)}. Would you take my {middle.short} for yours?",
    )
    t.say(
        f"{a} gave {b} {have.the}, and {b} gave {a} {middle.the}.",
        f"So {b} got {have.the}, and {a} got {middle.the}.",
    )
    t.paragraph()
    t.say(
        f"Next {a} came to {c.full}, who had {wish.a}!",
        f"A little later {a} saw {c.full}. And what did {c} have? {wish.a.capitalize()}!",
    )
    t.speak(
        a,
        f"Would you trade your {wish.short} for {middle.a}?",
        f"I will give you my {middle.short} for your {wish.short}.",
    )
    t.speak(
        c,
        f"Gladly! I have always needed {with_article(middle.short)}.",
        f"Yes, for my own {middle.short} is worn out.",
    )
    t.say(
        f"{c} took {middle.the} and gave {a} {wish.the}.",
        f"So {c} got {middle.the}, and {a} got {wish.the}.",
    )
    t.paragraph()
    t.say(
        f"Now {b} had {have.the}, {c} had {middle.the}, and {a} had {wish.the}.",
        f"In the end {a} had the {wish}, {b} had the {have}, and {c} had the {middle}.",
    )
    t.say(
        "All three were happy.",
        f"{a} went home singing.",
        "What one does not need may be another one's dream.",
        "A fair trade leaves everybody smiling.",
        f"That night {a} put {wish.the} beside {a.his} bed.",
    )


def wrong_letter(t: Teller) -> None:
    """A letter reaches the wrong house and makes a friendship on its way."""
    a, b, c = t.trio()
    day, other_day = t.sample(DAYS, 2)
    place = t.pick(PLACES)
    gift = t.described(TREASURES)
    t.open(a)
    time = t.time()
    t.say(
        f"{time}, {a.he} wrote a letter to {b.full}.",
        f"{time}, {a} sat down and wrote to {b.full}, who lived far away.",
    )
    t.say(
        f'It said, "Dear {b}, meet me {place.at} on {day}. Bring your {gift}. Yours, {a}."',
        f'"Dear {b}," it said, "come {place.to} on {day} with your {gift}. Love, {a}."',
    )
    t.paragraph()
    t.say(
        f"But the wind took the letter and dropped it at the house of {c.full}.",
        f"The postman had lost his glasses, and he brought the letter to {c.full}.",
        f"The letter fell out of the bag, and {c.full} found it on the road.",
    )
    t.say(
        f"{c} read the name and shook {c.his} head.",
        f"{c} turned it over twice.",
        f"{c} had never got a letter before.",
    )
    t.speak(c, f"This is not for me. It is for {b}.", f"But my name is not {b}!", f"Who is {b}?")
    t.say(
        f"So {c} walked for a whole day and brought it to the right door.",
        f"{c} put on {c.his} boots and carried the letter to {b}, over two hills.",
    )
    t.speak(b, "You came all this way for me?", f"How kind of you! Will you come along on {day}?")
    t.paragraph()
    t.say(
        f"On {day}, {a} waited {place.at}.",
        f"{day} came, and {a} stood {place.at} and looked down the road.",
    )
    t.say(
        f"{a} had asked for one friend, and two came: {b} with the {gift}, and {c} with a cake.",
        f"There came {b} with the {gift}, and who was that? It was {c}!",
    )
    t.say(
        "Some letters have to get lost to find the right place.",
        "From then on, all letters were sent to three.",
        f"And on {other_day} {c} got a letter too, the first one with {c.his} own name on it.",
        f"{a} thanked {c}, and the three of them stayed {place.at} until dark.",
    )


def found_purse(t: Teller) -> None:
    """Coins are found, three people are asked, and the owner knows the number."""
    a, b = t.pair()
    helper = t.helper()
    coins, reward = t.number(4, 15), t.number(1, 3)
    colour = t.pick(("red", "brown", "green", "blue", "black"))
    spot = t.pick(OUTDOORS)
    left = coins - reward
    t.open(a)
    time = t.time()
    t.say(
        f"{time}, {a.he} found a {colour} purse {spot}.",
        f"{time}, {a} and {b.full} saw something lying {spot}. It was a {colour} purse.",
    )
    t.say(
        f"There were {NUMBERS[coins]} coins in it.",
        f"{a} counted the coins in it. There were {NUMBERS[coins]}.",
    )
    t.say(
        f"{a} thought of all the cakes {a.he} could buy.",
        f"Nobody had seen {a.him}. {a} could have kept it.",
        f"{a} had never had so much money.",
    )
    t.speak(
        b,
        "Somebody must be looking for it.",
        "To whom does it belong?",
        "What will you do with it?",
    )
    t.paragraph()
    t.say(
        f'So they went from door to door. "Have you lost a purse?" asked {a}.',
        f'{a} asked everybody, "Have you lost a purse?"',
    )
    t.say(
        '"Yes, a yellow one," said a man in a tall hat. But that was not true.',
        '"Yes, with a hundred coins in it," said a man with a long beard. But that was wrong.',
        '"No," said a woman with a wide hat, "but I wish I had one to lose."',
    )
    t.say(
        f"Then came {helper}, who looked very sad.",
        f"At the last house lived {helper}.",
    )
    t.speak(
        helper,
        f"I lost a {colour} purse with {NUMBERS[coins]} coins.",
        f"My purse is {colour}, and there were {NUMBERS[coins]} coins in it.",
    )
    t.say(
        f"{a} gave {helper} the purse.",
        f'"Then it is yours," said {a}.',
        "So it was the right one!",
    )
    t.paragraph()
    coin = Noun("coin", "coins")
    t.say(
        f"{helper} was so glad that {a} got {coin.count(reward)}. That left {NUMBERS[left]}.",
        f"{helper} took out {coin.count(reward)} for {a}, and {NUMBERS[left]} {was(left)} left.",
    )
    t.say(
        f"{a} bought two buns, one for {b} and one for {a.himself}.",
        f"On the way home {a} felt as light as a feather.",
        "An honest heart is the best purse of all.",
        f'"I am prouder of you than of any treasure," said {a}\'s grandmother.',
    )
