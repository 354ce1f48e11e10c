"""A request's way through the engine: queued, run, ended; retracted and begun anew where something went wrong.

Who waits and who runs is in ``runs``, what the next step computes is planned in ``planner``, and when an answer ends is
said in ``limits``. Plain Python.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pippin.bounds import StepBounds
from pippin.cache.holdings import Holdings
from pippin.cache.radix import RadixCache
from pippin.cache.slots import SlotAllocator
from pippin.errors import RequestError
from pippin.limits import Limits, end_with
from pippin.messages import Stats
from pippin.planner import Planner
from pippin.runs import Runs
from pippin.types import Batch, Finish, Request, RowResult, Token, Work

log = logging.getLogger(__name__)


class Update(NamedTuple):
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
        self._bounds = StepBounds(max_running, chunk)
        self._limits = Limits(context_length, allocator.capacity)
        self._suspects: set[Request] = set()  # run alone until they have drawn a token
        self.holdings = Holdings(allocator, radix, self._suspects)
        self.runs = Runs(self.holdings, max_running)
        self.planner = Planner(
            self.runs,
            self.holdings,
            radix.windows,
            self._bounds,
            self._suspects,
            chunk=chunk,
            policy=policy,
        )
        self._added = 0
        self._prompt_tokens = 0
        self._forced = 0
        self._mended: list[Request] | None = None
        self._distrusted: list[Request] = []

    @property
    def has_work(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self.runs)

    def stats(
        self,
        *,
        steps: int = 0,
        overlapped_steps: int = 0,
        step_seconds: float = 0.0,
        graph_traces: int = 0,
        graph_replays: int = 0,
    ) -> Stats:
        """Counts now and since the start; the caller's own are passed through."""
        size, windows = self._allocator.page_size, self._radix.windows
        return Stats(
            num_running=len(self.runs.running),
            num_waiting=len(self.runs.waiting),
            slots_total=self._allocator.capacity,
            slots_free=self._allocator.num_free * size,
            slots_cached=self._radix.num_cached * size,
            slots_evictable=self._radix.num_evictable * size,
            steps=steps,
            prefill_tokens=self.planner.prefilled,
            decode_tokens=self.planner.decoded,
            cached_tokens=self.holdings.cached_tokens,
            prompt_tokens=self._prompt_tokens,
            retractions=self.runs.retractions,
            overlapped_steps=overlapped_steps,
            step_seconds=step_seconds,
            graph_traces=graph_traces,
            graph_replays=graph_replays,
            forced_tokens=self._forced,
            snapshots=len(self._radix.snapshots),
            snapshots_evicted=self._radix.snapshots.num_evicted,
            misses=dict(self.holdings.misses),
            window_slots_total=windows.num_pages * size if windows is not None else 0,
            window_slots_free=windows.num_free * size if windows is not None else 0,
            window_slots_cached=(windows.room - windows.num_free) * size if windows is not None else 0,
        )

    def check(self, request: Request) -> None:
        """Raises RequestError if ``add`` would."""
        if request.id in self.runs:
            raise RequestError(f"a request with id {request.id!r} is running already", "rid")
        self._limits.check(request)

    def add(self, request: Request) -> None:
        """Queues a request. If its tokens have reached its limit already, ``finish`` is set instead.

        Raises RequestError if its prompt can't be served at this context length and pool, or its id is in use.
        """
        self.check(request)
        request.limit = self._limits.of(request)
        if request.length >= request.limit:
            request.finish = Finish("length")
            return
        if request.length > request.num_prompt:
            request.scored = request.num_prompt  # a resumed stream has been sent those
        self._added += 1
        request.seq = self._added
        self._prompt_tokens += request.num_prompt
        self.runs.add(request)

    def abort(self, id: str) -> Request | None:
        """Ends a request at any moment between steps, and frees what it holds; None if there is no such one."""
        request = self.runs.get(id)
        if request is not None:
            self._end(request, Finish("abort"))
        return request

    def flush(self) -> int:
        """Empties the cache of what no running request holds; returns the slots freed."""
        return self.holdings.flush()

    def schedule(self) -> Batch | None:
        """The next step, or None if no one can run before a step in flight is read."""
        try:
            return self.planner.plan()
        except Exception:
            log.exception("a step could not be planned")
        self._mend()
        return None

    def shed(self) -> int:
        """Retracts the lower half of those that run, so that steps take less memory; returns how many that is."""
        lower = self.runs.running[-(-len(self.runs.running) // 2) :]
        for request in reversed(lower):
            self.runs.retract(request)
        return len(lower)

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
            found = end_with(request, token, finish if len(taken) == len(tokens) else None)
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
        self.runs.vacate()
        return guilty

    def _undo(self, work: Work) -> None:
        """Forgets that a step was to draw and to report something."""
        work.request.length = len(work.request.tokens)
        self._unscore(work)

    def _unscore(self, work: Work) -> None:
        request = work.request
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
            work.request.length -= work.samples
            self._unscore(work)
        self.runs.vacate()
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
        request, self.runs.at = self.runs.at, None
        self._mended = self._mended or []
        self.runs.vacate()
        if request is None or request.finish is not None:
            return
        if request in self._suspects:
            self._end(request, Finish("error", None, "the engine failed on this request (its place in the cache)"))
            self._mended.append(request)
        self._suspects |= {request} if request.finish is None else set()

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
                request.pooled, request.summed, request.scored = None, 0, 0
            self._suspects.add(request)
            self._distrusted.append(request)
            self._set_aside(request)
        self.holdings.flush()

    def _set_aside(self, request: Request) -> None:
        """Ends its run, for it to start over."""
        if request.row < 0:
            return
        try:
            self.runs.retract(request, keep=False)
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
        finish = end_with(request, result.token, result.finish)
        if finish is not None:
            self._end(request, finish)
        return result

    def _pool(self, work: Work, result: RowResult) -> None:
        """Adds what a step gave to a request's vector, and ends the request if that was the last.

        What does not begin where the vector ends is of a run that was taken back while the step was in flight.
        """
        request, begin = work.request, work.pools_from
        if begin is not None and begin != request.summed and request.pools_all:
            return
        if not result.finite:
            self._distrust(work, "the model's hidden states hold numbers that are not finite")
            return
        if result.pooled is not None:
            request.pooled = result.pooled if request.pooled is None else request.pooled + result.pooled
        request.summed = max(request.summed, work.end)
        if work.end == request.num_prompt:
            self._end(request, Finish("stop"))

    def _end(self, request: Request, finish: Finish) -> None:
        request.finish = finish
        self._suspects.discard(request)
        try:
            self.runs.end(request, keep=finish.reason != "error")
            return
        except Exception:
            log.exception("what request %s had computed could not be kept", request.id)
        self._mend()
