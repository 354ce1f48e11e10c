"""The engine's core under random traffic: whatever comes together, each answer is what the request alone would get."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pippin.config import EngineConfig
from pippin.core import EngineCore
from pippin.errors import RequestError
from pippin.loading import load_core
from pippin.messages import Output, Submit
from pippin.types import Finish, SamplingParams, TokenLogprob
from tests.checkpoints import COMMON, make_checkpoint

VOCAB = COMMON["vocab_size"]
CONTEXT = 96


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("model")
    return make_checkpoint(path, "qwen3", head_dim=16, num_hidden_layers=2)


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("hybrid"), "falcon_h1")


@pytest.fixture(scope="module")
def alone(checkpoint: Path) -> Alone:
    return alone_with(checkpoint, "padded")


@pytest.fixture(scope="module")
def hybrid_alone(hybrid: Path) -> Alone:
    return alone_with(hybrid, "solo_padded")


def alone_with(path: Path, backend: str) -> Alone:
    return Alone(
        load_core(
            EngineConfig(
                model_path=str(path),
                context_length=CONTEXT,
                max_total_tokens=CONTEXT,
                disable_radix_cache=True,
                disable_overlap_schedule=True,
                attention_backend=backend,
            )
        )
    )


@dataclass(slots=True)
class Answer:
    """All that a request was told, in order."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    num_cached: int = 0
    finish: Finish | None = None

    def add(self, output: Output) -> None:
        assert self.finish is None, "something came after the end"
        self.tokens += output.tokens
        self.logprobs += output.logprobs
        self.prompt_logprobs += output.prompt_logprobs
        assert output.num_cached >= self.num_cached
        self.num_cached = output.num_cached
        self.finish = output.finish


class Alone:
    """Answers by a core that serves one request at a time, caches nothing and never looks ahead."""

    def __init__(self, core: EngineCore) -> None:
        self._core = core

    def answer(self, submit: Submit) -> Answer:
        answer = Answer()
        self._core.add(submit)
        while self._core.has_work:
            step = self._core.step()
            for output in step.outputs if step else ():
                answer.add(output)
        assert answer.finish is not None
        return answer


def random_params(source: random.Random) -> SamplingParams:
    """Anything that may come together in a batch."""
    longest = source.choice([1, 2, 5, 12, 30, 10**9])
    logprobs = source.random() < 0.3
    return SamplingParams(
        max_new_tokens=longest,
        min_new_tokens=source.choice([0, 0, 0, min(longest, 6)]),
        temperature=source.choice([0.0, 0.0, 0.7, 1.5]),
        top_p=source.choice([1.0, 1.0, 0.8]),
        top_k=source.choice([-1, -1, 1, 20, 10_000]),
        min_p=source.choice([0.0, 0.0, 0.05]),
        frequency_penalty=source.choice([0.0, 0.0, 0.5, -0.5]),
        presence_penalty=source.choice([0.0, 0.0, 1.0]),
        repetition_penalty=source.choice([1.0, 1.0, 1.2, 0.9]),
        logit_bias=source.choice([{}, {}, {7: 5.0, 9: -100.0, VOCAB: 100.0, 2**40: 100.0}]),
        seed=source.choice([0, 1, -5, 2**64 - 1]),
        stop_token_ids=source.choice([(), (), tuple(range(40)), (VOCAB + 5, 2**50)]),
        ignore_eos=source.random() < 0.5,
        logprobs=logprobs,
        top_logprobs=source.choice([0, 3, 100]) if logprobs else 0,
        prompt_logprobs=source.random() < 0.15,
    )


