"""Short stories from a grammar: who, where, what was lost, who helped, what was learned."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from demo_model.chat import Exchange, assistant, user
from demo_model.lexicon import ADJECTIVES, ANIMALS, COLOURS, FIRST_NAMES, FOODS, JOBS, OBJECTS, PLACES, a, plural

OPENINGS = """Once upon a time, in a {place} {where}, there lived {a_trait} {kind} named {name}.
Long ago, {a_trait} {kind} called {name} lived in a {place} {where}.
There was once {a_trait} {kind} whose name was {name}. {name} lived in a {place} {where}.
In a {place} {where} lived {name}, {a_trait} {kind}.
{name} was {a_trait} {kind} who lived in a {place} {where}.""".split("\n")
WHERE = """by the sea|far away|near a big river|behind seven hills|where the wind never slept|at the end of a long road
under a bright sky|full of old trees|that few people knew|with a tall tower|close to the mountains""".replace(
    "\n", "|"
).split("|")
HABITS = """Every morning {name} got up early and ate {a_food}.|{name} liked to sit by the window and count the clouds.
Everyone knew {name}, because {name} always had a kind word for others.|{name} loved to sing, even when nobody listened.
In the evening {name} told stories to the children.|{name} often went for a walk before the sun came up.
On quiet days {name} baked a {food} cake and shared it.|{name} had a garden full of {foods}.""".replace("\n", "|").split("|")
TREASURES = """Most of all, {name} loved {a_colour} {thing} that had belonged to {name}'s grandmother.
{name}'s dearest thing was {a_colour} {thing}, a present from an old friend.
On a shelf at home {name} kept {a_colour} {thing}, and {name} looked at it every night.
{name} owned only one precious thing: {a_colour} {thing}.""".split("\n")
TROUBLES = """One day, the {colour} {thing} was gone.|But one stormy night, the wind carried the {colour} {thing} away.
One morning, {name} woke up and could not find the {colour} {thing}.
Then, on a cold day in winter, the {colour} {thing} fell into the river.
But one evening, when {name} came home, the {colour} {thing} had disappeared.""".replace("\n", "|").split("|")
FEELINGS = """{name} was very sad and did not know what to do.|"Oh no," cried {name}. "Where can it be?"
{name} sat down and thought for a long time.|At first {name} wanted to cry, but then {name} stood up. "I will find it," said {name}.
{name} looked under the bed, behind the door and in the garden, but there was nothing.""".replace("\n", "|").split("|")
SEARCHES = """{name} walked to the {place2} and asked {a_kind3}, but the {kind3} only shook its head.
First {name} went to the {place2}. There was {a_kind3} asleep in the grass. "I have seen nothing," it said.
{name} looked everywhere in the {place2}, until it was dark.
On the way to the {place2}, {name} met {a_kind3} who was eating {a_food2}. "Ask someone else," said the {kind3}.
{name} climbed to the top of the {place2} and looked around, but saw only clouds.""".split("\n")
MEETINGS = """Then {name} met {helper}, {a_trait2} {kind2}.|At the edge of the {place2} sat {a_trait2} {kind2} called {helper}.
Just then {a_trait2} {kind2} came along the road. Its name was {helper}.
"Can I help you?" asked a voice. It was {helper}, {a_trait2} {kind2}.""".replace("\n", "|").split("|")
OFFERS = """"I have lost my {colour} {thing}," said {name}. "Let us look for it together," said {helper}.
{name} told {helper} about the {colour} {thing}. "I know where it may be," said {helper}. "Follow me."
"Why are you so sad?" asked {helper}. "Because my {colour} {thing} is gone," said {name}. "Then we will find it," said {helper}.
{helper} listened carefully. "Two can see more than one," said {helper}, and they went on together.""".split("\n")
JOURNEYS = """They walked for {days} days, and at night they slept under the stars.|They crossed a bridge and shared {a_food2} on the way.
They asked every {kind3} they met, but nobody knew anything.|It began to rain, so they waited in a cave and told each other jokes.
They followed small tracks through the snow, past the mill and over the hill.
When they were tired, they rested under a tree and ate {foods2}.""".replace("\n", "|").split("|")
FINDS = """At last, in {a_place3}, they saw something {colour}. It was the {thing}!
In {a_place3} they met {a_kind3} who held the {colour} {thing} in its arms. "I found it," said the {kind3}, "and I wanted to give it back."
Behind an old stone in {a_place3} lay the {colour} {thing}, and it was not even broken.
And there, in the middle of {a_place3}, stood the {colour} {thing}, wet but whole.""".split("\n")
THANKS = """{name} laughed and danced. "Thank you, {helper}," said {name}. "Without you I would never have found it."
{name} was so happy that nobody could speak for a while. Then {name} hugged {helper}.
"You are a true friend," said {name}, and gave {helper} {a_food}.
{name} thanked {helper} with all of {name}'s heart, and they went home together.""".split("\n")
ENDS = """From that day on, {name} and {helper} were best friends.|That evening they had a big supper with bread and {foods}.
And if you walk past the {place} today, you can still see the {colour} {thing} in the window.
{name} never lost the {colour} {thing} again.|And they lived happily for many years.""".replace("\n", "|").split("|")
MORALS = """A friend is worth more than any treasure.|Those who ask for help will find it.|Patience opens many doors.
What is shared is never lost.|Kindness always comes back.|Two can do what one can not.""".replace("\n", "|").split("|")


