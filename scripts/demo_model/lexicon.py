"""Words that the generated text is made of."""

from __future__ import annotations

import tomllib
from pathlib import Path
from random import Random
from typing import Any


def _read(name: str) -> dict[str, Any]:
    return tomllib.loads(Path(__file__).with_name(name).read_text())


_words: dict[str, Any] = {
    name: value.split() if isinstance(value, str) else value for name, value in _read("words.toml").items()
}
PHRASES = _read("phrases.toml")  # by the module that fills them

FIRST_NAMES: list[str] = _words["first_names"]
LAST_NAMES: list[str] = _words["last_names"]
CAPITALS: dict[str, str] = _words["capitals"]
CITIES: list[str] = [*CAPITALS.values(), *_words["cities"]]
JOBS: list[str] = _words["jobs"]
ANIMALS: list[str] = _words["animals"]
CREATURES: list[str] = _words["creatures"]
OBJECTS: list[str] = _words["objects"]
FOODS: list[str] = _words["foods"]
COLOURS: list[str] = _words["colours"]
PLACES: list[str] = _words["places"]
ADJECTIVES: list[str] = _words["adjectives"]
PRODUCTS: list[str] = _words["products"]
TOPICS: list[str] = _words["topics"]
OPPOSITES: dict[str, str] = _words["opposites"]
DAYS: list[str] = _words["days"]
MONTHS: list[str] = _words["months"]
NUMBER_WORDS: list[str] = _words["number_words"]
_ONSETS: list[str] = _words["syllable_onsets"]
_VOWELS: list[str] = _words["syllable_vowels"]
_CODAS = ["", "", "", "", "n", "r", "l", "s", "t", "m", "d", "ck", "ng", "nd", "st", "x"]

_COMMON = (JOBS, ANIMALS, CREATURES, OBJECTS, FOODS, COLOURS, PLACES, ADJECTIVES, PRODUCTS, _words["other_words"])
WORDS = sorted({word.lower() for words in _COMMON for word in words})


def invented_word(rng: Random, most_syllables: int = 4) -> str:
    """A word that nobody has seen, such as "trandelo": what can't be memorised has to be read."""
    return "".join(
        rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(rng.randint(2, most_syllables))
    )


def first_name(rng: Random) -> str:
    return rng.choice(FIRST_NAMES) if rng.random() < 0.75 else invented_word(rng, 3).capitalize()


def last_name(rng: Random) -> str:
    return rng.choice(LAST_NAMES) if rng.random() < 0.75 else invented_word(rng, 3).capitalize()


def full_name(rng: Random) -> str:
    return f"{first_name(rng)} {last_name(rng)}"


def city(rng: Random) -> str:
    return rng.choice(CITIES) if rng.random() < 0.75 else invented_word(rng, 3).capitalize()


def plural(noun: str) -> str:
    """English plural of a regular noun of the lists above, and of the irregular ones in them."""
    irregular = {"mouse": "mice", "goose": "geese", "sheep": "sheep", "deer": "deer", "wolf": "wolves"}
    if noun in irregular:
        return irregular[noun]
    if noun.endswith(("s", "x", "ch", "sh")) or noun in ("potato", "tomato"):
        return noun + "es"
    if noun == "child":
        return "children"
    if noun in ("man", "woman"):
        return noun[:-2] + "en"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


def a(noun: str) -> str:
    """The noun with its indefinite article."""
    return ("an " if noun[0] in "aeiou" or noun == "honest" else "a ") + noun


def listed(words: list[str]) -> str:
    """One, two and three."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