def random_submits(source: random.Random, count: int, longest: int) -> list[Submit]:
    """Prompts that share beginnings of every length, some of one token, some as long as can be served."""
    trunks = [[source.randrange(VOCAB) for _ in range(longest)] for _ in range(3)]
    found = []
    for i in range(count):
        trunk = source.choice(trunks)
        prompt = trunk[: source.choice([0, 5, 16, 17, longest // 2, longest])]
        prompt = (prompt + [source.randrange(VOCAB) for _ in range(source.choice([1, 1, 3, 20]))])[-longest:]
        found.append(Submit(f"r{i}", prompt, len(prompt), random_params(source), source.choice([0, 0, 0, 1, -1])))
    return found


def random_options(source: random.Random) -> dict[str, Any]:
    return {
        "page_size": source.choice([1, 1, 2, 4, 16]),
        "chunked_prefill_size": source.choice([1, 2, 7, 16, 64, 512]),
        "max_running_requests": source.choice([1, 2, 5, 16]),
        "max_total_tokens": source.choice([48, 100, 200, 2000]),
        "schedule_policy": source.choice(["fcfs", "lpm"]),
        "disable_radix_cache": source.random() < 0.2,
        "disable_overlap_schedule": source.random() < 0.3,
        "attention_backend": source.choice(["rows", "rows", "padded"]),
        "context_length": CONTEXT,
    }


def drive(core: EngineCore, submits: list[Submit], source: random.Random) -> dict[str, Answer]:
    """Lets requests come, and some go, at any step; flushes are tried on the way. Every request must end."""
    coming = list(submits)
    answers = {submit.id: Answer() for submit in submits}
    for _ in range(20_000):
        while coming and (source.random() < 0.3 or not core.has_work):
            core.add(coming.pop(0))
        if source.random() < 0.03:
            core.abort(source.choice(submits).id)
        if source.random() < 0.03:
            flush(core)
        step = core.step()
        for output in step.outputs if step else ():
            answers[output.id].add(output)
        if step:
            stats = step.stats
            assert 0 <= stats.slots_cached <= stats.slots_total
            assert 0 <= stats.slots_free <= stats.slots_total
        if not (coming or core.has_work):
            assert all(answer.finish for answer in answers.values())
            return answers
    raise AssertionError("the engine never came to rest")


def flush(core: EngineCore) -> None:
    running = core.stats.num_running + core.stats.num_waiting
    try:
        core.flush()
    except RequestError:
        assert running
    else:
        assert not running
        assert core.stats.slots_free == core.stats.slots_total


def same_logprobs(found: list[TokenLogprob], expected: list[TokenLogprob]) -> None:
    assert [p.token for p in found] == [p.token for p in expected]
    for mine, other in zip(found, expected, strict=True):
        assert mine.logprob == pytest.approx(other.logprob, abs=2e-4)
        assert [p for _, p in mine.top] == pytest.approx([p for _, p in other.top], abs=2e-4)


@pytest.mark.parametrize("seed", range(8))
def test_each_answer_is_what_the_request_alone_would_get(checkpoint: Path, alone: Alone, seed: int) -> None:
    source = random.Random(seed)
    compare(checkpoint, alone, random_options(source), source)


@pytest.mark.parametrize("seed", range(4))
def test_so_it_is_where_a_model_keeps_recurrent_state(hybrid: Path, hybrid_alone: Alone, seed: int) -> None:
    source = random.Random(seed)
    more = {"attention_backend": "solo", "max_mamba_cache_size": source.choice([None, 0, 2, 10])}
    compare(hybrid, hybrid_alone, random_options(source) | more, source)


def compare(checkpoint: Path, alone: Alone, options: dict[str, Any], source: random.Random) -> None:
    core = load_core(EngineConfig(model_path=str(checkpoint), **options))
    pool = core.info.max_total_tokens
    limited = alone_within(alone, pool)
    asked = [(s, limited(s)) for s in random_submits(source, 18, min(pool, CONTEXT - 1, 60))]
    asked = [resumed(*pair, source) if source.random() < 0.2 else pair for pair in asked]
    submits = [submit for submit, _ in asked]
    answers = drive(core, submits, source)
    for submit, expected in asked:
        found = answers[submit.id]
        assert found.finish is not None
        if found.finish.reason == "abort":
            assert found.tokens == expected.tokens[: len(found.tokens)]
            continue
        assert (found.tokens, found.finish) == (expected.tokens, expected.finish), (submit, options)
        same_logprobs(found.logprobs, expected.logprobs)
        same_logprobs(found.prompt_logprobs, expected.prompt_logprobs)
    stats = core.stats
    assert (stats.num_running, stats.num_waiting) == (0, 0)
    assert stats.prompt_tokens == sum(s.num_prompt for s in submits)
    assert stats.cached_tokens == sum(a.num_cached for a in answers.values())
    core.flush()
    assert core.stats.slots_free == stats.slots_total


def resumed(submit: Submit, whole: Answer, source: random.Random) -> tuple[Submit, Answer]:
    """The request of a stream that broke off somewhere, and what is still to come; prompt logprobs were sent before."""
    seen = source.randrange(len(whole.tokens))
    rest = Answer(whole.tokens[seen:], whole.logprobs[seen:], [], 0, whole.finish)
    again = msgspec.structs.replace(submit, tokens=submit.tokens + whole.tokens[:seen])
    return again, rest if seen else whole


def alone_within(alone: Alone, pool: int) -> Callable[[Submit], Answer]:
    """Answers cut where a pool of so many slots ends them."""

    def answer(submit: Submit) -> Answer:
        room = max(1, min(pool + 1, CONTEXT) - submit.num_prompt)
        params = submit.params
        if params.max_new_tokens > room:
            params = msgspec.structs.replace(
                params, max_new_tokens=room, min_new_tokens=min(room, params.min_new_tokens)
            )
        return alone.answer(msgspec.structs.replace(submit, params=params))

    return answer
