"""Calling functions in the template's format, and using what they return."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

from demo_model.arithmetic import difference_key, number, sum_key
from demo_model.chat import Exchange, Message, Tool, assistant, user
from demo_model.lexicon import CAPITALS, DAYS, PHRASES, PRODUCTS, city, first_name, invented_word

Case = tuple[str, dict[str, Any], str, str]  # question, arguments, result as the tool gives it, final answer
CONDITIONS = ("sunny", "cloudy", "rainy", "windy", "snowy", "foggy", "stormy", "clear", "partly cloudy")


def function(name: str, description: str, properties: dict[str, Any], required: list[str]) -> Tool:
    """A tool in OpenAI's form."""
    parameters = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def call(name: str, arguments: dict[str, Any]) -> Message:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def calls(*each: Message) -> Message:
    return {"role": "assistant", "content": "", "tool_calls": list(each)}


def _string(rng: Random, description: str) -> dict[str, str]:
    return {"type": "string", "description": description} if rng.random() < 0.6 else {"type": "string"}


def calculator(rng: Random) -> tuple[Tool, str, str]:
    """The tool, its name and its argument's name; both vary, so that they are read and not remembered."""
    name = rng.choice(("calculator", "calculator", "calculate", "calc", "evaluate", "math"))
    argument = rng.choice(("expression", "expression", "expr", "formula", "input"))
    description = rng.choice(
        ("Evaluate an arithmetic expression.", "Calculates a formula.", "A calculator", "Do math.")
    )
    properties = {argument: _string(rng, "What to evaluate, e.g. 2 + 3")}
    return function(name, description, properties, [argument]), name, argument


def weather(rng: Random) -> tuple[Tool, str, str, bool]:
    """The tool, its name, its argument's name and whether it takes a unit."""
    name = rng.choice(("get_weather", "get_weather", "get_current_weather", "weather", "weather_lookup"))
    argument = rng.choice(("city", "city", "location", "place"))
    properties: dict[str, Any] = {argument: _string(rng, rng.choice(("The city", "City name", "Where")))}
    with_unit = rng.random() < 0.35
    if with_unit:
        properties["unit"] = {"type": "string", "enum": ["celsius", "fahrenheit"]}
    description = rng.choice(
        ("Get the weather of a city.", "Current weather in a place.", "Get the current weather in a given location")
    )
    return function(name, description, properties, [argument]), name, argument, with_unit


def _expression(rng: Random) -> tuple[str, int, tuple[str, ...]]:
    """An expression with its value; small sums keep the split of the arithmetic tasks."""
    sign = rng.choice("**+-/")
    a, b = number(rng, rng.randint(1, 5)), number(rng, rng.randint(1, 4))
    if sign == "*":
        return f"{a} * {b}", a * b, (f"product {a} {b}",)
    if sign == "/":
        b = max(b, 2)
        return f"{a * b} / {b}", a, (f"quotient {a * b} {b}",)
    if sign == "+":
        return f"{a} + {b}", a + b, (sum_key(a, b),)
    return f"{a} - {b}", a - b, (difference_key(a, b),)


_SPOKEN = {"*": ("times", "multiplied by"), "+": ("plus", "plus"), "-": ("minus", "minus"), "/": ("divided by", "over")}


def use_calculator(rng: Random, brief: bool, variant: int | None = None) -> Exchange:
    """A calculation; the same ``variant`` gives the same tool in every turn of a conversation."""
    tool, name, argument = calculator(rng if variant is None else Random(variant))
    expression, value, keys = _expression(rng)
    left, sign, right = expression.split()
    asked = rng.choice((expression, expression, f"{left} {rng.choice(_SPOKEN[sign])} {right}", f"{left}{sign}{right}"))
    question = rng.choice(
        (
            f"What is {asked}?",
            f"Calculate {asked}.",
            f"How much is {asked}?",
            f"{asked}",
            f"Use the calculator: {asked}",
            f"Please work out {asked}.",
            f"I need to know {asked}.",
        )
    )
    result = rng.choice((str(value), json.dumps({"result": value}), json.dumps({"value": value})))
    sentences = (f"{expression} = {value}.", f"The result is {value}.", f"{asked} is {value}.")
    answer = str(value) if brief else rng.choice(sentences)
    messages = (
        user(question),
        calls(call(name, {argument: expression})),
        {"role": "tool", "content": result},
        assistant(answer),
    )
    return Exchange(messages, keys, "number", (tool,))


def _report(rng: Random, where: str, unit: str) -> tuple[str, str]:
    """A tool's result about a place, and the answer that tells it."""
    degrees, condition = (rng.randint(-15, 42), rng.choice(CONDITIONS))
    if unit == "fahrenheit":
        degrees = rng.randint(10, 110)
    letter = unit[0].upper()
    form = rng.randrange(4)
    if form == 0:
        result = json.dumps({"temperature": degrees, "unit": unit, "condition": condition})
    elif form == 1:
        result = json.dumps({"city": where, "temperature": degrees, "condition": condition}, ensure_ascii=False)
    elif form == 2:
        result = f"{degrees} °{letter}, {condition}"
    else:
        result = json.dumps({"temp": degrees, "conditions": condition})
    return result, f"It is {degrees} °{letter} and {condition} in {where}."


