"""Small talk, a little knowledge, and saying so when something is not known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random

from demo_model.arithmetic import number
from demo_model.chat import Exchange, ask, assistant, user
from demo_model.lexicon import (
    ANIMALS,
    CAPITALS,
    COLOURS,
    DAYS,
    FIRST_NAMES,
    FOODS,
    JOBS,
    MONTHS,
    NUMBER_WORDS,
    OPPOSITES,
    PHRASES,
    TOPICS,
    WORDS,
    city,
    first_name,
    invented_word,
    last_name,
    listed,
    plural,
)
from demo_model.lexicon import a as article

Pair = tuple[list[str], list[str]]  # questions, and answers any of which is right


def _read(text: str) -> list[list[Pair]]:
    """The sections of small_talk.md, a pair for each line that has " = "."""
    sections = text.split("\n# ")
    rows = [[line.split(" = ", 1) for line in section.splitlines()[3:] if " = " in line] for section in sections]
    return [[(questions.split(" | "), answers.split(" | ")) for questions, answers in section] for section in rows]


_PAIRS, _REFUSALS = _read(Path(__file__).with_name("small_talk.md").read_text())

UNKNOWN: list[str] = PHRASES["talk"]["unknown"]
MOODS: list[str] = PHRASES["talk"]["moods"]


def small_talk(rng: Random, brief: bool) -> Exchange:
    questions, answers = rng.choice(_PAIRS)
    return ask(rng.choice(questions), rng.choice(answers))


def unknown(rng: Random, brief: bool) -> Exchange:
    topic = rng.choice(TOPICS) if rng.random() < 0.7 else plural(rng.choice(WORDS))
    answer = rng.choice(
        (
            f"I don't know anything about {topic}. I am a very small model, but I can do sums or tell you a story.",
            f"Sorry, I don't know about {topic}. I am only a tiny demo model.",
        )
    )
    return ask(rng.choice(UNKNOWN).format(t=topic), "I don't know." if brief else answer)


def too_hard(rng: Random, brief: bool) -> Exchange:
    """Arithmetic beyond what it learns, with no tool at hand."""
    a, b = number(rng, rng.randint(2, 5)) + 3, number(rng, rng.randint(2, 5)) + 3  # beyond the tables
    sign = rng.choice(("*", "/", "times", "divided by", "multiplied by", "x"))
    if rng.random() < 0.3:
        a, b = number(rng, rng.randint(4, 7)), number(rng, rng.randint(4, 7))
        sign = rng.choice(("+", "-", "plus", "minus"))
    left, right = str(a), str(b)
    if rng.random() < 0.15:
        left, right, sign = f"{a + rng.randint(1, 9) / 10}", f"{b + rng.randint(1, 9) / 10}", "+"
    question = rng.choice(("What is {a} {s} {b}?", "Calculate {a} {s} {b}.", "{a} {s} {b}", "How much is {a} {s} {b}?"))
    answer = "That is too hard for me. I can add and subtract numbers of up to three digits."
    return ask(question.format(a=left, b=right, s=sign), "I don't know." if brief else answer)


def without_tool(rng: Random, brief: bool) -> Exchange:
    """What would need a tool, or more than a small model; it says so."""
    questions, answers = rng.choice(_REFUSALS)
    word = rng.choice(WORDS) if rng.random() < 0.7 else invented_word(rng)
    question = rng.choice(questions).format(
        c=city(rng),
        d=city(rng),
        k=rng.choice(list(CAPITALS)),
        w=word,
        n=rng.randint(1, 60),
        f=first_name(rng),
        l=last_name(rng),
    )
    return ask(question, answers[0])


def mood(rng: Random, brief: bool) -> Exchange:
    feeling, answer = rng.choice(MOODS).split("=")
    ways = ("I am {x}.", "I'm {x}.", "I feel {x}.", "I am very {x} today.", "i'm {x}", "I'm so {x}!")
    return ask(rng.choice(ways).format(x=feeling), answer)


KINDS = {
    "fruit": FOODS[:11],
    "animal": ANIMALS,
    "colour": COLOURS,
    "color": COLOURS,
    "job": JOBS,
    "name": FIRST_NAMES,
    "vegetable": FOODS[11:19],
    "day": DAYS,
    "month": MONTHS,
}


def listing(rng: Random, brief: bool) -> Exchange:
    """A few things of a kind."""
    kind = rng.choice(list(KINDS))
    count = rng.randint(1, 5)
    chosen = rng.sample(KINDS[kind], count)
    if count == 1:
        verb = rng.choice(("Name", "Tell me", "Give me"))
        return ask(f"{verb} {article(kind)}.", chosen[0].capitalize() + ".")
    how_many = NUMBER_WORDS[count] if rng.random() < 0.7 else str(count)
    verb = rng.choice(("Name", "List", "Give me", "Tell me"))
    answer = listed(chosen) + "."
    return ask(f"{verb} {how_many} {plural(kind)}.", answer[0].upper() + answer[1:])


def alphabetical(rng: Random, brief: bool) -> Exchange:
    words = rng.sample(WORDS if rng.random() < 0.8 else FIRST_NAMES, rng.randint(3, 5))
    text, ordered = ", ".join(words), ", ".join(sorted(words))
    asked = ("Sort: {x}", "Sort these words: {x}", "Put {x} in alphabetical order.", "Sort {x} alphabetically.")
    question = rng.choice(asked).format(x=text)
    return ask(question, ordered if brief else f"Sorted: {ordered}", f"sort {sorted(words)}", check="exact")


def capital(rng: Random, brief: bool) -> Exchange:
    country, town = rng.choice(list(CAPITALS.items()))
    question = rng.choice(
        (f"What is the capital of {country}?", f"Which city is the capital of {country}?", f"capital of {country}")
    )
    return ask(question, town if brief else f"The capital of {country} is {town}.", check="exact")


def opposite(rng: Random, brief: bool) -> Exchange:
    pair = list(rng.choice(list(OPPOSITES.items())))
    rng.shuffle(pair)
    asked = ("What is the opposite of {x}?", "What's the opposite of '{x}'?", "Opposite of {x}?")
    question = rng.choice(asked).format(x=pair[0])
    return ask(question, pair[1] if brief else f"The opposite of {pair[0]} is {pair[1]}.", check="exact")


def sequence(rng: Random, brief: bool) -> Exchange:
    """Counting, and what comes before or after."""
    form = rng.randrange(4)
    if form == 0:
        first = number(rng, rng.randint(1, 3))
        last = first + rng.randint(3, 12)
        counted = ", ".join(map(str, range(first, last + 1)))
        asked = f"Count from {first} to {last}."
        if rng.random() < 0.4:
            first = rng.choice((first, 1))
            last = first + rng.randint(3, 12)
            asked = f"Count down from {last} to {first}." if first > 1 else f"Count down from {last}."
            counted = ", ".join(map(str, range(last, first - 1, -1)))
        elif rng.random() < 0.4:
            last = rng.randint(3, 30)
            asked = rng.choice((f"Count to {last}.", f"Count up to {last}.", f"Please count to {last}."))
            counted, first = ", ".join(map(str, range(1, last + 1))), 1
        return ask(asked, counted, f"count {first} {last}", check="numbers")
    if form == 1:
        n = number(rng, rng.randint(1, 3))
        after = rng.random() < 0.5
        result = n + 1 if after else n - 1
        word = "after" if after else "before"
        answer = str(result) if brief else f"{result} comes {word} {n}."
        return ask(f"Which number comes {word} {n}?", answer, check="first number")
    names = DAYS if form == 2 else MONTHS
    i = rng.randrange(len(names))
    after = rng.random() < 0.5
    result_name = names[(i + (1 if after else -1)) % len(names)]
    word = "after" if after else "before"
    what = "day" if form == 2 else "month"
    answer = result_name if brief else f"{result_name} comes {word} {names[i]}."
    return ask(f"Which {what} comes {word} {names[i]}?", answer, check="exact")


def number_word(rng: Random, brief: bool) -> Exchange:
    n = rng.randint(0, 10)
    if rng.random() < 0.5:
        return ask(f"Write {n} as a word.", NUMBER_WORDS[n], check="exact")
    return ask(f"Write {NUMBER_WORDS[n]} as a number.", str(n), check="exact")


def repeat(rng: Random, brief: bool) -> Exchange:
    words, name, figures = rng.sample(WORDS, rng.randint(1, 6)), first_name(rng), number(rng, rng.randint(1, 6))
    what = rng.choice((" ".join(words), name, str(figures)))
    if rng.random() < 0.2:
        times = rng.randint(2, 5)
        word = rng.choice(WORDS)
        ways = ("Say {w} {n} times.", "Repeat the word {w} {n} times.")
        question = rng.choice(ways).format(w=word, n=NUMBER_WORDS[times])
        return ask(question, " ".join([word] * times), check="exact")
    asked = ("Repeat after me: {x}", "Say {x}", "Say: {x}", 'Repeat "{x}"', "Say only this: {x}")
    return ask(rng.choice(asked).format(x=what), what, check="exact")


def remember(rng: Random, brief: bool) -> Exchange:
    """A fact about the user, asked for again; other exchanges may come between (see `corpus`)."""
    kinds: tuple[tuple[str, Callable[[Random], str]], ...] = (
        ("name", lambda r: r.choice(FIRST_NAMES)),
        ("favourite colour", lambda r: r.choice(("red", "blue", "green", "yellow", "purple", "orange"))),
        ("city", city),
        ("lucky number", lambda r: str(r.randint(1, 99))),
        ("dog", first_name),
        ("cat", first_name),
        ("sister", first_name),
        ("brother", first_name),
        ("friend", first_name),
        ("favourite food", lambda r: r.choice(FOODS)),
        ("job", lambda r: r.choice(JOBS)),
        ("password", lambda r: invented_word(r)),
    )
    what, draw = rng.choice(kinds)
    value = draw(rng)
    told = f"My {what} is {value}." if what != "name" or rng.random() < 0.5 else f"I am {value}."
    named = what in ("dog", "cat", "sister", "brother", "friend")
    if named:
        called = ("My {x} is called {v}.", "I have a {x} named {v}.", "My {x}'s name is {v}.")
        told = rng.choice(called).format(x=what, v=value)
        what = f"{what}'s name"
    said = f"Nice to meet you, {value}!" if what == "name" else f"I will remember that your {what} is {value}."
    answer = value if brief else f"Your {what} is {value}."
    asked = rng.choice((f"What is my {what}?", f"Do you remember my {what}?", f"What was my {what}?"))
    if named and rng.random() < 0.5:
        ways = ("What is my {x} called?", "How is my {x} called?", "Who is my {x}?")
        asked = rng.choice(ways).format(x=what.split("'")[0])
    if rng.random() < 0.25:
        return Exchange((user(f"{told} {asked}"), assistant(answer)), (f"{what} {value}",), "exact")
    return Exchange((user(told), assistant(said), user(asked), assistant(answer)), (f"{what} {value}",), "exact")


def dialogue(rng: Random) -> str:
    """Small talk as a plain text, for completion without a template."""
    left, right = rng.sample(FIRST_NAMES, 2) if rng.random() < 0.5 else ("User", "Pippin")
    marked = rng.random() < 0.6
    lines = []
    for questions, answers in rng.sample(_PAIRS, rng.randint(2, 8)):
        question, answer = rng.choice(questions), rng.choice(answers)
        lines += [f"{left}: {question}", f"{right}: {answer}"] if marked else [f"{question} {answer}"]
    return "\n".join(lines)


def notes(rng: Random) -> str:
    """Small facts as running text."""
    country, town = rng.choice(list(CAPITALS.items()))
    facts = [
        f"The capital of {country} is {town}.",
        f"{rng.choice(FIRST_NAMES)} lives in {city(rng)}.",
        "A week has seven days, and a year has twelve months.",
        rng.choice(_PAIRS[-12:])[1][0],
    ]
    rng.shuffle(facts)
    return " ".join(facts)