@dataclass(frozen=True, slots=True)
class Plot:
    """What a story is about; the words that its sentences are filled with."""

    words: dict[str, str]
    name: str
    thing: str
    kind: str
    place: str


def plot(rng: Random, **chosen: str) -> Plot:
    """A plot with the ``chosen`` words (name, kind, thing, place, colour) and the rest drawn."""
    name, helper = rng.sample(FIRST_NAMES, 2)
    kind, kind2, kind3 = rng.sample(ANIMALS if rng.random() < 0.7 else JOBS, 3)
    place, place2, place3 = rng.sample(PLACES, 3)
    food, food2 = rng.sample(FOODS, 2)
    trait, trait2 = rng.sample(ADJECTIVES, 2)
    words = {
        "name": name, "helper": helper, "kind": kind, "kind2": kind2, "kind3": rng.choice(ANIMALS), "place": place,
        "place2": place2, "place3": place3, "food": food, "food2": food2, "trait": trait, "trait2": trait2,
        "colour": rng.choice(COLOURS), "thing": rng.choice(OBJECTS), "where": rng.choice(WHERE),
        "days": rng.choice(("two", "three", "four", "five", "seven")),
    } | chosen  # fmt: skip
    for key in ("food", "food2"):
        words[f"{key}s".replace("2s", "s2")] = plural(words[key])
    for key in ("kind", "kind3", "food", "food2", "trait", "trait2", "colour", "place3"):
        words[f"a_{key}"] = a(words[key])
    return Plot(words, words["name"], words["thing"], words["kind"], words["place"])


def tell(rng: Random, plot: Plot, length: int) -> str:
    """The story; length 0 is a few sentences, 1 the usual (about 200 tokens), 2 and up add searches and travels."""
    paragraphs = [[OPENINGS, *([HABITS] * min(length, 2)), TREASURES], [TROUBLES, *([FEELINGS] * (length > 0))]]
    for _ in range(length - 1):
        paragraphs.append([SEARCHES])
    paragraphs.append([MEETINGS, OFFERS])
    for _ in range(max(0, length - 1)):
        paragraphs.append([JOURNEYS, *([JOURNEYS] * (length > 2))])
    paragraphs += [[FINDS, THANKS], [ENDS, *([ENDS] * (length > 1))]]
    used: set[str] = set()
    texts = []
    for paragraph in paragraphs:
        sentences = []
        for choices in paragraph:
            fresh = [s for s in choices if s not in used] or choices
            sentence = rng.choice(fresh)
            used.add(sentence)
            words = plot.words
            if choices is SEARCHES or choices is JOURNEYS:  # another place and another stranger each time
                words = words | {"place2": rng.choice(PLACES), "kind3": (stranger := rng.choice(ANIMALS)), "a_kind3": a(stranger)}
            sentences.append(sentence.format_map(words))
        texts.append(" ".join(sentences))
    if rng.random() < 0.5:
        texts.append(f"The moral: {rng.choice(MORALS)}")
    return ("\n\n" if length else " ").join(texts)


def story(rng: Random, brief: bool) -> Exchange:
    length = 0 if brief else rng.choices((0, 1, 2, 3, 4), (1, 4, 4, 2, 1))[0]
    size = ("very short ", rng.choice(("", "short ", "little ")), "", "long ", "very long ")[length]
    form = rng.randrange(6)
    if form == 0:
        subject, p = "", plot(rng)
    elif form == 1:
        kind = rng.choice(ANIMALS + JOBS)
        subject, p = f" about {a(kind)}", plot(rng, kind=kind)
    elif form == 2:
        kind, thing = rng.choice(ANIMALS), rng.choice(OBJECTS)
        subject, p = f" about {a(kind)} and {a(thing)}", plot(rng, kind=kind, thing=thing)
    elif form == 3:
        name, kind = rng.choice(FIRST_NAMES), rng.choice(ANIMALS + JOBS)
        subject, p = f" about {a(kind)} named {name}", plot(rng, name=name, kind=kind)
    elif form == 4:
        place, kind = rng.choice(PLACES), rng.choice(ANIMALS)
        subject, p = f" about {a(kind)} in a {place}", plot(rng, kind=kind, place=place)
    else:
        colour, thing = rng.choice(COLOURS), rng.choice(OBJECTS)
        subject, p = f" about {a(colour)} {thing}", plot(rng, colour=colour, thing=thing)
    while p.words["helper"] == p.name:
        p.words["helper"] = rng.choice(FIRST_NAMES)
    asked = rng.choice(
        ("Tell me a {}story{}.", "Write a {}story{}.", "Can you tell me a {}story{}?", "I want to hear a {}story{}.",
         "Please write a {}story{}.", "tell me a {}story{}", "Give me a {}story{}.", "Make up a {}story{}.")
    ).format(size, subject)  # fmt: skip
    return Exchange((user(asked), assistant(tell(rng, p, length))), (), "")