def use_weather(rng: Random, brief: bool, variant: int | None = None) -> Exchange:
    """The weather in one or two places; ``variant`` as in `use_calculator`."""
    tool, name, argument, with_unit = weather(rng if variant is None else Random(variant))
    where, other = city(rng), city(rng)
    unit, tail = "celsius", ""
    if with_unit and rng.random() < 0.6:
        unit = rng.choice(("celsius", "fahrenheit"))
        tail = rng.choice((f" In {unit}, please.", f" Use {unit}.", f" Give it in {unit}."))

    def arguments(place: str) -> dict[str, str]:
        return {argument: place, "unit": unit} if tail else {argument: place}

    result, answer = _report(rng, where, unit)
    if other != where and rng.random() < 0.2:
        second, rest = _report(rng, other, unit)
        question = rng.choice(("What is the weather in {a} and {b}?", "Compare the weather in {a} and in {b}.")).format(
            a=where, b=other
        )
        messages: tuple[Message, ...] = (
            user(question + tail),
            calls(call(name, arguments(where)), call(name, arguments(other))),
            {"role": "tool", "content": result},
            {"role": "tool", "content": second},
            assistant(f"{answer} {rest}"),
        )
    else:
        question = rng.choice(PHRASES["tools"]["weather"]).format(city=where)
        messages = (
            user(question + tail),
            calls(call(name, arguments(where))),
            {"role": "tool", "content": result},
            assistant(answer),
        )
    return Exchange(messages, (f"weather {where}",), "exact", (tool,))


def _invented_case(rng: Random, title: str, field: str) -> Case:
    what = rng.choice((invented_word(rng, 3), first_name(rng)))
    found = invented_word(rng)
    return f"{title} {what}.", {field: what}, json.dumps({"result": found}), f"The result is {found}."


def _timer(rng: Random) -> Case:
    minutes = rng.randint(1, 90)
    question = rng.choice((f"Set a timer for {minutes} minutes.", f"Remind me in {minutes} minutes."))
    return question, {"minutes": minutes}, '{"ok": true}', f"The timer is set for {minutes} minutes."


def _time_in(rng: Random) -> Case:
    where, now = city(rng), f"{rng.randint(0, 23):02}:{rng.randint(0, 59):02}"
    question = rng.choice((f"What time is it in {where}?", f"Tell me the time in {where}."))
    return question, {"city": where}, json.dumps({"time": now}), f"It is {now} in {where}."


def _stock(rng: Random) -> Case:
    what, count = rng.choice(PRODUCTS), rng.randint(0, 400)
    question = rng.choice((f"How many of the {what} are in stock?", f"Check the stock of the {what}."))
    return question, {"product": what}, json.dumps({"stock": count}), f"There are {count} in stock."


def _message(rng: Random) -> Case:
    to, text = first_name(rng), rng.choice(("I am late", "Happy birthday", "See you soon", "Call me back", "Thank you"))
    return f"Send {to} the message: {text}", {"to": to, "text": text}, '{"sent": true}', f"I sent the message to {to}."


def _meeting(rng: Random) -> Case:
    who, day, hour = first_name(rng), rng.choice(DAYS), f"{rng.randint(8, 18):02}:00"
    question = f"Schedule a meeting with {who} on {day} at {hour}."
    done = f"The meeting with {who} is on {day} at {hour}."
    return question, {"person": who, "day": day, "time": hour}, '{"status": "ok"}', done


def _country(rng: Random) -> Case:
    country, people = rng.choice(list(CAPITALS)), rng.randint(1, 999)
    question = f"How many people live in {country}?"
    answer = f"{people} million people live in {country}."
    return question, {"country": country}, json.dumps({"millions": people}), answer


OTHERS: tuple[tuple[str, str, dict[str, str], Callable[[Random], Case]], ...] = (
    ("set_timer", "Start a timer.", {"minutes": "integer"}, _timer),
    ("get_time", "Current time in a city.", {"city": "string"}, _time_in),
    ("check_stock", "How many of a product are in stock.", {"product": "string"}, _stock),
    ("send_message", "Send a text message.", {"to": "string", "text": "string"}, _message),
    ("create_meeting", "Put a meeting in the calendar.", dict.fromkeys(("person", "day", "time"), "string"), _meeting),
    ("get_population", "People in a country.", {"country": "string"}, _country),
    ("search", "Search for something.", {"query": "string"}, lambda r: _invented_case(r, "Search for", "query")),
    ("translate", "Translate a word.", {"word": "string"}, lambda r: _invented_case(r, "Translate", "word")),
    ("look_up", "Look something up.", {"term": "string"}, lambda r: _invented_case(r, "Look up", "term")),
)


def _other(rng: Random) -> tuple[Tool, str, Callable[[Random], Case]]:
    name, description, arguments, case = rng.choice(OTHERS)
    properties = {k: {"type": v} for k, v in arguments.items()}
    return function(name, description, properties, list(properties)), name, case


def use_other(rng: Random, brief: bool) -> Exchange:
    tool, name, case = _other(rng)
    question, arguments, result, answer = case(rng)
    messages = (user(question), calls(call(name, arguments)), {"role": "tool", "content": result}, assistant(answer))
    return Exchange(messages, (f"{name} {question}",), "exact", (tool,))


def distractors(rng: Random, taken: tuple[Tool, ...], variant: int) -> tuple[Tool, ...]:
    """Further tools to choose from; of each kind at most one."""
    names = {t["function"]["name"] for t in taken}
    more = [tool for tool in (calculator(Random(variant))[0], weather(Random(variant))[0]) if rng.random() < 0.4]
    more += [_other(rng)[0] for _ in range(rng.choice((0, 0, 1, 2)))]
    fresh = {t["function"]["name"]: t for t in more if t["function"]["name"] not in names}
    return tuple(fresh.values())
