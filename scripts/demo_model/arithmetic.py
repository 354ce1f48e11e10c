"""Sums, differences, comparing, sorting and units."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from demo_model.chat import Exchange, ask, assistant, user
from demo_model.lexicon import FIRST_NAMES, FOODS, OBJECTS, PHRASES, plural

_phrases = PHRASES["arithmetic"]
TIMES = "\N{MULTIPLICATION SIGN}"


def sum_key(a: int, b: int) -> str:
    return f"sum {min(a, b)} {max(a, b)}"


def difference_key(a: int, b: int) -> str:
    return f"difference {a} {b}"


def number(rng: Random, digits: int) -> int:
    """Uniform over the numbers of exactly so many digits (0 counts as one digit)."""
    return rng.randrange(0 if digits == 1 else 10 ** (digits - 1), 10**digits)


def operand(rng: Random) -> int:
    return number(rng, rng.choices((1, 2, 3), (1, 3, 6))[0])


def add(rng: Random, brief: bool, draw: Callable[[Random], int] = operand) -> Exchange:
    a, b = draw(rng), draw(rng)
    answer = "{c}" if brief else rng.choice(_phrases["sum_answers"])
    question = rng.choice(_phrases["sum_questions"]).format(a=a, b=b)
    return ask(question, answer.format(a=a, b=b, c=a + b), sum_key(a, b), check="number")


def subtract(rng: Random, brief: bool, draw: Callable[[Random], int] = operand) -> Exchange:
    a, b = draw(rng), draw(rng)
    if rng.random() < 0.85:  # mostly without a sign
        a, b = max(a, b), min(a, b)
    question = rng.choice(_phrases["difference_questions"]).format(a=a, b=b)
    if question.startswith("What is the difference between"):
        a, b = max(a, b), min(a, b)
    answer = "{c}" if brief else rng.choice(_phrases["difference_answers"])
    return ask(question, answer.format(a=a, b=b, c=a - b), difference_key(a, b), check="number")


def word_problem(rng: Random, brief: bool) -> Exchange:
    name, other = rng.sample(FIRST_NAMES, 2)
    things = plural(rng.choice(OBJECTS + FOODS))
    a, b = operand(rng) + 2, operand(rng) + 2
    if rng.random() < 0.5:
        story = rng.choice(
            (
                f"{name} has {a} {things} and gets {b} more from {other}. How many {things} does {name} have now?",
                f"{name} has {a} {things}. {other} has {b} {things}. How many {things} do they have together?",
                f"There are {a} {things} in one box and {b} {things} in another. How many are there in all?",
                f"{name} bought {a} {things} on Monday and {b} on Tuesday. How many {things} did {name} buy?",
            )
        )
        answer = str(a + b) if brief else f"{a} + {b} = {a + b}, so the answer is {a + b} {things}."
        return ask(story, answer, sum_key(a, b), check="number")
    a, b = max(a, b), min(a, b)
    story = rng.choice(
        (
            f"{name} has {a} {things} and gives {b} of them to {other}. How many {things} are left?",
            f"{name} had {a} {things} but lost {b}. How many {things} does {name} have now?",
            f"A shop has {a} {things} and sells {b}. How many {things} remain?",
            f"{name} has {a} {things}. {other} has {b} {things}. How many more does {name} have?",
        )
    )
    answer = str(a - b) if brief else f"{a} - {b} = {a - b}, so the answer is {a - b} {things}."
    return ask(story, answer, difference_key(a, b), check="number")


def running_total(rng: Random, brief: bool) -> Exchange:
    """Several turns that each change the number before."""
    total = operand(rng)
    step = operand(rng)
    messages = [user(f"{rng.choice(('What is', 'Calculate', 'Tell me'))} {total} + {step}.")]
    keys = [sum_key(total, step)]
    result = total + step
    messages.append(assistant(str(result) if brief else f"{total} + {step} = {result}."))
    for _ in range(rng.randint(1, 3)):
        step = operand(rng)
        if result + step <= 999 and rng.random() < 0.5:
            words = rng.choice(("Add {b} to that.", "Plus {b}?", "And now add {b}.", "Now plus {b}."))
            after, sign = result + step, "+"
            keys.append(sum_key(result, step))
        else:
            step = min(step, result)
            words = rng.choice(("Subtract {b} from that.", "Minus {b}?", "And now take away {b}.", "Now minus {b}."))
            after, sign = result - step, "-"
            keys.append(difference_key(result, step))
        messages.append(user(words.format(b=step)))
        messages.append(assistant(str(after) if brief else f"{result} {sign} {step} = {after}."))
        result = after
    return Exchange(tuple(messages), tuple(keys), "number")


def chain(rng: Random, brief: bool) -> Exchange:
    """Three or four operands, worked out step by step."""
    result = operand(rng)
    written, steps, keys = str(result), [], []
    for _ in range(rng.randint(2, 3)):
        b = number(rng, rng.randint(1, 2))
        plus = result < b or (result + b < 1000 and rng.random() < 0.6)
        after = result + b if plus else result - b
        written += f" {'+' if plus else '-'} {b}"
        steps.append(f"{result} {'+' if plus else '-'} {b} = {after}")
        keys.append(sum_key(result, b) if plus else difference_key(result, b))
        result = after
    question = rng.choice(("What is {x}?", "Calculate {x}.", "{x}", "How much is {x}?", "{x} = ?")).format(x=written)
    return ask(question, ", ".join(steps) + ".", *keys, check="number")


def multiply(rng: Random, brief: bool) -> Exchange:
    """The tables up to 12, both ways."""
    a, b = rng.randint(0, 12), rng.randint(1, 12)
    if rng.random() < 0.7:
        asked = rng.choice((f"{a} times {b}", f"{a} * {b}", f"{a} x {b}", f"{a}*{b}", f"{a} multiplied by {b}"))
        short, long = str(a * b), f"{a} times {b} is {a * b}."
    else:
        asked = rng.choice((f"{a * b} divided by {b}", f"{a * b} / {b}", f"{a * b}/{b}"))
        short, long = str(a), f"{a * b} divided by {b} is {a}."
    question = rng.choice(("What is {x}?", "What's {x}?", "Calculate {x}.", "{x}", "How much is {x}?")).format(x=asked)
    return ask(question, short if brief else long, check="number")


def compare(rng: Random, brief: bool) -> Exchange:
    a, b = operand(rng), operand(rng)
    if rng.random() < 0.4:  # neighbours are the hard ones
        b = max(0, a + rng.randint(-12, 12))
    keys = (f"compare {min(a, b)} {max(a, b)}",)
    larger = rng.random() < 0.5
    word = rng.choice(("larger", "bigger", "greater")) if larger else rng.choice(("smaller", "less"))
    if rng.random() < 0.3 or a == b:
        yes = a > b if larger else a < b
        question = rng.choice(("Is {a} {word} than {b}?", "Is {a} {word} than {b}, yes or no?")).format(
            a=a, b=b, word=word
        )
        full = f"Yes, {a} is {word} than {b}." if yes else f"No, {a} is not {word} than {b}."
        return ask(question, full[: full.index(",")] if brief else full, *keys, check="first word")
    which = "smaller" if word == "less" else word
    result, rest = (max(a, b), min(a, b)) if larger else (min(a, b), max(a, b))
    question = rng.choice(
        (
            f"Which is {which}, {a} or {b}?",
            f"Which number is {which}: {a} or {b}?",
            f"What is {which}, {a} or {b}?",
            f"Compare {a} and {b}. Which one is {which}?",
        )
    )
    return ask(question, str(result) if brief else f"{result} is {which} than {rest}.", *keys, check="first number")


def _some_numbers(rng: Random) -> list[int]:
    count = rng.randint(3, 7)
    if rng.random() < 0.3:
        low = operand(rng)
        return [low + rng.randint(0, 20) for _ in range(count)]
    return [operand(rng) for _ in range(count)]


def sort(rng: Random, brief: bool) -> Exchange:
    numbers = _some_numbers(rng)
    down = rng.random() < 0.35
    text = ", ".join(map(str, numbers))
    ordered = ", ".join(map(str, sorted(numbers, reverse=down)))
    order = rng.choice(
        ("in descending order", "from largest to smallest", "from high to low")
        if down
        else ("in ascending order", "from smallest to largest", "from low to high")
    )
    question = rng.choice(
        (
            f"Sort these numbers {order}: {text}",
            f"Sort {text} {order}.",
            f"Put {text} {order}.",
            f"Order {text} {order}.",
        )
    )
    if not down and rng.random() < 0.3:
        question = f"Sort {text}."
    keys = (f"sort {sorted(numbers)}",)
    return ask(question, ordered if brief else f"Sorted: {ordered}", *keys, check="numbers")


def extreme(rng: Random, brief: bool) -> Exchange:
    numbers = _some_numbers(rng)
    largest = rng.random() < 0.5
    word = rng.choice(("largest", "biggest", "highest") if largest else ("smallest", "lowest"))
    text = ", ".join(map(str, numbers))
    result = max(numbers) if largest else min(numbers)
    question = rng.choice(
        (
            f"What is the {word} of these numbers: {text}?",
            f"Which of {text} is the {word}?",
            f"Find the {word} number: {text}",
        )
    )
    answer = str(result) if brief else f"The {word} number is {result}."
    return ask(question, answer, f"sort {sorted(numbers)}", check="number")


# singular, plural, how many of the smaller unit, smaller unit's plural, largest count asked for
UNITS = (
    ("kilometre", "kilometres", 1000, "metres", 99),
    ("metre", "metres", 100, "centimetres", 99),
    ("centimetre", "centimetres", 10, "millimetres", 99),
    ("kilogram", "kilograms", 1000, "grams", 99),
    ("litre", "litres", 1000, "millilitres", 99),
    ("tonne", "tonnes", 1000, "kilograms", 99),
    ("gram", "grams", 1000, "milligrams", 99),
    ("hour", "hours", 60, "minutes", 60),
    ("minute", "minutes", 60, "seconds", 60),
    ("day", "days", 24, "hours", 40),
    ("week", "weeks", 7, "days", 60),
    ("year", "years", 12, "months", 40),
    ("foot", "feet", 12, "inches", 40),
    ("yard", "yards", 3, "feet", 99),
    ("dozen", "dozen", 12, "pieces", 40),
    ("gallon", "gallons", 4, "quarts", 99),
    ("euro", "euros", 100, "cents", 99),
)
_ABBREVIATIONS = {
    "kilometres": "km",
    "metres": "m",
    "centimetres": "cm",
    "millimetres": "mm",
    "kilograms": "kg",
    "grams": "g",
    "litres": "l",
    "millilitres": "ml",
}


def _parts(count: int, factor: int) -> tuple[int, int] | None:
    """The harder products as a sum of two easier ones, such as 13 * 24 = 260 + 52; None for the easy ones."""
    if factor in (12, 24) and count > 10:
        tens = factor // 10 * 10
        return count * tens, count * (factor - tens)
    if factor in (3, 4, 7, 60) and count > 10 and count % 10:
        return count // 10 * 10 * factor, count % 10 * factor
    return None


def convert(rng: Random, brief: bool) -> Exchange:
    one, many, factor, small, most = rng.choice(UNITS)
    count = rng.randint(1, most)
    unit = one if count == 1 else many
    key = f"convert {many} {small} {count}"
    big_short, small_short = _ABBREVIATIONS.get(many), _ABBREVIATIONS.get(small)
    if big_short and small_short and rng.random() < 0.3:
        unit, small, many = big_short, small_short, big_short
    total = count * factor
    if rng.random() < 0.3:
        question = rng.choice((f"Convert {total} {small} to {many}.", f"How many {many} are {total} {small}?"))
        return ask(question, str(count) if brief else f"{total} {small} = {count} {unit}.", key, check="number")
    question = rng.choice(
        (
            f"How many {small} are in {count} {unit}?",
            f"Convert {count} {unit} to {small}.",
            f"What is {count} {unit} in {small}?",
            f"{count} {unit} in {small}",
            f"How many {small} are {count} {unit}?",
        )
    )
    if brief or not (parts := _parts(count, factor)):
        return ask(question, str(total) if brief else f"{count} {unit} = {total} {small}.", key, check="number")
    answer = f"{count} {unit} = {parts[0]} + {parts[1]} = {total} {small}."
    return ask(question, answer, key, sum_key(*parts), check="number")


def convert_temperature(rng: Random, brief: bool) -> Exchange:
    """Celsius to Fahrenheit exactly, by 18 tenths in easy steps; Fahrenheit to Celsius to the degree."""
    if rng.random() < 0.3:
        return _to_celsius(rng, brief)
    celsius = rng.randint(-40, 100)
    tenths = 18 * celsius
    product, result = _decimal(tenths), _decimal(tenths + 320)
    question = rng.choice(
        (
            f"Convert {celsius} degrees Celsius to Fahrenheit.",
            f"What is {celsius} °C in Fahrenheit?",
            f"How many degrees Fahrenheit is {celsius} °C?",
            f"{celsius} C in F",
            f"{celsius} °C in °F",
        )
    )
    steps = f"{celsius} {TIMES} 18 = {20 * celsius} - {2 * celsius} = {tenths}"
    full = f"{steps}, so {celsius} {TIMES} 1.8 = {product}, and {product} + 32 = {result} °F."
    keys = (f"celsius {celsius}", difference_key(20 * celsius, 2 * celsius), sum_key(tenths // 10, 32))
    return ask(question, result if brief else full, *keys, check="decimal")


def _decimal(tenths: int) -> str:
    sign, (whole, rest) = "-" if tenths < 0 else "", divmod(abs(tenths), 10)
    return f"{sign}{whole}.{rest}" if rest else f"{sign}{whole}"


def _to_celsius(rng: Random, brief: bool) -> Exchange:
    fahrenheit = rng.randint(-40, 212)
    above = fahrenheit - 32
    celsius = round(above * 5 / 9)
    question = rng.choice(
        (
            f"Convert {fahrenheit} degrees Fahrenheit to Celsius.",
            f"What is {fahrenheit} °F in Celsius?",
            f"How many degrees Celsius is {fahrenheit} °F?",
            f"{fahrenheit} F in C",
        )
    )
    nearly = "" if above * 5 % 9 == 0 else "about "
    full = f"{fahrenheit} - 32 = {above}, {above} {TIMES} 5 = {above * 5}, and {above * 5} / 9 is {nearly}{celsius} °C."
    keys = (f"fahrenheit {fahrenheit}", difference_key(fahrenheit, 32))
    return ask(question, str(celsius) if brief else full, *keys, check="number")
