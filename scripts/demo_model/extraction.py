"""Fields of a sentence as JSON, for the fields that a schema or a list names."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

from demo_model.chat import Exchange, Message, assistant, system, user
from demo_model.lexicon import (
    ANIMALS,
    COLOURS,
    FOODS,
    JOBS,
    PLACES,
    PRODUCTS,
    a,
    city,
    first_name,
    full_name,
    invented_word,
    plural,
)

Value = str | int | bool | None
MONTHS = (
    "January February March April May June July August September October November December"  # order matters
).split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()


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

# Sentences; {a_x} is x with its article, {x_s} its plural, {paid_word} the word for a boolean.
SENTENCES = """{name} is {age} years old and lives in {city}.
{name}, {age}, works as {a_job} in {city}.
My name is {name}, I am {age} and I work as {a_job}.
{name} is {a_job} from {city}. You can write to {email}.
{name} from {company} can be reached at {email} or {phone}.
Please call {name} at {phone} on {day} at {time}.
{name} ordered {quantity} {product_s} for {price} euros.
On {date}, {name} bought {a_product} for {price} euros.
Order {order_id}: {quantity} {color} {product_s}, {price} euros each, ship to {city}.
Order {order_id} by {name} for {price} dollars {paid_word} paid.
{name} has {a_color} {animal} called {pet_name}.
{name} from {city} has {a_animal} named {pet_name} that is {age} years old.
The train from {origin} to {destination} leaves at {time} from platform {platform}.
{name} travels from {origin} to {destination} on {day}.
The bus to {destination} leaves {origin} on {day} at {time}, and the ticket is {price} euros.
{name} booked a table for {guests} people on {day} at {time}.
The meeting with {name} is on {date} at {time} in room {room}.
{name} reserved room {room} in {city} for {guests} guests from {date}.
{name} walked {distance} kilometres to the {place} on {day}.
At the market in {city}, {name} sold {quantity} {food_s} for {price} cents.
{company} in {city} sells {color} {product_s} for {price} euros.
{company} hired {name}, {a_job} of {age} years, on {date}.
The invoice {order_id} from {company} over {price} euros {paid_word} paid.
{name} saw {a_color} {animal} near the {place} on {date}.
On {day} at {time}, {name} ate {quantity} {food_s} in {city}.
Yesterday {name} moved from {origin} to {destination} to work as {a_job}.""".split("\n")
INTEGERS = {"age", "quantity", "price", "guests", "platform", "distance", "room"}
_FIELDS = {s: [f for f in DRAW if any(f"{{{p}{f}{q}}}" in s for p in ("", "a_") for q in ("", "_s", "_word"))] for s in SENTENCES}


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
        names = ", ".join(fields) if len(fields) == 1 or rng.random() < 0.5 else f"{', '.join(fields[:-1])} and {fields[-1]}"
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
