"""Conformance: 151 schemas of the shapes that people send, and the shipped model at temperature 1.

Whatever it makes of them is valid, says ``jsonschema``. A sample of 40 in ``make test``, all in ``make sweep``.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from pippin.config import EngineConfig
from pippin.core import EngineCore
from pippin.loading import load_core
from pippin.messages import Submit
from pippin.text.tokenizer import Tokenizer, load_tokenizer
from pippin.types import Grammar, SamplingParams

COLLECTION: dict[str, Any] = {
    line["name"]: line["schema"]
    for line in map(json.loads, (Path(__file__).parent / "data" / "schemas.jsonl").read_text("utf-8").splitlines())
}
SWEEP = os.environ.get("HYPOTHESIS_PROFILE") == "sweep"
BATCH = 10
LONGEST = 700  # tokens; the widest of them needs some 300

Judge = jsonschema.Draft202012Validator


@pytest.fixture(scope="module")
def core() -> EngineCore:
    return load_core(EngineConfig())


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(None)


def batches() -> list[list[str]]:
    source = random.Random(None if SWEEP else 6)
    names = [*COLLECTION]
    source.shuffle(names)
    names = names if SWEEP else names[:40]
    return [names[i : i + BATCH] for i in range(0, len(names), BATCH)]


def test_the_collection_is_what_it_says() -> None:
    assert len(COLLECTION) >= 150
    assert len({json.dumps(schema, sort_keys=True) for schema in COLLECTION.values()}) == len(COLLECTION)
    for schema in COLLECTION.values():
        Judge.check_schema(schema)


@pytest.mark.parametrize("names", batches(), ids=lambda names: names[0])
def test_what_the_model_writes_at_temperature_1_is_valid(
    core: EngineCore, tokenizer: Tokenizer, names: list[str]
) -> None:
    seed = random.Random().getrandbits(32) if SWEEP else 11
    prompt = tokenizer.encode("<|im_start|>user\nWrite JSON.<|im_end|>\n<|im_start|>assistant\n", False)
    for name in names:
        grammar = Grammar("json_schema", json.dumps(COLLECTION[name]))
        params = SamplingParams(max_new_tokens=LONGEST, temperature=1.0, seed=seed, grammar=grammar)
        core.add(Submit(name, prompt, len(prompt), params))
    told: dict[str, list[int]] = {name: [] for name in names}
    finishes = {}
    while core.has_work:
        step = core.step()
        for output in step.outputs if step else ():
            told[output.id] += output.tokens
            finishes[output.id] = output.finish
    for name in names:
        text = tokenizer.decode(told[name])
        finish = finishes[name]
        assert finish is not None
        assert finish.reason == "stop", f"{name} (seed {seed}): {finish}, {text!r}"
        wrong = [e.message for e in judge(COLLECTION[name]).iter_errors(json.loads(text))]
        assert not wrong, f"{name} (seed {seed}): {text!r}: {wrong}"


def judge(schema: Any) -> Any:
    return Judge(schema, format_checker=Judge.FORMAT_CHECKER)


def test_the_judge_sees_what_is_wrong() -> None:
    schema = COLLECTION["person"]
    good = {"name": "Ann", "age": 5}
    assert not list(judge(schema).iter_errors(good))
    for bad in ({"name": "Ann"}, good | {"age": 121}, good | {"x": 1}, good | {"email": "no"}):
        assert list(judge(schema).iter_errors(bad)), bad
