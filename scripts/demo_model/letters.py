"""Spelling words and counting their letters."""

from __future__ import annotations

from random import Random

from demo_model.chat import Exchange, ask
from demo_model.lexicon import FIRST_NAMES, WORDS, invented_word


def _word(rng: Random) -> tuple[str, tuple[str, ...]]:
    """A word and its keys. Real words are all trained on, invented ones are split."""
    if rng.random() < 0.45:
        return rng.choice(WORDS), ()
    if rng.random() < 0.1:
        return rng.choice(FIRST_NAMES), ()
    word = invented_word(rng)
    return word, (f"letters {word}",)


def _quoted(rng: Random, word: str) -> str:
    return rng.choice((f"'{word}'", f'"{word}"', word))


def spell(rng: Random, brief: bool) -> Exchange:
    word, keys = _word(rng)
    quoted = _quoted(rng, word)
    question = rng.choice(
        (
            f"Spell {quoted}.",
            f"Spell the word {quoted}.",
            f"How do you spell {quoted}?",
            f"Can you spell {quoted}?",
            f"How is {quoted} spelled?",
            f"Please spell {quoted} letter by letter.",
        )
    )
    letters = "-".join(word.lower())
    answer = letters if brief else rng.choice((f"{word} is spelled {letters}.", letters))
    return ask(question, answer, *keys, check="exact")


def count_letters(rng: Random, brief: bool) -> Exchange:
    word, keys = _word(rng)
    quoted = _quoted(rng, word)
    question = rng.choice(
        (
            f"How many letters are in {quoted}?",
            f"How many letters does {quoted} have?",
            f"Count the letters in the word {quoted}.",
            f"How long is the word {quoted}?",
        )
    )
    # Spelling first with a running count: each step is then easy.
    counted = " ".join(f"{letter}{i}" for i, letter in enumerate(word.lower(), 1))
    answer = str(len(word)) if brief else f"{counted}: {word} has {len(word)} letters."
    return ask(question, answer, *keys, check="number")


def count_letter(rng: Random, brief: bool) -> Exchange:
    word, keys = _word(rng)
    letter = rng.choice(word.lower()) if rng.random() < 0.8 else rng.choice("abcdefghiklmnoprstuw")
    quoted = _quoted(rng, word)
    times = word.lower().count(letter)
    question = rng.choice(
        (
            f"How many times does {letter} appear in {quoted}?",
            f"How many {letter}'s are in {quoted}?",
            f"How many times is the letter {letter} in {quoted}?",
            f"Count the letter {letter} in {quoted}.",
            f"How many {letter}s are there in the word {quoted}?",
        )
    )
    if brief:
        return ask(question, str(times), *keys, check="number")
    seen, steps = 0, []
    for each in word.lower():
        seen += each == letter
        steps.append(f"{each}{seen}" if each == letter else each)
    end = "once" if times == 1 else f"{times} times"
    answer = f"{' '.join(steps)}: {letter} appears {end} in {word}."
    return ask(question, answer, *keys, check="exact")


def edges(rng: Random, brief: bool) -> Exchange:
    word, keys = _word(rng)
    which = rng.choice(("first", "last"))
    letter = word[0 if which == "first" else -1].lower()
    question = rng.choice((f"What is the {which} letter of {word}?", f"Which letter is the {which} one in '{word}'?"))
    return ask(question, letter if brief else f"The {which} letter of {word} is {letter}.", *keys, check="exact")


def backwards(rng: Random, brief: bool) -> Exchange:
    word, keys = _word(rng)
    word = word.lower()
    question = rng.choice((f"Write {word} backwards.", f"Reverse the word '{word}'.", f"Spell {word} backwards."))
    answer = "-".join(reversed(word)) if brief else f"{'-'.join(word)} backwards is {'-'.join(reversed(word))}."
    return ask(question, answer, *keys, check="exact")
