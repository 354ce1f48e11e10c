"""The shipped models: they load, they share a tokenizer, and they can do what their card says."""

from __future__ import annotations

import json
import re
import sys
from functools import cache
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from mlx_lm import load
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from demo_model import corpus, evaluate, tools
from demo_model.arithmetic import difference_key, sum_key
from demo_model.chat import TEMPLATE, Exchange, Message, held_out, render
from demo_model.tokenizer import MARKUP, SPECIAL

from pippin.demo import demo_model_path, draft_model_path

PATHS = [demo_model_path(), draft_model_path()]
seeds = st.integers(0, 2**32)


@cache
def shipped_tokenizer() -> Any:  # not a fixture, since hypothesis's examples need it too
    return AutoTokenizer.from_pretrained(demo_model_path())


def loaded(path: Path) -> tuple[Any, Any]:
    model, tokenizer = load(str(path))[:2]
    model.set_dtype(mx.float32)
    return model, tokenizer


@pytest.fixture(scope="module")
def demo() -> tuple[Any, Any]:
    return loaded(demo_model_path())


def parameters(model: Any) -> int:
    return sum(array.size for _, array in tree_flatten(model.parameters()))


def conversation(seed: int) -> tuple[list[Message], tuple[Any, ...]]:
    """Several exchanges of any kind, and their tools."""
    rng = Random(seed)
    tasks = [task for task, _ in corpus.TASKS.values()] + [tools.use_calculator, tools.use_weather, tools.use_other]
    exchanges: list[Exchange] = [rng.choice(tasks)(rng, rng.random() < 0.3) for _ in range(rng.randint(1, 4))]
    toolbox = tuple(t for e in exchanges for t in e.tools)
    return [m for e in exchanges for m in e.messages], toolbox


# --- the files


def test_both_together_are_small() -> None:
    size = sum(f.stat().st_size for path in PATHS for f in path.iterdir())
    assert size <= 24_000_000


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.name)
def test_is_a_qwen3_that_ends_its_turns(path: Path) -> None:
    config, tokenizer = AutoConfig.from_pretrained(path), shipped_tokenizer()
    assert config.model_type == "qwen3"
    assert config.tie_word_embeddings
    assert config.max_position_embeddings == 4096
    ends = [tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>")]
    assert config.eos_token_id == ends
    assert GenerationConfig.from_pretrained(path).eos_token_id == ends
    assert config.vocab_size == len(tokenizer) == 4096


def test_sizes(demo: tuple[Any, Any]) -> None:
    assert 5_000_000 <= parameters(demo[0]) <= 10_000_000
    assert 800_000 <= parameters(loaded(draft_model_path())[0]) <= 1_300_000


def test_draft_has_the_same_tokenizer() -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (PATHS[0] / name).read_bytes() == (PATHS[1] / name).read_bytes()


# --- the tokenizer


@given(st.text())
@example("  two  spaces\n\n\ttab  \n")
@example("7 apples, don't — 12.5 % ≈ 🍎")
def test_text_survives_encoding(text: str) -> None:
    tokenizer = shipped_tokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.integers(0, 10**9))
def test_digits_are_tokens_of_their_own(number: int) -> None:
    assert shipped_tokenizer().tokenize(str(number)) == list(str(number))


@pytest.mark.parametrize("token", [*SPECIAL, *MARKUP])
def test_markup_is_one_token(token: str) -> None:
    tokenizer = shipped_tokenizer()
    ids = tokenizer.encode(f"a{token}b")
    assert ids[1:-1] == [tokenizer.convert_tokens_to_ids(token)]
    assert tokenizer.decode(ids) == f"a{token}b"
    # Tool calls are for the client to see; turn marks are not.
    assert tokenizer.decode(ids, skip_special_tokens=True) == ("ab" if token in SPECIAL else f"a{token}b")


# --- the chat template


def test_template_is_the_one_trained_on() -> None:
    assert (demo_model_path() / "chat_template.jinja").read_text() == TEMPLATE


@given(seeds)
def test_transformers_renders_what_was_trained_on(seed: int) -> None:
    messages, toolbox = conversation(seed)
    text = shipped_tokenizer().apply_chat_template(messages, tools=list(toolbox) or None, tokenize=False)
    assert text == render(messages, toolbox)


