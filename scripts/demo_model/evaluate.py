"""Asks a trained model held-out questions and prints how many it gets right, by task.

Runs on mlx-lm, greedily, many questions at a time.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from demo_model import arithmetic, extraction, letters, manual, stories, talk, tools
from demo_model.chat import Exchange, Message, Tool, held_out, render
from pippin.backend import preload_openblas

Ask = Callable[[Random], Exchange]


def _digits(task: Callable[..., Exchange], digits: int) -> Ask:
    return lambda rng: task(rng, False, draw=partial(arithmetic.number, digits=digits))


def _tool(task: Callable[..., Exchange]) -> Ask:
    """The task with other tools beside its own, in any order."""

    def ask(rng: Random) -> Exchange:
        variant = rng.getrandbits(32)
        exchange = task(rng, False) if task is tools.use_other else task(rng, False, variant=variant)
        toolbox = [*exchange.tools, *tools.distractors(rng, exchange.tools, variant)]
        rng.shuffle(toolbox)
        return Exchange(exchange.messages, exchange.keys, exchange.check, tuple(toolbox))

    return ask


def _mixed(rng: Random) -> Exchange:
    """A held-out sum at the end of a conversation on other things."""
    before = [
        task(rng, False)
        for task in (manual.usage, letters.spell, talk.small_talk, arithmetic.compare, extraction.question)
    ]
    last = arithmetic.add(rng, False)
    earlier = tuple(m for e in rng.sample(before, 3) for m in e.messages)
    return Exchange((*earlier, *last.messages), last.keys, last.check)


# name: task, and the accuracy that it must reach
TASKS: dict[str, tuple[Ask, float]] = {
    "sums, two digits": (_digits(arithmetic.add, 2), 0.97),
    "sums, three digits": (_digits(arithmetic.add, 3), 0.90),
    "differences, two digits": (_digits(arithmetic.subtract, 2), 0),
    "differences, three digits": (_digits(arithmetic.subtract, 3), 0),
    "word problems": (partial(arithmetic.word_problem, brief=False), 0),
    "running totals": (partial(arithmetic.running_total, brief=False), 0),
    "sums after other topics": (_mixed, 0),
    "comparing": (partial(arithmetic.compare, brief=False), 0),
    "sorting": (partial(arithmetic.sort, brief=False), 0),
    "largest and smallest": (partial(arithmetic.extreme, brief=False), 0),
    "units": (partial(arithmetic.convert, brief=False), 0),
    "temperatures": (partial(arithmetic.convert_temperature, brief=False), 0),
    "several operands": (partial(arithmetic.chain, brief=False), 0),
    "alphabetical order": (partial(talk.alphabetical, brief=False), 0),
    "spelling": (partial(letters.spell, brief=False), 0),
    "counting letters": (partial(letters.count_letters, brief=False), 0),
    "counting one letter": (partial(letters.count_letter, brief=False), 0),
    "JSON fields": (partial(extraction.extract, brief=False), 0.95),
    "JSON with nested objects": (partial(extraction.extract_nested, brief=False), 0),
    "JSON lists": (partial(extraction.extract_list, brief=False), 0),
    "reading": (partial(extraction.question, brief=False), 0),
    "tool calls, calculator": (_tool(tools.use_calculator), 0.90),
    "tool calls, weather": (_tool(tools.use_weather), 0.90),
    "tool calls, other tools": (_tool(tools.use_other), 0.90),
    "using Pippin": (partial(manual.usage, brief=False), 0),
}


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked, and the message that would be right."""

    task: str
    messages: tuple[Message, ...]
    tools: tuple[Tool, ...]
    reference: Message
    check: str


def questions(name: str, count: int, seed: int = 0) -> Iterator[Question]:
    """Held-out exchanges of a task, one question for each answer in them; those that call tools have several."""
    rng = Random(f"{name} {seed}")
    ask, _ = TASKS[name]
    drawn = (ask(rng) for _ in range(1000 * count))
    held = (exchange for exchange in drawn if exchange.keys and held_out(exchange.keys[0]))
    for exchange in islice(held, count):
        for i, message in enumerate(exchange.messages):
            tool_task = name.startswith("tool calls")
            last = i + 1 == len(exchange.messages)
            if message["role"] == "assistant" and (last or tool_task or name == "running totals"):
                part = f"{name}: results" if tool_task and not message.get("tool_calls") else name
                yield Question(part, exchange.messages[:i], exchange.tools, message, exchange.check)


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"(?<![\d-])-?\d+", text.replace(" - ", " minus "))]


def _calls(text: str) -> list[Any]:
    """Tool calls of a reply; what is not JSON is no call."""
    found = []
    for body in re.findall(r"<tool_call>\n(.*?)\n</tool_call>", text, re.DOTALL):
        with suppress(ValueError):
            found.append(json.loads(body))
    return found


