"""One batch, from prompts to tokens, on whatever runs it: the engine's own runner, or a peer's loop.

``EngineRunner`` gives a ModelRunner, be it MLX's or PyTorch's, the steps that the engine gives it, without a scheduler:
prompts in chunks, then decodes of all, the next step queued before the one before is read. So what is measured is what
serves: the attention backend that the probe chose, the pool, the compiled steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from pippin.cache.slots import SlotAllocator
from pippin.errors import EngineError
from pippin.flight import Flight, ModelRunner
from pippin.messages import ModelInfo
from pippin.types import Batch, Request, SamplingParams, Token, Work

Prompts = Sequence[Sequence[Token]]


class BenchRunner(Protocol):
    """What can be measured: greedy answers to a batch of prompts, that nothing ends early."""

    def prefill(self, prompts: Prompts, output_len: int) -> list[Token]:
        """Computes all prompts, with room for ``output_len`` tokens; the first token of each answer, in order."""
        ...

    def decode(self) -> Iterator[list[Token]]:
        """One further token of each answer at a time, ``output_len - 1`` times in all; each when it is there."""
        ...

    def clear(self) -> None:
        """Forgets the batch; ``prefill`` may come again."""
        ...


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds until every answer has its first token, then of each further step; ``tokens`` are the answers."""

    prefill: float
    steps: list[float]
    tokens: list[list[Token]]


def timed(
    runner: BenchRunner, prompts: Prompts, output_len: int, clock: Callable[[], float] = time.perf_counter
) -> Timing:
    """Runs one batch from its prompts to the end of its answers."""
    at = clock()
    answers = [[token] for token in runner.prefill(prompts, output_len)]
    now = clock()
    prefill, steps = now - at, []
    for tokens in runner.decode():
        at, now = now, clock()
        steps.append(now - at)
        for answer, token in zip(answers, tokens, strict=True):
            answer.append(token)
    runner.clear()
    return Timing(prefill, steps, answers)


class EngineRunner:
    """A BenchRunner over a ModelRunner; ``overlap`` queues each step before the one before is read.

    Raises EngineError if a batch does not fit ``info``'s slots or rows, or if the logits hold nothing finite.
    """

    def __init__(self, runner: ModelRunner, info: ModelInfo, *, overlap: bool = True) -> None:
        self._runner = runner
        self._info = info
        self._overlap = overlap
        self._allocator = SlotAllocator(info.max_total_tokens // info.page_size + 1, info.page_size)
        self._requests: list[Request] = []
        self._ids = 0
        self._cut = 0

    def prefill(self, prompts: Prompts, output_len: int) -> list[Token]:
        self.clear()
        self._requests = [self._admit(prompt, row, output_len) for row, prompt in enumerate(prompts, 1)]
        for _ in self._run(self._chunks()):
            pass
        return [r.tokens[-1] for r in self._requests]

    def decode(self) -> Iterator[list[Token]]:
        steps = min(r.params.max_new_tokens - (r.length - r.num_prompt) for r in self._requests)
        for _ in self._run(self._next() for _ in range(steps)):
            yield [r.tokens[-1] for r in self._requests]

    def clear(self) -> None:
        for request in self._requests:
            self._allocator.free(self._allocator.pages_of(request.slots))
        self._requests = []

    @contextmanager
    def over(self, runner: ModelRunner) -> Iterator[None]:
        """Gives the steps to another runner meanwhile, one that stands in front of the first."""
        before, self._runner = self._runner, runner
        try:
            yield
        finally:
            self._runner = before

    @contextmanager
    def cutting(self, count: int) -> Iterator[None]:
        """Computes the first ``count`` tokens of each prompt in a step of their own meanwhile; 0 for none."""
        before, self._cut = self._cut, count
        try:
            yield
        finally:
            self._cut = before

    def _admit(self, prompt: Sequence[Token], row: int, output_len: int) -> Request:
        size = self._info.page_size
        pages = self._allocator.allocate(-(-(len(prompt) + output_len) // size))
        if pages is None or row > self._info.max_running_requests:
            raise EngineError(
                f"the batch takes more than {self._info.max_total_tokens} slots (--max-total-tokens) "
                f"or {self._info.max_running_requests} rows (--max-running-requests)"
            )
        self._ids += 1
        params = SamplingParams(temperature=0.0, max_new_tokens=output_len, ignore_eos=True)
        request = Request(f"bench-{self._ids}", list(prompt), len(prompt), params, row=row)
        request.slots = self._allocator.slots_of(pages)
        return request

    def _chunks(self) -> Iterator[Batch]:
        """The prompts in steps of ``chunked_prefill_size`` tokens, as the scheduler would cut them."""
        firsts = [(r, min(self._cut, r.num_prompt - 1)) for r in self._requests]
        if first := tuple(_compute(request, count) for request, count in firsts if count):
            yield Batch(first)
        works: list[Work] = []
        left = self._info.chunked_prefill_size
        for request in self._requests:
            while request.computed < request.num_prompt:
                count = min(left, request.num_prompt - request.computed)
                works.append(_compute(request, count))
                left -= count
                if not left:
                    yield Batch(tuple(works))
                    works, left = [], self._info.chunked_prefill_size
        if works:
            yield Batch(tuple(works))

    def _next(self) -> Batch:
        return Batch(tuple(_compute(r, 1) for r in self._requests))

    def _run(self, batches: Iterable[Batch]) -> Iterator[None]:
        """Queues each batch, and stops after each that has been read."""
        previous: Flight | None = None
        for batch in batches:
            flight = self._runner.launch(batch)
            if not self._overlap:
                _read(flight)
                yield
                continue
            if previous is not None:
                _read(previous)
                yield
            previous = flight
        if previous is not None:
            _read(previous)
            yield


def _compute(request: Request, count: int) -> Work:
    """Schedules the next ``count`` tokens of a request: its counts run ahead of the step."""
    start, end = request.computed, request.computed + count
    samples = end == request.length
    request.computed = end
    request.length += samples
    return Work(request, start, end, samples)


def _read(flight: Flight) -> None:
    """Waits for a step, and gives each request the token that it drew."""
    for work, result in zip(flight.batch.works, flight.read(), strict=True):
        if work.samples:
            if result.token is None or not result.finite:
                raise EngineError("the model's logits hold no finite number; nothing to draw from")
            work.request.tokens.append(result.token)
