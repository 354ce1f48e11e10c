"""Who runs next, in which slots. Plain Python.

Requests are ranked by priority, then arrival. Running ones are served in that order, each with its next token or
the next chunk of its prompt; whoever finds no slot takes them from the lowest rank. So the highest rank always
moves, and no one who has a Work in the batch being built can lose his slots.
"""

from __future__ import annotations

import logging
import time
from bisect import insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pippin.bounds import StepBounds
from pippin.cache.holdings import Holdings
from pippin.cache.radix import RadixCache
from pippin.cache.slots import SlotAllocator
from pippin.errors import RequestError
from pippin.messages import Stats
from pippin.types import Batch, Finish, Request, RowResult, Token, Work

log = logging.getLogger(__name__)

HEADROOM = 16
"""Tokens that each running request can still draw, by count, when another is admitted: fewer retractions."""

_SCORED_CHUNK = 256  # prompt_logprobs needs a row of logits for every token of a chunk
_LPM_WINDOW = 128  # waiting requests whose cached prefix is measured, a step
_LPM_TURNS = 4  # every fourth admission is by arrival, so that a prompt with no cached prefix has its turn


@dataclass(frozen=True, slots=True)
class Update:
    """What a step brought one request; ``request.finish`` is set if it ended with this."""

    request: Request
    result: RowResult