def matches(reply: str, reference: Message, check: str) -> bool:
    """Whether a reply is right: same calls, same JSON, same numbers, the words that it must have, or the same text."""
    if calls := reference.get("tool_calls"):
        return _calls(reply) == [c["function"] for c in calls]
    wanted: str = reference["content"]
    if check == "json":
        with suppress(ValueError):
            return list(json.loads(reply).items()) == list(json.loads(wanted).items())
        return False
    if check == "decimal":
        return re.findall(r"-?[\d.]*\d", reply)[-1:] == re.findall(r"-?[\d.]*\d", wanted)[-1:]
    if check == "number":
        return _numbers(reply)[-1:] == _numbers(wanted)[-1:]
    if check == "first number":
        return _numbers(reply)[:1] == _numbers(wanted)[:1]
    if check == "numbers":
        return _numbers(reply) == _numbers(wanted)
    if check == "first word":
        return re.split(r"\W", reply)[0] == re.split(r"\W", wanted)[0]
    if check.startswith("has "):
        return check.removeprefix("has ") in reply
    return _same(reply, wanted)


def _same(reply: str, wanted: str) -> bool:
    """Equal but for a frame such as "X is spelled ..."."""
    short, long = sorted((reply.strip(), wanted.strip()), key=len)
    return short == long or (len(short) > 3 and long.removesuffix(".").endswith(" " + short.removesuffix(".")))


def answer(model: Any, tokenizer: Any, asked: Sequence[Question], most_tokens: int = 160) -> list[str]:
    """Greedy replies, in the order of the questions."""
    from mlx_lm.generate import BatchGenerator

    texts = [render(q.messages, q.tools, add_generation_prompt=True) for q in asked]
    prompts = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # neighbours of like length pad little
    generator = BatchGenerator(
        model,
        max_tokens=most_tokens,
        stop_tokens=[[t] for t in tokenizer.eos_token_ids],
        completion_batch_size=64,
        prefill_batch_size=16,
    )
    uids = generator.insert([prompts[i] for i in order])
    tokens: dict[int, list[int]] = {uid: [] for uid in uids}
    while responses := generator.next_generated():
        for r in responses:
            if r.finish_reason != "stop":
                tokens[r.uid].append(r.token)
    generator.close()
    replies = dict(zip(order, (tokenizer.decode(tokens[uid]) for uid in uids), strict=True))
    return [replies[i] for i in range(len(asked))]


def stories_told(model: Any, tokenizer: Any, count: int) -> tuple[int, float]:
    """How many of ``count`` stories come to an end, and their mean length in tokens."""
    rng = Random("stories")
    asked = [Question("stories", stories.story(rng, False).messages[:1], (), {}, "") for _ in range(count)]
    lengths = [len(tokenizer.encode(reply)) for reply in answer(model, tokenizer, asked, 1200)]
    return sum(n < 1190 for n in lengths), sum(lengths) / count


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).parents[2] / "src/pippin/demo/pippin-demo"
    parser.add_argument("model", type=Path, nargs="?", default=default)
    parser.add_argument("--count", type=int, default=30, help="exchanges for each task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tasks", help="only tasks whose names have this in them")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--mistakes", type=int, default=0, help="how many wrong answers of each task to print")
    return parser.parse_args()


def main() -> None:
    arguments = options()
    preload_openblas()  # before mlx is imported
    import mlx.core as mx
    from mlx_lm import load

    model, tokenizer = load(str(arguments.model))[:2]
    model.set_dtype(getattr(mx, arguments.dtype))
    names = [name for name in TASKS if (arguments.tasks or "") in name]
    asked = [q for name in names for q in questions(name, arguments.count, arguments.seed)]
    began = time.monotonic()
    replies = answer(model, tokenizer, asked)
    print("| task | right | of | accuracy | floor |\n|---|---:|---:|---:|---:|")
    below = []
    for part in dict.fromkeys(q.task for q in asked):
        pairs = [(q, r) for q, r in zip(asked, replies, strict=True) if q.task == part]
        wrong = [(q, r) for q, r in pairs if not matches(r, q.reference, q.check)]
        accuracy, floor = 1 - len(wrong) / len(pairs), TASKS.get(part, (None, 0.0))[1]
        required = f"{floor:.0%}" if floor else ""
        print(f"| {part} | {len(pairs) - len(wrong)} | {len(pairs)} | {accuracy:.1%} | {required} |")
        below += [part] if accuracy < floor else []
        for q, r in wrong[: arguments.mistakes]:
            print(f"    asked   {q.messages[-1]['content']!r}\n    replied {r!r}\n    wanted  {q.reference!r}")
    if not arguments.tasks:
        ended, length = stories_told(model, tokenizer, 8)
        print(f"| stories that end | {ended} | 8 | {ended / 8:.1%} | |\n\nA story has {length:.0f} tokens in the mean.")
    print(f"{len(asked)} questions in {time.monotonic() - began:.0f} s.")
    if below:
        sys.exit(f"Below the floor: {', '.join(below)}")


if __name__ == "__main__":
    main()
