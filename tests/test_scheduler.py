"""The scheduler, driven with a device that checks every slot that a step reads; see fake_device.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pippin.errors import RequestError
from pippin.scheduler import Scheduler
from pippin.types import Finish, Pooling, Request, RowResult, SamplingParams
from tests.fake_device import VOCAB, Loop, Story, alone, check_idle, endless, vector

loops: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {
        "page": st.sampled_from([1, 1, 2, 4]),
        "num_pages": st.integers(6, 60),
        "chunk": st.sampled_from([1, 2, 5, 8, 32]),
        "max_running": st.integers(1, 6),
        "policy": st.sampled_from(["fcfs", "lpm"]),
        "context_length": st.sampled_from([12, 40, 1000]),
        "overlap": st.booleans(),
        "cache": st.sampled_from([True, True, True, False]),
        "states": st.sampled_from([None, None, 0, 2, 100]),
        "window": st.none() | st.tuples(st.sampled_from([1, 2, 3, 8, 20]), st.sampled_from([0, 1, 3, 10, 40])),
    }
)


@dataclass
class Traffic:
    """Random arrivals, follow-up turns, repeats, resumed streams, stops, aborts and failed steps."""

    loop: Loop
    rng: Random
    faults: float = 0.0
    fails: tuple[str, ...] = ("launch", "read")
    pools: bool = False
    asked: list[tuple[Request, list[int]]] = field(default_factory=list)

    def arrive(self) -> None:
        tokens = self._tokens()
        params = self._params()
        num_prompt = len(tokens)
        story = Story(list(tokens))
        if self.rng.random() < 0.15:  # a stream that was cut off, and comes back with what it had
            story.upto(num_prompt + self.rng.randrange(1, params.max_new_tokens + 1))
        priority = self.rng.choice([0, 0, 0, 1, -1])
        if self.pools and len(story.tokens) == num_prompt and self.rng.random() < 0.3:
            self._pool(story.tokens, priority)
            return
        for _ in range(self.rng.choice([1, 1, 1, 4])):
            if num_prompt > min(self.loop.allocator.capacity, self.loop.context_length - 1):
                with pytest.raises(RequestError, match="the prompt has"):
                    self.loop.add(story.tokens, params, num_prompt=num_prompt)
                continue
            request = self.loop.add(story.tokens, params, num_prompt=num_prompt, priority=priority)
            self.asked.append((request, list(story.tokens)))

    def _pool(self, tokens: list[int], priority: int) -> None:
        if len(tokens) <= min(self.loop.allocator.capacity, self.loop.context_length):
            kind = Pooling(self.rng.choice(["mean", "last"]))
            request = self.loop.add(tokens, priority=priority, pooling=kind)
            self.asked.append((request, list(tokens)))

    def _tokens(self) -> list[int]:
        rng = self.rng
        kind = rng.random()
        if self.asked and kind < 0.3:
            earlier = rng.choice(self.asked)[0].tokens
            return [*earlier, *(rng.randrange(VOCAB) for _ in range(rng.randrange(1, 6)))]
        if self.asked and kind < 0.6:
            earlier = rng.choice(self.asked)[0].tokens
            return earlier[: rng.randrange(1, len(earlier) + 1)]
        return [rng.randrange(3) for _ in range(rng.randrange(1, rng.choice([4, 12, 40])))]

    def _params(self) -> SamplingParams:
        rng = self.rng
        most = rng.choice([1, 2, 5, 12, 30])
        return SamplingParams(
            max_new_tokens=most,
            min_new_tokens=rng.choice([0, 0, min(3, most)]),
            ignore_eos=rng.random() < 0.5,
            stop_token_ids=rng.choice([(), (), (5, 9)]),
            prompt_logprobs=rng.random() < 0.15,
        )

    def play(self, steps: int) -> None:
        rng = self.rng
        for _ in range(steps):
            if rng.random() < 0.4:
                self.arrive()
            if self.asked and rng.random() < 0.08:
                self.loop.abort(rng.choice(self.asked)[0])
            fails = rng.choice(self.fails) if rng.random() < self.faults else ""
            gone = rng.choice(self.asked)[0] if self.asked and rng.random() < 0.08 else None
            self.loop.step(fails, gone)

    def judge(self) -> None:
        """Every request came to what it comes to alone, or to the beginning of it if it was cut off."""
        for request, given_tokens in self.asked:
            if request.pooling is not None:
                self._judge_vector(request, request.pooling)
                continue
            limit = self.loop.limit(request)
            tokens, finish = alone(given_tokens, request.num_prompt, request.params, limit)
            assert request.finish is not None
            if request.finish.reason in ("abort", "error"):
                assert request.tokens == tokens[: len(request.tokens)]
                continue
            assert request.finish == finish
            assert request.tokens == tokens
            assert 0 <= request.num_cached < len(given_tokens)
            assert request.num_cached <= request.num_prompt
            if request.params.prompt_logprobs and len(given_tokens) == request.num_prompt:
                assert self.loop.scored.get(request.id, []) == tokens[1 : request.num_prompt]
            else:
                assert not self.loop.scored.get(request.id)

    def _judge_vector(self, request: Request, pooling: Pooling) -> None:
        assert request.finish is not None
        if request.finish.reason == "stop":
            first = 0 if pooling.kind == "mean" else request.num_prompt - 1
            assert request.pooled is not None
            assert request.pooled.tolist() == vector(range(first, request.num_prompt)).tolist()
        else:
            assert request.finish.reason in ("abort", "error")


@given(options=loops, seed=st.integers(0, 2**32))
def test_any_traffic_comes_to_what_each_request_comes_to_alone(options: dict[str, Any], seed: int) -> None:
    traffic = Traffic(Loop(**options), Random(seed))
    traffic.play(60)
    traffic.loop.run()
    traffic.judge()


@given(options=loops, seed=st.integers(0, 2**32))
def test_tokens_that_are_forced_are_those_that_would_be_drawn(options: dict[str, Any], seed: int) -> None:
    traffic = Traffic(Loop(**options, forcing=Random(seed)), Random(seed), faults=0.05)
    traffic.play(60)
    traffic.loop.run()
    traffic.judge()
    assert traffic.loop.scheduler.stats().forced_tokens == traffic.loop.forced


def test_nobody_stands_on_what_another_skipped_to_in_the_same_step() -> None:
    """Forced tokens that another computed: the newest is a decode then, which runs behind all who might read it."""
    loop = Loop(
        num_pages=102,
        chunk=2,
        max_running=2,
        policy="lpm",
        context_length=40,
        states=100,
        least_cut=4,
        window=(20, 40),
        forcing=Random(900447),
    )
    traffic = Traffic(loop, Random(900447), faults=0.05)
    traffic.play(80)
    loop.run()
    traffic.judge()


def test_a_forced_span_takes_one_step() -> None:
    loop = Loop(chunk=32)
    request = loop.add([1, 2, 3], endless(30))
    loop.step()
    loop.step()
    story = loop.device.stories[request.seq]
    story.upto(40)
    steps = len(loop.batches)
    assert loop.scheduler.force(request, story.tokens[4:24], None) == story.tokens[4:24]
    loop.step()
    work = loop.batches[steps].works[0]
    assert (work.start, work.end, work.samples) == (4, 24, True)
    loop.run()
    assert request.tokens == story.tokens[:33]


@pytest.mark.parametrize("ended", [None, Finish("stop")])
def test_a_forced_span_ends_at_the_limit_or_with_the_grammar(ended: Finish | None) -> None:
    loop = Loop()
    request = loop.add([1, 2, 3], endless(4))
    loop.step()
    loop.step()
    assert loop.scheduler.force(request, [7, 7, 7] if ended else [7] * 9, ended) == [7, 7, 7]
    assert request.finish == (ended or Finish("length"))
    loop.run()
    assert len(request.tokens) == 7


@given(options=loops, seed=st.integers(0, 2**32))
def test_any_traffic_survives_steps_that_fail(options: dict[str, Any], seed: int) -> None:
    traffic = Traffic(Loop(**options), Random(seed), faults=0.1)
    traffic.play(60)
    traffic.loop.run()
    traffic.judge()


@given(options=loops, seed=st.integers(0, 2**32))
def test_vectors_hold_each_token_once_whatever_fails(options: dict[str, Any], seed: int) -> None:
    traffic = Traffic(Loop(**options), Random(seed), 0.1, ("launch", "read", "nan", "nan"), pools=True)
    traffic.play(60)
    traffic.loop.run()
    traffic.judge()


@pytest.mark.parametrize("good", [0, 1])
def test_a_vector_that_is_begun_anew_counts_no_chunk_of_before(good: int) -> None:
    """A chunk is in flight when the one before turns out to hold no numbers: it read what that one wrote."""
    loop = Loop(chunk=4)
    request = loop.add([1] * 17, pooling=Pooling("mean"))
    for _ in range(1 + good):
        loop.step()
    loop.step("nan")
    loop.step("nan")
    loop.run()
    assert request.finish == Finish("stop")
    assert request.pooled is not None
    assert request.pooled.tolist() == vector(range(17)).tolist()


def test_a_vector_counts_no_chunk_that_was_planned_and_taken_back() -> None:
    loop = Loop(chunk=4)
    request = loop.add([1] * 9, pooling=Pooling("mean"))
    loop.step()
    batch = loop.scheduler.schedule()
    assert batch is not None
    loop.scheduler.start_over(batch, {})
    loop.run()
    assert request.pooled is not None
    assert request.pooled.tolist() == vector(range(9)).tolist()


@given(options=loops, seed=st.integers(0, 2**32))
def test_cache_and_overlap_change_no_token(options: dict[str, Any], seed: int) -> None:
    ends = []
    for overlap in (True, False):
        for cache in (True, False):
            rng = Random(seed)
            loop = Loop(**(options | {"overlap": overlap, "cache": cache, "num_pages": 60}))
            prefix = [rng.randrange(VOCAB) for _ in range(5)]
            requests = [loop.add([*prefix, *(rng.randrange(VOCAB) for _ in range(rng.randrange(5)))]) for _ in range(6)]
            loop.run()
            ends.append([(r.tokens, r.finish) for r in requests])
    assert ends[0] == ends[1] == ends[2] == ends[3]


# --- reuse ---


@pytest.mark.parametrize("page", [1, 16])
def test_requests_that_arrive_together_compute_their_common_prefix_once(page: int) -> None:
    loop = Loop(page=page, num_pages=4096 // page, chunk=512, max_running=16)
    requests = [loop.add([*(i % VOCAB for i in range(1024)), i, 1, 2, 3], endless(4)) for i in range(16)]
    loop.run()
    stats = loop.scheduler.stats()
    assert stats.prefill_tokens == 1024 + 16 * 4
    assert sum(r.num_cached for r in requests) == 15 * 1024
    assert (stats.prompt_tokens, stats.cached_tokens) == (16 * 1028, 15 * 1024)


@pytest.mark.parametrize(("page", "computed"), [(1, 100 + 3), (8, 100 + 3 * 4), (10, 100 + 3 * 10)])
def test_samples_of_one_prompt_compute_it_once(page: int, computed: int) -> None:
    loop = Loop(page=page, num_pages=400 // page, chunk=64)
    for _ in range(4):
        loop.add(list(range(100)), endless(5))
    loop.run()
    assert loop.scheduler.stats().prefill_tokens == computed


def test_a_prompt_in_progress_takes_what_another_computed_of_it() -> None:
    """Both are long and share all but the end: together they compute it once, in turns."""
    loop = Loop(num_pages=2000, chunk=32)
    prompt = [i % VOCAB for i in range(600)]
    first = loop.add([*prompt, 1])
    loop.step()
    second = loop.add([*prompt, 2])
    loop.run()
    assert loop.scheduler.stats().prefill_tokens == 602
    assert first.num_cached > 0
    assert second.num_cached > 32


def test_a_chat_computes_only_its_new_messages() -> None:
    for page in (1, 4):
        loop = Loop(page=page, num_pages=800, chunk=64)
        tokens: list[int] = []
        for turn in range(5):
            before = len(tokens)
            request = loop.add([*tokens, *(turn for _ in range(11))], endless(20))
            loop.run()
            assert request.num_cached >= before - page
            tokens = request.tokens
        assert len(tokens) == 5 * 31


def test_disabled_cache_reuses_nothing() -> None:
    loop = Loop(num_pages=300, cache=False)
    requests = [loop.add([1] * 30) for _ in range(3)]
    loop.run()
    assert [r.num_cached for r in requests] == [0, 0, 0]
    assert loop.allocator.num_free == 299


def test_prompt_logprobs_computes_every_row_once_in_chunks() -> None:
    loop = Loop(num_pages=2000, chunk=1000)
    prompt = [i % VOCAB for i in range(600)]
    loop.add(prompt)
    loop.run()
    request = loop.add(prompt, endless(4, prompt_logprobs=True))
    loop.run()
    works = [w for b in loop.batches for w in b.works if w.request is request]
    assert [(w.start, w.end, w.logprobs_from) for w in works][:3] == [(0, 256, 1), (256, 512, 257), (512, 600, 513)]
    assert all(w.logprobs_from is None for w in works[3:])
    assert loop.scored[request.id] == prompt[1:]
    assert request.num_cached == 0
    assert loop.radix.num_cached == 600 + 8 - 1  # its pages were duplicates; the answers are the same


# --- ends ---


def test_a_stop_leaves_the_step_in_flight_without_effect() -> None:
    loop = Loop()
    story = Story([1, 2, 3])
    story.upto(20)
    request = loop.add([1, 2, 3], SamplingParams(max_new_tokens=17, ignore_eos=True, stop_token_ids=(story.tokens[6],)))
    loop.run()
    first = story.tokens.index(story.tokens[6], 3)
    assert request.tokens == story.tokens[: first + 1]
    assert request.finish is not None
    assert (request.finish.reason, request.finish.matched) == ("stop", story.tokens[6])
    works = [w for b in loop.batches for w in b.works]
    assert works[-1].end == len(request.tokens)  # was in flight, and drew a token that no one asked for


def test_no_step_runs_past_a_limit() -> None:
    for overlap in (True, False):
        loop = Loop(overlap=overlap)
        request = loop.add([1, 2, 3], endless(5))
        loop.run()
        assert len(request.tokens) == 8
        assert max(w.end for b in loop.batches for w in b.works) == 7
        assert sum(w.samples for b in loop.batches for w in b.works) == 5


@pytest.mark.parametrize(("context", "pages", "end"), [(20, 100, 20), (1000, 13, 13), (1000, 100, 60)])
def test_an_answer_is_cut_to_context_and_pool(context: int, pages: int, end: int) -> None:
    loop = Loop(context_length=context, num_pages=pages)
    request = loop.add([1] * 10, endless(50))
    loop.run()
    assert len(request.tokens) == end
    assert request.finish is not None
    assert request.finish.reason == "length"


def test_a_prompt_that_fills_the_pool_yields_one_token() -> None:
    loop = Loop(num_pages=11)
    request = loop.add([1] * 10, endless(50))
    loop.run()
    assert len(request.tokens) == 11
    with pytest.raises(RequestError, match=r"11 tokens.*room for 10"):
        loop.add([1] * 11)
    with pytest.raises(RequestError, match=r"30 tokens.*context length is 30"):
        Loop(context_length=30).add([1] * 30)


def test_a_resumed_stream_that_is_complete_ends_at_once() -> None:
    loop = Loop()
    request = loop.add([1, 2, 3, 4, 5], endless(2), num_prompt=3)
    assert request.finish is not None
    assert request.finish.reason == "length"
    assert not loop.scheduler.has_work


def test_bad_requests_are_refused() -> None:
    loop = Loop()
    loop.add([1], id="a")
    with pytest.raises(RequestError, match="'a' is running already"):
        loop.add([1], id="a")
    with pytest.raises(RequestError, match="empty"):
        loop.add([])


def test_logits_that_are_not_finite_twice_end_the_request_and_clear_the_cache() -> None:
    loop = Loop()
    request, other = loop.add([1] * 8, id="a"), loop.add([1] * 8, id="b")
    batch = loop.scheduler.schedule()
    assert batch is not None
    good, bad = RowResult(token=3), RowResult(token=3, finite=False)
    updates = loop.scheduler.finish(batch, [bad if w.request is request else good for w in batch.works])
    assert [u.request for u in updates] == [other]
    assert request.finish is None
    assert loop.scheduler.has_suspects
    batch = loop.scheduler.schedule()
    assert batch is not None
    assert [(w.request, w.start, w.end) for w in batch.works] == [(request, 0, 8)], "alone, and from nothing"
    updates = loop.scheduler.finish(batch, [bad])
    assert [(u.request, u.result.token) for u in updates] == [(request, None)]
    assert not loop.scheduler.has_suspects
    assert request.finish is not None
    assert request.finish.reason == "error"
    assert request.tokens == [1] * 8
    assert loop.radix.num_evictable == 0, "only what another one holds is left"
    loop.abort(other)
    check_idle(loop)


def test_abort_in_every_state() -> None:
    loop = Loop(chunk=8, max_running=2, num_pages=60)
    assert loop.scheduler.abort("nobody") is None
    prefilling = loop.add([1] * 30)
    waiting = [loop.add([2, 2, i]) for i in range(3)]
    loop.step()
    loop.abort(waiting[2])
    loop.abort(prefilling)
    loop.step()
    assert waiting[0].row > 0
    loop.abort(waiting[0])  # in flight
    loop.abort(waiting[0])
    loop.run()
    assert [r.finish.reason for r in waiting if r.finish] == ["abort", "length", "abort"]


def test_abort_of_a_retracted_request_with_a_token_on_its_way() -> None:
    loop = Loop(num_pages=60, max_running=2)
    loop.add([1] * 10, endless(45))
    loop.add([2] * 10, endless(45))
    while not any(r.retractions for r in loop.scheduler.runs.waiting):
        loop.step()
    loop.abort(loop.scheduler.runs.waiting[0])
    loop.run()


# --- retraction ---


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("page", [1, 4])
@pytest.mark.parametrize("room", [40, 60])
def test_a_pool_that_barely_fits_one_serves_many(room: int, page: int, overlap: bool) -> None:
    loop = Loop(page=page, num_pages=room // page + 1, max_running=4, overlap=overlap, chunk=8)
    requests = [loop.add([i] * 5, endless(35)) for i in range(6)]
    finished: list[Request] = []
    for _ in range(2000):
        loop.step()
        finished += [r for r in requests if r.finish and r not in finished]
    assert finished[0] is requests[0]
    assert len(finished) == 6
    assert (loop.scheduler.stats().retractions > 0) == (room > 40)  # with room for one, only one is let in
    assert requests[0].retractions == 0
    check_idle(loop)


def test_the_youngest_of_the_lowest_priority_is_retracted_and_resumes_first() -> None:
    loop = Loop(num_pages=80, max_running=3)
    old = loop.add([1] * 4, endless(60))
    low = loop.add([2] * 4, endless(60), priority=-1)
    young = loop.add([3] * 4, endless(60))
    loop.step()
    late = loop.add([4] * 4, endless(4), priority=-1)
    while not low.retractions:
        loop.step()
    assert (old.retractions, young.retractions) == (0, 0)
    assert loop.scheduler.runs.waiting == [low, late]
    loop.run()
    assert old.retractions == 0


def test_a_retracted_request_finds_its_tokens_in_the_tree_and_keeps_num_cached() -> None:
    loop = Loop(num_pages=80, max_running=3, chunk=64)
    loop.add([3] * 10, endless(1))
    loop.run()
    old = loop.add([1] * 4, endless(50))
    young = loop.add([3] * 12, endless(50))
    loop.run()
    assert old.retractions == 0
    assert young.retractions > 0
    assert young.num_cached == 10
    resumed = [w for b in loop.batches for w in b.works if w.request is young and w.start and w.end - w.start > 1]
    assert resumed
    assert all(w.end - w.start < 40 for w in resumed[1:])


def test_a_retracted_request_waits_until_its_last_token_is_seen() -> None:
    loop = Loop(num_pages=60, max_running=2)
    old, young = loop.add([1] * 10, endless(45)), loop.add([2] * 10, endless(45))
    previous = None
    while not young.retractions:  # the step that retracts is scheduled before the one before it is read
        batch = loop.scheduler.schedule()
        assert batch is not None
        previous, unread = batch, previous
        if unread is not None and not young.retractions:
            loop.scheduler.finish(unread, [RowResult(token=3) for _ in unread.works])
    assert unread is not None
    assert young.length == len(young.tokens) + 1
    loop.scheduler.abort(old.id)
    assert loop.scheduler.schedule() is None
    loop.scheduler.finish(unread, [RowResult(token=3) for _ in unread.works])
    resumed = loop.scheduler.schedule()
    assert resumed is not None
    assert [(w.request, w.end) for w in resumed.works] == [(young, len(young.tokens))]


@pytest.mark.parametrize(("page", "cache"), [(1, True), (4, True), (4, False)])
def test_prompt_logprobs_come_once_even_if_the_prefill_is_retracted(page: int, cache: bool) -> None:
    loop = Loop(page=page, num_pages=160 // page + 1, max_running=5, chunk=2, cache=cache)
    for i in range(3):
        loop.add([i] * 3, endless(60))
    for _ in range(10):
        loop.step()
    request = loop.add([i % 7 for i in range(63)], endless(4, prompt_logprobs=True))
    while not request.retractions and request.finish is None:
        loop.step()
    assert 0 < request.scored < 63
    loop.run()
    assert loop.scored[request.id] == request.tokens[1:63]


# --- cost ---


def test_a_decode_step_looks_at_no_old_token() -> None:
    """Scheduling decodes costs the same behind 10 tokens as behind 10 thousand."""

    class Tokens(list[int]):
        read = 0

        def __getitem__(self, key: Any) -> Any:
            Tokens.read += len(range(*key.indices(len(self)))) if isinstance(key, slice) else 1
            return super().__getitem__(key)

    loop = Loop(num_pages=10_100, chunk=10_000, context_length=20_000)
    request = Request("a", Tokens([1] * 10_000), 10_000, endless(50))
    loop.scheduler.add(request)
    batch = loop.scheduler.schedule()
    assert batch is not None
    Tokens.read = 0
    for _ in range(40):
        loop.scheduler.finish(batch, [RowResult(token=2)])
        batch = loop.scheduler.schedule()
        assert batch is not None
    assert Tokens.read == 0


@pytest.mark.parametrize("policy", ["fcfs", "lpm"])
def test_who_waits_for_room_is_not_matched_in_every_step(policy: str) -> None:
    """A prompt of 100 thousand tokens at the head of the queue would cost each step milliseconds."""

    class Tokens(list[int]):
        read = 0

        def __getitem__(self, key: Any) -> Any:
            Tokens.read += len(range(*key.indices(len(self)))) if isinstance(key, slice) else 1
            return super().__getitem__(key)

    loop = Loop(num_pages=1900, chunk=1000, policy=policy)
    first = loop.add([1] * 900, endless(1000))
    waiting = [Request(f"w{i}", Tokens([1] * 890 + [2] * 1000), 1890, endless(9)) for i in range(3)]
    loop.step()
    for request in waiting:
        loop.scheduler.add(request)
    loop.step()
    Tokens.read = 0
    for _ in range(40):
        loop.step()
    assert Tokens.read == 0
    loop.abort(first)
    for request in waiting:
        loop.device.stories[request.seq] = Story(list(request.tokens))
    loop.run()
    assert all(r.finish == Finish("length") for r in waiting)


def test_scheduling_imports_no_mlx() -> None:
    import subprocess
    import sys

    code = "import sys, pippin.scheduler; sys.exit('mlx' in sys.modules or 'mlx.core' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert Scheduler.__module__ == "pippin.scheduler"