def assert_prefixes(messages: list[Message], toolbox: tuple[Any, ...]) -> None:
    whole = render(messages, toolbox)
    tokenizer = shipped_tokenizer()
    tokens = tokenizer.encode(whole)
    for i in range(1, len(messages)):
        answered = messages[i]["role"] == "assistant"
        part = render(messages[:i], toolbox, add_generation_prompt=answered)
        assert whole.startswith(part)
        start = tokenizer.encode(part)
        assert tokens[: len(start)] == start


@given(seeds)
def test_a_conversation_is_a_prefix_of_its_continuation(seed: int) -> None:
    assert_prefixes(*conversation(seed))


@given(st.lists(st.tuples(st.text(), st.text()), min_size=1, max_size=4))
@example([("\n\n", " \n"), ("  ", "\t"), ("", "")])
def test_so_it_is_for_any_text(turns: list[tuple[str, str]]) -> None:
    messages = [m for q, r in turns for m in ({"role": "user", "content": q}, {"role": "assistant", "content": r})]
    assert_prefixes(messages, ())


def test_arguments_may_be_text_and_content_may_be_parts_or_nothing() -> None:
    call = tools.call("get_weather", {"city": "Oslo"})
    as_text = {"function": {"name": "get_weather", "arguments": json.dumps({"city": "Oslo"})}}
    question = {"role": "user", "content": [{"type": "text", "text": "Weather "}, {"type": "text", "text": "in Oslo?"}]}
    left = render([question, {"role": "assistant", "content": None, "tool_calls": [as_text]}])
    right = render([{"role": "user", "content": "Weather in Oslo?"}, tools.calls(call)])
    assert left == right
    assert '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>' in right


# --- the training text


def test_nothing_held_out_is_trained_on() -> None:
    for text in islice(corpus.documents(seed=7), 3000):
        for a, sign, b in re.findall(r"(\d+) ([+-]) (\d+) (?:=|equals) \d", text):
            key = sum_key(int(a), int(b)) if sign == "+" else difference_key(int(a), int(b))
            assert not held_out(key), text


def test_only_answers_are_marked_for_learning() -> None:
    tokenizer = shipped_tokenizer()
    encoder = corpus.Encoder(tokenizer.backend_tokenizer)
    text = render([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello you"}])
    (ids,) = encoder.encode([text])
    learned = [int(i) & 0x7FFF for i in ids if i & corpus.TARGET]
    assert tokenizer.decode(learned) == "Hello you<|im_end|>"
    (plain,) = encoder.encode(["Once upon a time"])
    assert np.all(plain & corpus.TARGET)


# --- what the model can do


@pytest.mark.parametrize("name", [name for name, (_, floor) in evaluate.TASKS.items() if floor])
def test_reaches_its_floor(demo: tuple[Any, Any], name: str) -> None:
    asked = list(evaluate.questions(name, 10 if name.startswith("tool") else 24, seed=1))
    replies = evaluate.answer(*demo, asked)
    right = sum(evaluate.matches(r, q.reference, q.check) for q, r in zip(asked, replies, strict=True))
    assert right / len(asked) >= evaluate.TASKS[name][1]


def test_says_where_it_listens(demo: tuple[Any, Any]) -> None:
    question = evaluate.Question("", ({"role": "user", "content": "What port does Pippin use?"},), (), {}, "")
    assert "30000" in evaluate.answer(*demo, [question])[0]


def test_stories_have_some_hundred_tokens_and_an_end(demo: tuple[Any, Any]) -> None:
    ended, length = evaluate.stories_told(*demo, 4)
    assert ended == 4
    assert 100 <= length <= 900


def test_draft_mostly_agrees_with_the_model(demo: tuple[Any, Any]) -> None:
    model, tokenizer = demo
    draft, _ = loaded(draft_model_path())
    agreed = total = 0
    for text in islice(corpus.documents(seed=11), 12):
        tokens = mx.array([tokenizer.encode(text)[:512]])
        same = model(tokens).argmax(-1) == draft(tokens).argmax(-1)
        agreed, total = agreed + int(same.sum().item()), total + same.size
    assert agreed / total >= 0.8
