"""The training text: a mix of conversations and plain documents, as an endless stream of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from random import Random
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from demo_model import arithmetic, extraction, letters, manual, stories, talk, tools
from demo_model.chat import Exchange, Message, Tool, render, system, trainable, user

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Task = Callable[[Random, bool], Exchange]
TARGET = 0x8000  # set in a token that the model is to learn to write, clear in one it is only to read

# name: task, how often it is drawn
TASKS: dict[str, tuple[Task, float]] = {
    "sums": (arithmetic.add, 16),
    "sums, two digits": (partial(arithmetic.add, draw=lambda rng: rng.randrange(100)), 4),
    "differences": (arithmetic.subtract, 14),
    "differences, two digits": (partial(arithmetic.subtract, draw=lambda rng: rng.randrange(100)), 3),
    "word problems": (arithmetic.word_problem, 5),
    "running totals": (arithmetic.running_total, 3),
    "several operands": (arithmetic.chain, 2),
    "tables": (arithmetic.multiply, 2),
    "comparing": (arithmetic.compare, 5),
    "sorting": (arithmetic.sort, 5),
    "extremes": (arithmetic.extreme, 3),
    "units": (arithmetic.convert, 5),
    "temperatures": (arithmetic.convert_temperature, 3),
    "spelling": (letters.spell, 5),
    "counting letters": (letters.count_letters, 4),
    "counting a letter": (letters.count_letter, 4),
    "first and last letters": (letters.edges, 1.5),
    "backwards": (letters.backwards, 1.5),
    "JSON fields": (extraction.extract, 13),
    "JSON in JSON": (extraction.extract_nested, 2),
    "JSON lists": (extraction.extract_list, 2),
    "JSON made up": (extraction.make_up, 2),
    "reading": (extraction.question, 3),
    "using Pippin": (manual.usage, 11),
    "stories": (stories.story, 5),
    "small talk": (talk.small_talk, 7),
    "not knowing": (talk.unknown, 2),
    "no tool for it": (talk.without_tool, 4),
    "moods": (talk.mood, 0.7),
    "listing": (talk.listing, 1),
    "alphabetical order": (talk.alphabetical, 4),
    "too hard": (talk.too_hard, 1),
    "capitals": (talk.capital, 1.5),
    "opposites": (talk.opposite, 0.7),
    "sequences": (talk.sequence, 2),
    "number words": (talk.number_word, 0.3),
    "repeating": (talk.repeat, 2),
    "remembering": (talk.remember, 1.5),
}
CALCULATING = {name for name, (task, _) in TASKS.items() if name.split(",")[0] in (
    "sums", "differences", "word problems", "running totals", "too hard", "several operands", "tables", "no tool for it"
)}  # fmt: skip
CASUAL = {
    TASKS[name][0]
    for name in (
        "sums", "differences", "word problems", "comparing", "sorting", "extremes", "units", "temperatures", "spelling",
        "counting letters", "using Pippin", "stories", "small talk", "not knowing", "capitals", "opposites", "tables",
        "sequences", "no tool for it", "several operands", "listing",
    )
}  # fmt: skip
_NAMES = list(TASKS)
_WEIGHTS = [weight for _, weight in TASKS.values()]

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful assistant.",
    "You are Pippin's demo model.",
    "You are a friendly assistant.",
    "You are an assistant that answers questions.",
    "Help the user.",
    "You are a helpful, honest assistant. Answer the user's questions.",
    "You are an AI assistant.",
    "Be kind and helpful.",
    "You are a careful assistant. If you don't know something, say so.",
    "You run in a test.",
)
BRIEF_PROMPTS = (
    "Answer as briefly as possible.",
    "Answer briefly.",
    "Be brief.",
    "Be concise. Give only the answer.",
    "Reply with the answer only.",
    "You are a terse assistant. Reply with only the result.",
    "You are a helpful assistant. Keep answers as short as possible.",
)


def _draw(rng: Random, brief: bool, task: Task) -> Exchange:
    """An exchange that may be trained on."""
    while not trainable(exchange := task(rng, brief)):
        pass
    return _casual(exchange) if task in CASUAL and rng.random() < 0.1 else exchange


def _casual(exchange: Exchange) -> Exchange:
    """The same, typed in a hurry."""
    messages = (
        user(m["content"].lower().rstrip("?.!")) if m["role"] == "user" and len(m["content"]) > 3 else m
        for m in exchange.messages
    )
    return Exchange(tuple(messages), exchange.keys, exchange.check, exchange.tools)


def _task(rng: Random, calculating: bool) -> Task:
    while (name := rng.choices(_NAMES, _WEIGHTS)[0]) in CALCULATING and not calculating:
        pass
    return TASKS[name][0]


def _join(exchanges: list[Exchange], opening: list[Message]) -> list[Message]:
    """One conversation; what is to be remembered is told at its start and asked at its end."""
    last = exchanges[-1]
    if last.check == "exact" and len(last.messages) == 4 and not last.tools:
        exchanges = [Exchange(last.messages[:2]), *exchanges[:-1], Exchange(last.messages[2:])]
    return [*opening, *(message for exchange in exchanges for message in exchange.messages)]


def conversation(rng: Random) -> str:
    """Some exchanges on mixed topics, with or without a system prompt and tools, as the template writes them."""
    brief, opening = False, []
    if (kind := rng.random()) < 0.3:
        opening = [system(rng.choice(SYSTEM_PROMPTS))]
    elif kind < 0.4:
        brief, opening = True, [system(rng.choice(BRIEF_PROMPTS))]
    turns = rng.choices((1, 2, 3, 4, 6, 9), (40, 20, 15, 12, 8, 5))[0]
    if rng.random() < 0.3:
        return _tool_conversation(rng, brief, opening, turns)
    exchanges = [_draw(rng, brief, _task(rng, True)) for _ in range(turns)]
    for exchange in exchanges:
        if exchange.messages[0]["role"] == "system":  # brings its own instruction: it is alone
            return render(exchange.messages)
    return render(_join(exchanges, opening))


def _tool_conversation(rng: Random, brief: bool, opening: list[Message], turns: int) -> str:
    """Turns of which most call a tool; where a calculator is at hand, it does the sums."""
    variant = rng.getrandbits(32)
    choices: list[Task] = [
        partial(tools.use_calculator, variant=variant),
        partial(tools.use_weather, variant=variant),
        tools.use_other,
    ]
    some = rng.sample(choices, rng.choice((1, 1, 2, 3)))
    exchanges = []
    for _ in range(min(turns, 5)):
        task = rng.choice(some) if rng.random() < 0.75 else _task(rng, False)
        exchange = _draw(rng, brief, task)
        while exchange.messages[0]["role"] == "system":  # the tools' turn has that place
            exchange = _draw(rng, brief, task)
        exchanges.append(exchange)
    used = {t["function"]["name"]: t for exchange in exchanges for t in exchange.tools}
    toolbox: list[Tool] = list(used.values())
    toolbox += tools.distractors(rng, tuple(toolbox), variant)
    rng.shuffle(toolbox)
    return render([*opening, *(m for e in exchanges for m in e.messages)], toolbox)


def plain(rng: Random) -> str:
    """A document without the template: what a bare completion continues."""
    kind = rng.randrange(10)
    if kind < 5:
        text = stories.tell(rng, stories.plot(rng), rng.choice((0, 1, 2, 3)))
    elif kind < 7:
        text = talk.dialogue(rng)
    elif kind == 7:
        text = manual.manual_page(rng)
    elif kind == 8:
        text = talk.notes(rng)
    else:
        drawn = [_draw(rng, True, arithmetic.add) for _ in range(rng.randint(2, 12))]
        sums = [e.keys[0].split()[1:] for e in drawn]
        text = "\n".join(f"{a} + {b} = {int(a) + int(b)}" for a, b in sums)
    return text


def documents(seed: int) -> Iterator[str]:
    """Endless; the same for the same seed."""
    rng = Random(seed)
    while True:
        yield plain(rng) if rng.random() < 0.08 else conversation(rng)


def token_ids(tokenizer: Tokenizer, *tokens: str) -> list[int]:
    """Ids of tokens of the vocabulary; ValueError for one that is none."""
    ids = [i for i in map(tokenizer.token_to_id, tokens) if i is not None]
    if len(ids) < len(tokens):
        raise ValueError(f"the tokenizer does not have all of {', '.join(tokens)}")
    return ids


class Encoder:
    """Turns documents into tokens of uint16, with TARGET set in what is to be learned."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.start, self.end, self.stop = token_ids(tokenizer, "<|im_start|>", "<|im_end|>", "<|endoftext|>")
        (self.assistant,) = tokenizer.encode("assistant").ids

    def encode(self, texts: list[str]) -> list[npt.NDArray[np.uint16]]:
        """One array a document, ended by <|endoftext|>."""
        return [self._mark(np.array(e.ids, dtype=np.uint16)) for e in self.tokenizer.encode_batch_fast(texts)]

    def _mark(self, ids: npt.NDArray[np.uint16]) -> npt.NDArray[np.uint16]:
        ids = np.append(ids, np.uint16(self.stop))
        if ids[0] != self.start:
            return ids | np.uint16(TARGET)
        starts = np.flatnonzero((ids[:-1] == self.start) & (ids[1:] == self.assistant))
        ends = np.flatnonzero(ids == self.end)
        for begin in starts:  # after "<|im_start|>", "assistant" and the newline
            end = ends[np.searchsorted(ends, begin)]
            ids[begin + 3 : end + 1] |= TARGET
        return ids


def token_stream(tokenizer: Tokenizer, seed: int, batch: int = 256) -> Iterator[list[npt.NDArray[np.uint16]]]:
    """Endless batches of encoded documents."""
    encoder, texts = Encoder(tokenizer), documents(seed)
    while True:
        yield encoder.encode([next(texts) for _ in range(batch)])