class Scheduler:
    """Spends a step's budget of ``chunk`` prompt tokens and at most ``max_running`` rows.

    A step is scheduled before the one before is read: ``Request.length`` runs ahead of ``tokens`` by one. What is
    freed here may still be in use by a step that is queued, since whoever gets it next runs after that step.
    For the same reason prompt pages are in the tree as soon as the Work that fills them is scheduled.
    """

    def __init__(
        self,
        allocator: SlotAllocator,
        radix: RadixCache,
        *,
        max_running: int,
        chunk: int,
        policy: str,
        context_length: int,
    ) -> None:
        self._allocator = allocator
        self._radix = radix
        self._chunk = chunk
        self._bounds = StepBounds(max_running, chunk)
        self._policy = policy
        self._context_length = context_length
        self._requests: dict[str, Request] = {}
        self._running: list[Request] = []  # by rank
        self._waiting: list[Request] = []  # by rank, retracted ones first
        self._max_running = max_running
        self._rows = self._all_rows()
        self._added = 0
        self._lpm_turn = 0
        self._retractions = 0
        self._prefilled = 0
        self._decoded = 0
        self._prompt_tokens = 0
        self._forced = 0
        self.held = False  # memory is short: no one is admitted while others run
        self._suspects: set[Request] = set()  # run alone until they have drawn a token
        self.holdings = Holdings(allocator, radix, self._suspects)
        self._at: Request | None = None  # whose run is being changed
        self._mended: list[Request] | None = None
        self._distrusted: list[Request] = []

    @property
    def has_work(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self._requests)

    def stats(
        self, *, steps: int = 0, overlapped_steps: int = 0, step_seconds: float = 0.0, graph_traces: int = 0
    ) -> Stats:
        """Counts now and since the start; the caller's own are passed through."""
        size, windows = self._allocator.page_size, self._radix.windows
        return Stats(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            slots_total=self._allocator.capacity,
            slots_free=self._allocator.num_free * size,
            slots_cached=self._radix.num_cached * size,
            steps=steps,
            prefill_tokens=self._prefilled,
            decode_tokens=self._decoded,
            cached_tokens=self.holdings.cached_tokens,
            prompt_tokens=self._prompt_tokens,
            retractions=self._retractions,
            overlapped_steps=overlapped_steps,
            step_seconds=step_seconds,
            graph_traces=graph_traces,
            forced_tokens=self._forced,
            snapshots=len(self._radix.snapshots),
            snapshots_evicted=self._radix.snapshots.num_evicted,
            misses=dict(self.holdings.misses),
            window_slots_total=windows.num_pages * size if windows is not None else 0,
            window_slots_free=windows.num_free * size if windows is not None else 0,
            window_slots_cached=(windows.room - windows.num_free) * size if windows is not None else 0,
        )

    def add(self, request: Request) -> None:
        """Queues a request. If its tokens have reached its limit already, ``finish`` is set instead.

        Raises RequestError if its prompt can't be served at this context length and pool, or its id is in use.
        """
        self.check(request)
        if request.length >= self._limit(request):
            request.finish = Finish("length")
            return
        if request.length > request.num_prompt:
            request.scored = request.num_prompt  # a resumed stream has been sent those
        self._added += 1
        request.seq = self._added
        self._requests[request.id] = request
        self._prompt_tokens += request.num_prompt
        insort(self._waiting, request, key=_queue_rank)

    def abort(self, id: str) -> Request | None:
        """Ends a request at any moment between steps, and frees what it holds; None if there is no such one."""
        request = self._requests.get(id)
        if request is not None:
            self._end(request, Finish("abort"))
        return request

    def flush(self) -> int:
        """Empties the cache of what no running request holds; returns the slots freed."""
        return self.holdings.flush()

    def schedule(self) -> Batch | None:
        """The next step, or None if no one can run before a step in flight is read.

        While someone may be admitted, prompts in progress get half of the budget first, newcomers the other half;
        what they leave goes back to the prompts in progress.
        """
        try:
            return self._schedule()
        except Exception:
            log.exception("a step could not be planned")
        self._mend()
        return None

    def _schedule(self) -> Batch | None:
        plan: dict[Request, int] = {}  # where each request's Work starts; it ends at request.computed
        self.holdings.plan(self._running)
        if self._suspects and self._alone(min(self._suspects, key=_rank), plan):
            return self._batch(plan)
        before = self._retractions
        budget = self._bounds.tokens
        kept = budget // 2 if self._waiting and self._rows else 0
        left = budget - kept
        for request in tuple(self._running):
            if not self._decodes(request, plan):
                left -= self._advance(request, left, plan)
        left += kept
        if self._retractions == before:
            left = self._admit(left, plan)
        for request in self._running:
            if left and _is_prefill(request):
                left -= self._compute(request, left, plan)
        return self._batch(plan) if plan else None

    def shed(self) -> int:
        """Retracts the lower half of those that run, so that steps take less memory; returns how many that is."""
        number = len(self._running) // 2
        for request in self._running[len(self._running) - number :][::-1]:
            if request.row >= 0:
                self._retract(request)
        return number

    def finish(self, batch: Batch, results: Sequence[RowResult]) -> list[Update]:
        """Takes in what a step drew; ends requests that are done, and frees what they hold.

        What a step brings for a request that has ended meanwhile is ignored.
        """
        updates = []
        self._bounds.went_well()
        for work, result in zip(batch.works, results, strict=True):
            request = work.request
            if request.finish is not None:
                continue
            if request.pooling is not None:
                self._pool(work, result)
                if request.finish is not None:
                    updates.append(Update(request, result))
                continue
            drawn = work.samples and work.end == len(request.tokens)  # else it was forced meanwhile
            if drawn:
                result = self._take(work, result)
            elif work.samples:
                result = RowResult(prompt_logprobs=result.prompt_logprobs)
            if (drawn and request not in self._suspects) or result.prompt_logprobs:
                updates.append(Update(request, result))
        return updates

    def force(self, request: Request, tokens: Sequence[Token], finish: Finish | None) -> list[Token]:
        """Appends tokens that its grammar leaves no choice of, in place of what a queued step draws for the request.

        ``finish`` is how it ends after the last. Returns those it has room for, up to the one that ends it. What is
        left to compute is computed as a resumed request's is.
        """
        taken: list[Token] = []
        for token in tokens:
            request.tokens.append(token)
            taken.append(token)
            found = self._stop(request, token, finish if len(taken) == len(tokens) else None)
            if found is not None:
                break
        request.length = len(request.tokens)
        self._suspects.discard(request)
        self._forced += len(taken)
        if found is not None:
            self._end(request, found)
        return taken

    def fail(self, request: Request, finish: Finish) -> None:
        """Ends a request that has not ended, at any moment between steps."""
        self._end(request, finish)

    @property
    def has_suspects(self) -> bool:
        """Whether the next step is to be one request's alone: read every step before it is scheduled."""
        return bool(self._suspects)

    def drop(self, batches: Sequence[Batch], finish: Finish, short: bool = False) -> Request | None:
        """Undoes steps that raised: all that are in flight. Returns the request that ends with ``finish``, if one does.

        That is one which ran alone, since a step of several with it had failed. Several, and one that fails for the
        first time, run again, each alone. Where memory was ``short`` nobody is to blame: they run again in steps of
        half the size, and one ends if there is none that is smaller. Nothing in the pool is trusted: all that run are
        retracted and start over, and so nothing is pinned and the tree is emptied.
        """
        works = [work for batch in batches for work in batch.works if work.request.finish is None]
        for work in reversed(works):
            self._undo(work)
        requests = {work.request for work in works}
        rows, tokens = max((len(b.works) for b in batches), default=0), max((b.num_tokens for b in batches), default=0)
        fits = short and self._bounds.shrink(rows, tokens)
        alone = requests if short else requests & self._suspects
        guilty = next(iter(requests)) if len(requests) == len(alone) == 1 and not fits else None
        self._suspects |= requests if not short else set()
        if guilty is not None:
            self._end(guilty, finish)
        self._vacate()
        return guilty

    def _undo(self, work: Work) -> None:
        """Forgets that a step was to draw and to report something."""
        request = work.request
        request.length = len(request.tokens)
        if work.logprobs_from is not None:
            request.scored = min(request.scored, work.logprobs_from - 1)
        if work.pools_from is not None:
            request.scored = min(request.scored, work.pools_from)

    def start_over(self, batch: Batch, faulty: Mapping[Request, Finish]) -> None:
        """Takes back a batch that was not launched, because slots are not what they are to be.

        The ``faulty`` requests end, all others that run are retracted, and every page is free again, whoever had it. A
        step in flight is read as ever.
        """
        for work in batch.works:
            request = work.request
            request.length -= work.samples
            if work.logprobs_from is not None:
                request.scored = work.logprobs_from - 1
        self._vacate()
        for request, finish in faulty.items():
            self._end(request, finish)

    def distrusted(self) -> list[Request]:
        """Requests that start over since this was asked, since what they read gave numbers that are not finite."""
        found, self._distrusted = self._distrusted, []
        return found

    def mended(self) -> list[Request] | None:
        """None unless an error of its own has been mended since this was asked; then those that ended with it.

        Everything has started over then, with an empty cache: what else is known of slots is to be forgotten.
        """
        ended, self._mended = self._mended, None
        return ended

    def _mend(self) -> None:
        """After an error in what is kept of slots and of the tree, which may be half done: everything starts over.

        Whose run was being changed runs alone from here on, and ends if it did already.
        """
        request, self._at = self._at, None
        self._mended = self._mended or []
        self._vacate()
        if request is None or request.finish is not None:
            return
        if request in self._suspects:
            self._end(request, Finish("error", None, "the engine failed on this request (its place in the cache)"))
            self._mended.append(request)
        self._suspects |= {request} if request.finish is None else set()

    def _vacate(self) -> None:
        """Ends all runs at once, unfinished ones wait. Every page is free again, and the tree is empty."""
        runs = {r for r in (*self._running, *self._requests.values()) if r.row >= 0}
        self.holdings.reset(runs)
        for request in runs:
            request.row = -1
            request.retractions += 1
        self._retractions += len(runs)
        self._running.clear()
        self._rows = self._all_rows()
        self._waiting = sorted(self._requests.values(), key=_queue_rank)

    def _all_rows(self) -> list[int]:
        return list(range(self._max_running, 0, -1))  # row 0 is scratch

    # --- limits ---

    def check(self, request: Request) -> None:
        """Raises RequestError if ``add`` would."""
        if request.id in self._requests:
            raise RequestError(f"a request with id {request.id!r} is running already", "rid")
        if not 1 <= request.num_prompt <= len(request.tokens):
            raise RequestError("the prompt is empty; it needs at least one token", "prompt")
        if request.num_prompt >= self._context_length + (request.pooling is not None):
            raise RequestError(
                f"the prompt has {request.num_prompt} tokens, and the context length is {self._context_length}, "
                "with at least one for the answer; shorten the prompt",
                "prompt",
            )
        if request.num_prompt > self._allocator.capacity:
            raise RequestError(
                f"the prompt has {request.num_prompt} tokens, and the KV cache has room for "
                f"{self._allocator.capacity}; shorten the prompt, or start with a larger --max-total-tokens",
                "prompt",
            )

    def _limit(self, request: Request) -> int:
        """Tokens at which a request ends. The last one needs no slot: nothing is drawn from it."""
        if request.pooling is not None:
            return request.num_prompt + 1
        asked = request.num_prompt + request.params.max_new_tokens
        return min(asked, self._context_length, self._allocator.capacity + 1)

    def _claim(self, request: Request) -> int:
        """Pages that a request is to hold for the tokens that it has and its next few."""
        return self.holdings.pages(min(request.length + HEADROOM, self._limit(request) - 1))

    # --- building a step ---

    def _decodes(self, request: Request, plan: dict[Request, int]) -> bool:
        """Plans the next token of a request that has a slot for it, as most have; ``_advance`` does all else."""
        at = request.computed
        ready = at >= request.num_prompt and request.length == at + 1 <= len(request.slots) and request.row >= 0
        if ready and request.length < self._limit(request):
            plan[request] = at
            request.computed = request.length
            return True
        return False

    def _advance(self, request: Request, budget: int, plan: dict[Request, int]) -> int:
        """Plans the next token or chunk of a running request; the lowest ranks make room if there is none.

        Returns what it cost of the budget: a decode costs nothing, and one that was retracted on the way has no row.
        """
        prefill = _is_prefill(request)
        draws = request.pooling is None and request.length < self._limit(request)
        if not (budget if prefill else draws):
            return 0
        while request.row >= 0:
            taken = self._compute(request, budget if prefill else 1, plan)
            if taken:
                return taken if prefill else 0
            self._retract(self._running[-1])
        return 0

    def _alone(self, request: Request, plan: dict[Request, int]) -> bool:
        """Plans a step of this request only; False if it waits for room that others hold."""
        claimed = sum(self._claim(r) - self.holdings.pages(len(r.slots)) for r in self._running)
        if request.row < 0 and not (self._rows and self._enter(request, claimed, None)):
            return False
        return self._compute(request, self._bounds.tokens, plan) > 0

    def _admit(self, left: int, plan: dict[Request, int]) -> int:
        """Starts waiting requests, in order, until one finds no row, room or budget; returns the budget left."""
        if not self._waiting:
            return left
        busy = any(map(_is_prefill, self._running))
        claimed = sum(self._claim(r) - self.holdings.pages(len(r.slots)) for r in self._running)
        admitted = 0
        for request in self._order():
            # While others prefill, a prompt that the rest of the budget would cut does better first in the next step.
            whole = left if busy and admitted else None
            if not left or request.length > len(request.tokens) or request in self._suspects:
                break
            if (self.held and self._running) or len(self._running) >= self._bounds.rows:
                break
            if not self._enter(request, claimed, whole):
                break
            left -= self._compute(request, left, plan)
            claimed += self._claim(request) - self.holdings.pages(len(request.slots))
            admitted += 1
        self._lpm_turn += bool(admitted)
        return left

    def _order(self) -> list[Request]:
        """Those waiting, best first, as many as there are rows."""
        if self._policy == "lpm" and self._rows and self._lpm_turn % _LPM_TURNS != _LPM_TURNS - 1:
            return sorted(
                self._waiting[:_LPM_WINDOW],
                key=lambda r: (-r.priority, not r.retractions, -self.holdings.known(r), r.seq),
            )[: len(self._rows)]
        return self._waiting[: len(self._rows)]

    def _enter(self, request: Request, claimed: int, whole: int | None) -> bool:
        """Gives a waiting request a row and its cached prefix, if there is room for it beside what others claim.

        ``whole``: only if no more tokens than that are left to compute.
        """
        self._at = request
        found = self.holdings.find(request)
        cached = len(found.slots)
        wanted = self._claim(request) - self.holdings.pages(cached)
        cut = whole is not None and request.length - cached > whole
        if wanted + claimed > self.holdings.room or cut or not self._windows_fit(request):
            self.holdings.give_back(found)
            return False
        self._waiting.remove(request)
        insort(self._running, request, key=_rank)
        request.row = self._rows.pop()
        request.entered = time.monotonic() if request.entered is None else request.entered
        self.holdings.enter(request, found)
        return True

    def _windows_fit(self, request: Request) -> bool:
        """Whether a waiting request's window finds room beside those that run; alone it makes do with what there is."""
        windows = self._radix.windows
        if windows is None or not self._running:
            return True
        return windows.admits(map(self._claim, (*self._running, request)), self._chunk)

    def _compute(self, request: Request, budget: int, plan: dict[Request, int]) -> int:
        """Plans up to ``budget`` more tokens of a request, as far as pages go; returns how many."""
        self._at = request
        prefill = _is_prefill(request)
        if prefill and request not in plan:
            self.holdings.rematch(request)
        elif prefill and self.holdings.is_known(request):
            return 0  # a newcomer computes what comes next
        elif prefill and not self.holdings.unsave(request):
            return 0
        begin = request.computed
        end = min(request.length, begin + budget)
        if request.scored < request.num_prompt and request.params.prompt_logprobs:
            end = min(end, plan.get(request, begin) + _SCORED_CHUNK)
        end = self.holdings.reach(request, self.holdings.boundary(request, begin, end) if prefill else end)
        if end <= begin:
            return 0
        plan.setdefault(request, begin)
        request.computed = end
        if prefill:
            self.holdings.publish(request)
        return end - begin

    def _batch(self, plan: dict[Request, int]) -> Batch:
        snapshots = [self._planned(request) for request in plan]
        works = [self._work(r, start, *kept) for (r, start), kept in zip(plan.items(), snapshots, strict=True)]
        works.sort(key=lambda work: work.end - work.start > 1)
        return Batch(tuple(works))

    def _planned(self, request: Request) -> tuple[int | None, int | None]:
        self._at = request
        return self.holdings.planned(request)

    def _work(self, request: Request, start: int, restore: int | None, save: int | None) -> Work:
        end, scores = request.computed, None
        samples = end == request.length and request.pooling is None
        if start < request.num_prompt or end - start > 1:
            self._prefilled += end - start
        else:
            self._decoded += 1
        if request.params.prompt_logprobs and request.scored < min(end, request.num_prompt):
            scores = request.scored + 1
            request.scored = min(end, request.num_prompt)
        request.length += samples
        return Work(request, start, end, samples, scores, restore, save, _pools_from(request, end))

    # --- ends ---

    def _distrust(self, work: Work, message: str) -> None:
        """What came of a work is no number: its request starts over alone, from nothing that others have computed.

        If it comes to that again, it ends. What was cached on the way may be the cause, so all of it goes.
        """
        request = work.request
        if request in self._suspects:
            self._end(request, Finish("error", message=message))
        else:
            self._undo(work)
            if request.pooling is not None:
                request.pooled, request.scored = None, 0
            self._suspects.add(request)
            self._distrusted.append(request)
            self._set_aside(request)
        self.holdings.flush()

    def _set_aside(self, request: Request) -> None:
        """Ends its run, for it to start over."""
        if request.row < 0:
            return
        try:
            self._retract(request, keep=False)
            return
        except Exception:
            log.exception("request %s could not be put back", request.id)
        self._mend()

    def _take(self, work: Work, result: RowResult) -> RowResult:
        """Appends a token that was drawn, and ends the request if it is its last; returns what is worth telling."""
        request = work.request
        if not result.finite or result.token is None:
            self._distrust(work, "the model's logits hold no finite number; nothing to draw from")
            return RowResult()
        self._suspects.discard(request)
        if result.finish is not None and result.finish.reason == "error":
            self._end(request, result.finish)
            return RowResult()
        request.tokens.append(result.token)
        finish = self._stop(request, result.token, result.finish)
        if finish is not None:
            self._end(request, finish)
        return result

    def _pool(self, work: Work, result: RowResult) -> None:
        """Adds what a step gave to a request's vector, and ends the request if that was the last."""
        request = work.request
        if not result.finite:
            self._distrust(work, "the model's hidden states hold numbers that are not finite")
            return
        if result.pooled is not None:
            request.pooled = result.pooled if request.pooled is None else request.pooled + result.pooled
        if work.end == request.num_prompt:
            self._end(request, Finish("stop"))

    def _stop(self, request: Request, token: int, ended: Finish | None) -> Finish | None:
        params, generated = request.params, len(request.tokens) - request.num_prompt
        stops = token in params.stop_token_ids or (token in request.eos and not params.ignore_eos)
        if stops and generated >= params.min_new_tokens:
            return Finish("stop", token)
        if ended is not None:
            return ended
        return Finish("length") if len(request.tokens) >= self._limit(request) else None

    def _end(self, request: Request, finish: Finish) -> None:
        request.finish = finish
        self._suspects.discard(request)
        del self._requests[request.id]
        if request.row < 0:
            self._waiting.remove(request)
            return
        try:
            self._leave(request, keep=finish.reason != "error")
            return
        except Exception:
            log.exception("what request %s had computed could not be kept", request.id)
        self._mend()

    def _retract(self, request: Request, keep: bool = True) -> None:
        """Takes a running request's slots; it waits at the front of its priority, and starts over when resumed."""
        self._leave(request, keep)
        self._retractions += 1
        request.retractions += 1
        insort(self._waiting, request, key=_queue_rank)

    def _leave(self, request: Request, keep: bool = True) -> None:
        """Ends a request's run. ``keep`` False: its recurrent state is not to be trusted."""
        self._at = request
        self.holdings.leave(request, keep)
        self._running.remove(request)
        self._rows.append(request.row)
        request.row = -1


def _rank(request: Request) -> tuple[int, int]:
    return -request.priority, request.seq


def _queue_rank(request: Request) -> tuple[int, bool, int]:
    return -request.priority, not request.retractions, request.seq


def _pools_from(request: Request, end: int) -> int | None:
    """From which token on a Work up to ``end`` gives hidden states to the request's vector; None if it gives none."""
    if request.pooling is None:
        return None
    if request.pooling.kind != "mean":
        return end - 1 if end == request.num_prompt else None
    begin, request.scored = request.scored, max(request.scored, end)
    return begin if begin < end else None


def _is_prefill(request: Request) -> bool:
    """Whether more than the newest token is left to compute, or a prompt token."""
    return request.length - request.computed > 1 or request.computed < request.num_prompt
