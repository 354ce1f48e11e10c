"""Short stories from a grammar: who, where, what was lost, who helped, what was learned."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from demo_model.chat import Exchange, assistant, user
from demo_model.lexicon import (
    ADJECTIVES,
    ANIMALS,
    COLOURS,
    CREATURES,
    FIRST_NAMES,
    FOODS,
    JOBS,
    OBJECTS,
    PHRASES,
    PLACES,
    a,
    first_name,
    invented_word,
    plural,
)

_phrases: dict[str, list[str]] = PHRASES["stories"]
OPENINGS = _phrases["openings"]
WHERE = _phrases["where"]
HABITS = _phrases["habits"]
TREASURES = _phrases["treasures"]
TROUBLES = _phrases["troubles"]
FEELINGS = _phrases["feelings"]
SEARCHES = _phrases["searches"]
MEETINGS = _phrases["meetings"]
OFFERS = _phrases["offers"]
JOURNEYS = _phrases["journeys"]
FINDS = _phrases["finds"]
THANKS = _phrases["thanks"]
ENDS = _phrases["ends"]
MORALS = _phrases["morals"]


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
    kind, kind2 = rng.sample(_kinds(rng), 2)
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
    for key in ("kind", "kind2", "kind3", "food", "food2", "trait", "trait2", "colour", "place", "place3"):
        words[f"a_{key}"] = a(words[key])
    return Plot(words, words["name"], words["thing"], words["kind"], words["place"])


def _elsewhere(rng: Random) -> dict[str, str]:
    place, stranger = rng.choice(PLACES), rng.choice(ANIMALS)
    return {"place2": place, "kind3": stranger, "a_kind3": a(stranger)}


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
                words = words | _elsewhere(rng)
            sentences.append(sentence.format_map(words))
        texts.append(" ".join(sentences))
    if rng.random() < 0.5:
        texts.append(f"The moral: {rng.choice(MORALS)}")
    return ("\n\n" if length else " ").join(texts)


def _kinds(rng: Random) -> list[str]:
    """Who can be in a story; now and then somebody that nobody has heard of."""
    return rng.choices((ANIMALS, JOBS, CREATURES, [invented_word(rng) for _ in range(3)]), (50, 20, 20, 10))[0]


def story(rng: Random, brief: bool) -> Exchange:
    length = 0 if brief else rng.choices((0, 1, 2, 3, 4), (2, 5, 6, 4, 2))[0]
    size = ("very short ", rng.choice(("", "short ", "little ")), "", "long ", "very long ")[length]
    form = rng.randrange(8)
    if form == 0:
        subject, p = "", plot(rng)
    elif form == 1:
        kind = rng.choice(_kinds(rng))
        subject, p = f" about {a(kind)}", plot(rng, kind=kind)
    elif form == 2:
        kind, thing = rng.choice(_kinds(rng)), rng.choice(OBJECTS)
        subject, p = f" about {a(kind)} and {a(thing)}", plot(rng, kind=kind, thing=thing)
    elif form == 3:
        name, kind = first_name(rng), rng.choice(_kinds(rng))
        subject, p = f" about {a(kind)} named {name}", plot(rng, name=name, kind=kind)
    elif form == 4:
        place, kind = rng.choice(PLACES), rng.choice(_kinds(rng))
        subject, p = f" about {a(kind)} in {a(place)}", plot(rng, kind=kind, place=place)
    elif form == 5:
        kind, kind2 = rng.choice(_kinds(rng)), rng.choice(_kinds(rng))
        subject, p = f" about {a(kind)} and {a(kind2)}", plot(rng, kind=kind, kind2=kind2)
    elif form == 6:
        name = first_name(rng)
        subject, p = f" about {name}", plot(rng, name=name)
    else:
        colour, thing = rng.choice(COLOURS), rng.choice(OBJECTS)
        subject, p = f" about {a(colour)} {thing}", plot(rng, colour=colour, thing=thing)
    while p.words["helper"] == p.name:  # a chosen name may be the helper's
        p.words["helper"] = rng.choice(FIRST_NAMES)
    asked = rng.choice(
        ("Tell me a {}story{}.", "Write a {}story{}.", "Can you tell me a {}story{}?", "I want to hear a {}story{}.",
         "Please write a {}story{}.", "tell me a {}story{}", "Give me a {}story{}.", "Make up a {}story{}.")
    ).format(size, subject)  # fmt: skip
    return Exchange((user(asked), assistant(tell(rng, p, length))), (), "")
