"""The engine's process killed and stopped under streams of the shipped model: each ends as if nothing had happened.

A few in CI. ``make soak`` sets PIPPIN_SOAK: 200 streams and 20 deaths.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from dataclasses import dataclass
from typing import Any

import pytest

from pippin.client import EngineClient
from pippin.config import EngineConfig
from pippin.errors import EngineError
from pippin.restarts import Supervision
from pippin.supervisor import Supervisor
from pippin.types import Grammar, SamplingParams, TokenLogprob
from tests.fake_core import PYTHONPATH

SOAK = bool(os.environ.get("PIPPIN_SOAK"))
STREAMS, DEATHS, TOKENS = (200, 20, 400) if SOAK else (12, 3, 60)
Asked = tuple[list[int], SamplingParams]

TIE = 1e-4
"""Nats. Where a model's two likeliest tokens are closer, sums in another order may choose the other one."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a stream was told; ``firm`` tokens of it hang on no rounding."""

    tokens: list[int]
    logprobs: list[TokenLogprob]
    reason: str

    @property
    def firm(self) -> int:
        tops = [one.top for one in self.logprobs]
        ties = (i for i, top in enumerate(tops) if len(top) > 1 and top[0][1] - top[1][1] < TIE)
        return next(ties, len(self.tokens))

    def upto(self, firm: int) -> tuple[list[int], int, str]:
        """Up to a tie, or all of it."""
        return self.tokens[:firm], len(self.logprobs), self.reason


def asked(source: random.Random) -> list[Asked]:
    """Greedy and seeded, with penalties, grammars and logprobs, some prompts with a common beginning."""
    common, found = [source.randrange(5, 1000) for _ in range(24)], list[Asked]()
    for i in range(STREAMS):
        prompt = common[: source.choice([0, 16, 24])] + [
            source.randrange(5, 1000) for _ in range(source.randrange(1, 9))
        ]
        params: dict[str, Any] = {"temperature": float(i % 2), "seed": i, "ignore_eos": True, "logprobs": i % 3 == 0}
        if i % 2 == 0:  # greedy: see where it is undecided
            params |= {"logprobs": True, "top_logprobs": 2}
        if i % 4 == 1:
            params |= {"frequency_penalty": 0.5, "top_p": 0.9}
        if i % 6 == 5:
            params |= {"grammar": Grammar("regex", "[a-z ]{20,200}"), "ignore_eos": False}
        found.append((prompt, SamplingParams(max_new_tokens=source.randrange(TOKENS // 2, TOKENS), **params)))
    return found


async def answers(client: EngineClient, everyone: list[Asked], refusal: str | None = None) -> list[Answer]:
    """Of all of them at once. A 503 that says ``refusal`` is a reason as any other."""

    async def one(prompt: list[int], params: SamplingParams) -> Answer:
        tokens, logprobs, reason = list[int](), list[TokenLogprob](), ""
        try:
            async for output in client.submit(prompt, params):
                tokens += output.tokens
                logprobs += output.logprobs
                reason = output.finish.reason if output.finish else ""
        except EngineError as error:
            if refusal is None or error.status != 503 or refusal not in str(error):
                raise
            reason = refusal
        return Answer(tokens, logprobs, reason)

    return await asyncio.gather(*(one(*each) for each in everyone))


def different(found: list[Answer], undisturbed: list[Answer]) -> list[int]:
    """The streams that were told something else."""
    pairs = enumerate(zip(found, undisturbed, strict=True))
    return [i for i, (one, other) in pairs if one.upto(other.firm) != other.upto(other.firm)]


def test_a_stream_is_compared_up_to_where_the_model_itself_is_undecided() -> None:
    def answer(tokens: list[int], gaps: list[float]) -> Answer:
        tops = [TokenLogprob(t, -1.0, [(t, -1.0), (t + 1, -1.0 - gap)]) for t, gap in zip(tokens, gaps, strict=True)]
        return Answer(tokens, tops, "length")

    sure, tied = answer([5, 6, 7], [1.0, 1.0, 1.0]), answer([5, 6, 7], [1.0, 2e-6, 1.0])
    assert different([answer([5, 7, 9], [1.0, 1.0, 1.0])] * 2, [sure, tied]) == [0]
    assert different([answer([6, 6, 7], [1.0, 1.0, 1.0])], [tied]) == [0]
    assert different([Answer([5], [], "length")], [Answer([6], [], "length")]) == [0]


async def strike(client: EngineClient, source: random.Random, number: signal.Signals, times: int) -> None:
    """Each at a random moment after the engine is back."""
    supervisor, pid = client.transport, None
    assert isinstance(supervisor, Supervisor)
    for _ in range(times):
        while not supervisor._ready or supervisor.pid in (None, pid):
            await asyncio.sleep(0.01)
        await asyncio.sleep(source.random() * (3 if SOAK else 0.6))
        while supervisor.journal.docket.trying:  # whoever kills then, it is the one on trial that seems to
            await asyncio.sleep(0.01)
        pid = supervisor.pid
        assert pid is not None
        os.kill(pid, number)


@pytest.mark.timeout(3600 if SOAK else 300)
@pytest.mark.parametrize(("number", "times"), [(signal.SIGKILL, DEATHS), (signal.SIGSTOP, 1)])
def test_every_stream_ends_with_the_tokens_of_an_undisturbed_run(
    monkeypatch: pytest.MonkeyPatch, number: signal.Signals, times: int
) -> None:
    monkeypatch.setenv("PYTHONPATH", PYTHONPATH)
    everyone = asked(random.Random(7))
    watched = Supervision(watchdog_timeout=60.0 if number == signal.SIGKILL else 8.0, max_restarts=100, back_off=(0.0,))
    config = EngineConfig(device="cpu", max_total_tokens=20_000 if SOAK else 4000, random_seed=1)

    async def main() -> None:
        client = EngineClient.spawn(config, log_level="critical", supervision=watched)
        try:
            await client.start()
            undisturbed = await answers(client, everyone)
            striking = asyncio.create_task(strike(client, random.Random(3), number, times))
            found = await answers(client, everyone)
            while not striking.done():  # in soak the streams may be done before the last death
                found = await answers(client, everyone)
                assert found == undisturbed
            await striking
        finally:
            await client.close()
        assert different(found, undisturbed) == []
        firm, whole = (sum(of) for of in zip(*((a.firm, len(a.tokens)) for a in undisturbed), strict=True))
        assert firm == whole or (SOAK and firm > 0.95 * whole), "without ties all is compared"
        assert {answer.reason for answer in found} <= {"length", "stop"}
        if number == signal.SIGKILL:
            assert client.stats.restarts == times
        assert client.stats.restarts >= times  # an engine that a busy machine starves for as long is replaced, too
        assert client.stats.resumed > 0
        told = f"{len(found)} streams, {times} of {number.name}: {client.stats.resumed} requests resumed"
        print(f"{told}, {firm} of {whole} tokens compared")

    asyncio.run(main())
