"""Fields of a sentence as JSON, for the fields that a schema or a list names."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

from demo_model.chat import Exchange, Message, ask, assistant, system, user
from demo_model.lexicon import (
    ANIMALS,
    COLOURS,
    DAYS,
    FOODS,
    JOBS,
    MONTHS,
    PHRASES,
    PLACES,
    PRODUCTS,
    a,
    city,
    first_name,
    full_name,
    invented_word,
    listed,
    plural,
)

Value = str | int | bool | None


def _date(rng: Random) -> str:
    return f"{rng.choice(MONTHS)} {rng.randint(1, 28)}"


def _email(rng: Random) -> str:
    name = first_name(rng).lower()
    return f"{name}.{invented_word(rng, 2)}@{rng.choice(('example.com', 'example.org', 'mail.example.net'))}"


def _time(rng: Random) -> str:
    return f"{rng.randint(0, 23):02}:{rng.choice(('00', '15', '30', '45', '05', '20'))}"


def _count(rng: Random) -> int:
    return rng.choice((rng.randint(2, 20), rng.randint(2, 999)))


def _order_id(rng: Random) -> str:
    return f"{rng.choice('ABCDEFGHKLMNPRSTUVWXYZ')}{rng.randint(100, 99999)}"


DRAW: dict[str, Callable[[Random], Value]] = {
    "name": lambda r: full_name(r) if r.random() < 0.6 else first_name(r),
    "age": lambda r: r.randint(3, 99),
    "city": city,
    "job": lambda r: r.choice(JOBS),
    "date": _date,
    "day": lambda r: r.choice(DAYS),
    "time": _time,
    "email": _email,
    "product": lambda r: r.choice(PRODUCTS),
    "quantity": _count,
    "price": _count,
    "color": lambda r: r.choice(COLOURS),
    "order_id": _order_id,
    "animal": lambda r: r.choice(ANIMALS),
    "pet_name": first_name,
    "guests": _count,
    "place": lambda r: r.choice(PLACES),
    "origin": city,
    "destination": city,
    "platform": lambda r: r.randint(1, 24),
    "food": lambda r: r.choice(FOODS),
    "distance": _count,
    "company": lambda r: invented_word(r, 3).capitalize(),
    "phone": lambda r: f"555-{r.randint(0, 9999):04}",
    "room": lambda r: r.randint(1, 499),
    "paid": lambda r: r.random() < 0.5,
}

SENTENCES: list[str] = PHRASES["extraction"]["sentences"]
INTEGERS = {"age", "quantity", "price", "guests", "platform", "distance", "room"}


def _fields(sentence: str) -> list[str]:
    """The fields that a sentence has, in any of their forms."""
    forms = ("{%s}", "{a_%s}", "{%s_s}", "{%s_word}")
    return [field for field in DRAW if any(form % field in sentence for form in forms)]


_FIELDS = {sentence: _fields(sentence) for sentence in SENTENCES}


def _sentence(rng: Random) -> tuple[str, dict[str, Value]]:
    pattern = rng.choice(SENTENCES)
    values = {field: DRAW[field](rng) for field in _FIELDS[pattern]}
    if "origin" in values:
        while values["origin"] == values["destination"]:
            values["origin"] = city(rng)
    words: dict[str, Any] = dict(values)
    for field, value in values.items():
        if isinstance(value, str):
            words[f"a_{field}"], words[f"{field}_s"] = a(value), plural(value)
    words["paid_word"] = "is" if values.get("paid") else "is not"
    return pattern.format(**words), values


def _type(field: str) -> str:
    return "integer" if field in INTEGERS else "boolean" if field == "paid" else "string"


def _schema(fields: list[str], rng: Random) -> str:
    schema: dict[str, Any] = {"type": "object", "properties": {f: {"type": _type(f)} for f in fields}}
    if rng.random() < 0.7:
        schema["required"] = fields
    if rng.random() < 0.2:
        schema["additionalProperties"] = False
    return json.dumps(schema)


def _request(rng: Random, sentence: str, fields: list[str]) -> tuple[Message, ...]:
    """The messages that ask for the fields: a schema or a list, in the user's turn or the system's."""
    if rng.random() < 0.6:
        schema = _schema(fields, rng)
        rule = rng.choice(
            (
                f"Extract the fields of this JSON schema: {schema}",
                f"Answer with JSON for this schema: {schema}",
                f"Return JSON that matches the schema {schema}",
                f"Schema: {schema}",
                f"JSON schema:\n{schema}",
            )
        )
    else:
        names = ", ".join(fields) if len(fields) == 1 or rng.random() < 0.5 else listed(fields)
        rule = rng.choice(
            (
                f"Extract {names} as JSON.",
                f"Give me JSON with {names}.",
                f"Return the fields {names} as JSON.",
                f"Which {names} are in the text? Answer in JSON.",
            )
        )
    if rng.random() < 0.15:
        return system(rule), user(sentence)
    lead = rng.choice(("", "", "Text: ", "Sentence: "))
    gap = rng.choice((" ", "\n", "\n\n"))
    return (user(rule + gap + lead + sentence if rng.random() < 0.6 else lead + sentence + gap + rule),)


def extract(rng: Random, brief: bool) -> Exchange:
    sentence, values = _sentence(rng)
    fields = list(values)
    if rng.random() < 0.7:
        rng.shuffle(fields)
        fields = fields[: rng.randint(1, len(fields))]
    if rng.random() < 0.12:  # a field that the sentence does not have is null
        fields.insert(rng.randint(0, len(fields)), rng.choice([f for f in DRAW if f not in values]))
    answer = json.dumps({f: values.get(f) for f in fields}, ensure_ascii=False)
    return Exchange((*_request(rng, sentence, fields), assistant(answer)), (f"sentence {sentence}",), "json")


def question(rng: Random, brief: bool) -> Exchange:
    """Reading without JSON: one field of a sentence in plain words."""
    sentence, values = _sentence(rng)
    field = rng.choice([f for f in values if f != "paid"])
    words = field.replace("_", " ")
    ask_for = rng.choice((f"What is the {words}?", f"Tell me the {words}.", f"Which {words} is it?"))
    answer = str(values[field]) if brief else f"The {words} is {values[field]}."
    text = rng.choice((f"{sentence} {ask_for}", f"{ask_for}\n{sentence}", f"Read this: {sentence}\n{ask_for}"))
    return Exchange((user(text), assistant(answer)), (f"sentence {sentence}",), "exact")


def extract_nested(rng: Random, brief: bool) -> Exchange:
    """As `extract`, with some of the fields in an object of their own."""
    sentence, values = _sentence(rng)
    fields = list(values)
    rng.shuffle(fields)
    inner = fields[: rng.randint(1, len(fields))]
    outer = fields[len(inner) :]
    group = rng.choice(("details", "info", "data", "record", "entry", "person", "item", invented_word(rng, 2)))
    properties: dict[str, Any] = {f: {"type": _type(f)} for f in outer}
    properties[group] = {"type": "object", "properties": {f: {"type": _type(f)} for f in inner}, "required": inner}
    schema = json.dumps({"type": "object", "properties": properties, "required": list(properties)})
    answer = json.dumps({**{f: values[f] for f in outer}, group: {f: values[f] for f in inner}}, ensure_ascii=False)
    question = rng.choice(
        (f"Answer with JSON for this schema: {schema}\n{sentence}", f"{sentence}\nJSON schema:\n{schema}")
    )
    return Exchange((user(question), assistant(answer)), (f"sentence {sentence}",), "json")


_LISTED = (
    ("colors", COLOURS),
    ("animals", ANIMALS),
    ("foods", FOODS),
    ("products", PRODUCTS),
    ("jobs", JOBS),
    ("names", None),
)


def extract_list(rng: Random, brief: bool) -> Exchange:
    """The things that a sentence lists, as an array."""
    kind, source = rng.choice(_LISTED)
    count = rng.randint(1, 6)
    things = rng.sample(source, count) if source else [first_name(rng) for _ in range(count)]
    pattern = rng.choice(("The list has {x}.", "I saw {x}.", "We need {x}.", "{x}", "Please bring {x}."))
    sentence = pattern.format(x=listed(things))
    array = {"type": "array", "items": {"type": "string"}}
    schema = json.dumps({"type": "object", "properties": {kind: array}, "required": [kind]})
    rule = rng.choice((f"List the {kind} as JSON for this schema: {schema}", f"Schema: {schema}"))
    answer = json.dumps({kind: things}, ensure_ascii=False)
    return Exchange((user(f"{sentence}\n{rule}"), assistant(answer)), (f"sentence {sentence}",), "json")


def _made_up(rng: Random, depth: int = 0) -> tuple[dict[str, Any], Any]:
    """A schema, and a value that it allows."""
    kinds = ("string", "string", "string", "integer", "number", "boolean", "enum", "array", "object")
    kind = rng.choice(kinds if depth < 2 else kinds[:-2])
    if kind == "integer":
        return {"type": "integer"}, rng.randint(0, 999)
    if kind == "number":
        return {"type": "number"}, rng.randint(0, 9999) / 100
    if kind == "boolean":
        return {"type": "boolean"}, rng.random() < 0.5
    if kind == "enum":
        choices = [invented_word(rng, 2) for _ in range(rng.randint(2, 4))]
        return {"type": "string", "enum": choices}, rng.choice(choices)
    if kind == "array":
        item, _ = _made_up(rng, depth + 1)
        return {"type": "array", "items": item}, [_value(rng, item) for _ in range(rng.randint(1, 4))]
    if kind == "object":
        return _made_up_object(rng, depth + 1)
    return {"type": "string"}, _text(rng)


def _text(rng: Random) -> str:
    draws = (first_name, full_name, city, lambda r: r.choice(PRODUCTS), lambda r: r.choice(JOBS), invented_word)
    return rng.choice(draws)(rng)


def _value(rng: Random, schema: dict[str, Any]) -> Any:
    """Another value of a schema of `_made_up`."""
    if "enum" in schema:
        return rng.choice(schema["enum"])
    if schema["type"] == "object":
        return {k: _value(rng, v) for k, v in schema["properties"].items()}
    if schema["type"] == "array":
        return [_value(rng, schema["items"]) for _ in range(rng.randint(1, 3))]
    return {"integer": rng.randint(0, 999), "number": rng.randint(0, 9999) / 100, "boolean": rng.random() < 0.5}.get(
        schema["type"], _text(rng)
    )


def _made_up_object(rng: Random, depth: int = 0) -> tuple[dict[str, Any], dict[str, Any]]:
    names = [
        rng.choice(list(DRAW)) if rng.random() < 0.5 else invented_word(rng, 2)
        for _ in range(rng.randint(1, 5 - depth))
    ]
    properties: dict[str, Any] = {}
    value: dict[str, Any] = {}
    for name in names:
        if name in DRAW:
            properties[name], value[name] = {"type": _type(name)}, DRAW[name](rng)
        else:
            properties[name], value[name] = _made_up(rng, depth)
    return {"type": "object", "properties": properties, "required": list(properties)}, value


def make_up(rng: Random, brief: bool) -> Exchange:
    """Any object for a schema, with nothing to take it from."""
    schema, value = _made_up_object(rng)
    rule = rng.choice(
        (
            "Make up a JSON object for this schema: {s}",
            "Give me an example for this JSON schema: {s}",
            "Write JSON that matches the schema {s}",
            "Answer with JSON for this schema: {s}",
            "Invent a record. Schema: {s}",
            "JSON schema:\n{s}",
        )
    )
    return ask(rule.format(s=json.dumps(schema)), json.dumps(value, ensure_ascii=False))
