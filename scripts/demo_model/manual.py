"""Questions on how to use Pippin, from manual.md."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from demo_model.chat import Exchange, ask
from demo_model.lexicon import PHRASES

HOW: list[str] = PHRASES["manual"]["how"]
QUESTION_WORDS = ("How", "What", "Which", "Is", "Can", "Does", "Where", "Do")
OPENINGS = (
    "",
    "",
    "",
    "",
    "",
    "",
    "Hi. ",
    "Hello, ",
    "Please: ",
    "Quick question: ",
    "Sorry, ",
    "One more thing. ",
    "Hey! ",
)


@dataclass(slots=True)
class Entry:
    """A fact. ``questions`` and ``actions`` ask for it, ``must`` is in every right answer."""

    questions: list[str] = field(default_factory=list)
    actions: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    must: str = ""


def read_manual(text: str) -> Iterator[Entry]:
    """Entries of the manual; ValueError for a line of no known kind."""
    for block in text.split("\n\n")[2:]:
        entry = Entry()
        for line in block.strip().splitlines():
            mark, _, rest = line.partition(" ")
            if mark == "?":
                entry.questions += [q.strip() for q in rest.split(" | ")]
            elif mark == "how":
                entry.actions += [q.strip() for q in rest.split(" | ")]
            elif mark == "=":
                entry.answers.append(rest.replace("\\n", "\n"))
            elif mark == "*":
                entry.must = rest
            else:
                raise ValueError(f"manual.md: a line of no known kind: {line!r}")
        yield entry


ENTRIES = list(read_manual(Path(__file__).with_name("manual.md").read_text()))


def _wording(rng: Random, entry: Entry) -> str:
    choices = len(entry.questions) + len(entry.actions)
    if rng.randrange(choices) < len(entry.questions):
        question = rng.choice(entry.questions)
    else:
        question = rng.choice(HOW).format(x=rng.choice(entry.actions))
    opening = rng.choice(OPENINGS)
    if opening.endswith((", ", ": ")) and question.split()[0] in QUESTION_WORDS:
        question = question[0].lower() + question[1:]
    if rng.random() < 0.1:
        question = question.rstrip("?.")
    return opening + question


def usage(rng: Random, brief: bool) -> Exchange:
    entry = rng.choice(ENTRIES)
    question = _wording(rng, entry)
    answer = entry.answers[-1] if brief else rng.choice(entry.answers)
    return ask(question, answer, f"manual {question}", check=f"has {entry.must}")


def manual_page(rng: Random) -> str:
    """Some questions and answers as plain text, for completion without a template."""
    lines = []
    for entry in rng.sample(ENTRIES, 6):
        lines.append(f"Q: {_wording(rng, entry)}\nA: {rng.choice(entry.answers)}")
    return "\n\n".join(lines)
