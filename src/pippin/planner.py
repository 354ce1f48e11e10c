"""What runs in the next step, and in which slots. Plain Python.

Running requests are served by rank, each with its next token or the next chunk of its prompt; whoever finds no slot
takes them from the lowest rank. So the highest rank always moves, and no one who has a Work in the batch being planned
can lose his slots.
"""

from __future__ import annotations

import time
from collections.abc import Set

from pippin.bounds import StepBounds
from pippin.cache.holdings import Holdings
from pippin.cache.windows import WindowPages
from pippin.runs import Runs, rank
from pippin.types import Batch, Request, Work

HEADROOM = 16
"""Tokens that each running request can still draw, by count, when another is admitted: fewer retractions."""

_SCORED_CHUNK = 256  # prompt_logprobs needs a row of logits for every token of a chunk
_LPM_WINDOW = 128  # waiting requests whose cached prefix is measured, a step
_LPM_TURNS = 4  # every fourth admission is by arrival, so that a prompt with no cached prefix has its turn


class Planner:
    """Spends a step's budget of prompt tokens, ``bounds.tokens``, on at most ``bounds.rows`` requests.

    ``suspects`` run alone. ``policy`` is ``--schedule-policy``, ``chunk`` the most prompt tokens of any step.
    """

    def __init__(
        self,
        runs: Runs,
        holdings: Holdings,
        windows: WindowPages | None,
        bounds: StepBounds,
        suspects: Set[Request],
        *,
        chunk: int,
        policy: str,
    ) -> None:
        self.held = False  # memory is short: no one is admitted while others run
        self.prefilled = 0
        self.decoded = 0
        self._runs, self._holdings, self._windows = runs, holdings, windows
        self._bounds, self._suspects = bounds, suspects
        self._chunk, self._policy = chunk, policy
        self._lpm_turn = 0
        self._blocked: tuple[Request, int, int] | None = None  # for whom there was no room, with which tree, prefix
        self._spare: int | None = None  # pages that no one takes in this step; None: to be counted

    def plan(self) -> Batch | None:
        """The next step, or None if no one can run before a step in flight is read.

        While someone may be admitted, prompts in progress get half of the budget first, newcomers the other half;
        what they leave goes back to the prompts in progress.
        """
        plan: dict[Request, int] = {}  # where each request's Work starts; it ends at request.computed
        self._holdings.plan(self._runs.running)
        self._spare = None
        if self._suspects and self._alone(min(self._suspects, key=rank), plan):
            return self._batch(plan)
        before = self._runs.retractions
        budget = self._bounds.tokens
        kept = budget // 2 if self._runs.waiting and self._runs.rows else 0
        left = budget - kept
        for request in tuple(self._runs.running):
            if not self._decodes(request, plan):
                left -= self._advance(request, left, plan)
        left += kept
        if self._runs.retractions == before:
            left = self._admit(left, plan)
        for request in self._runs.running:
            if left and _is_prefill(request):
                left -= self._compute(request, left, plan)
        return self._batch(plan) if plan else None

    def _claim(self, request: Request) -> int:
        """Pages that a request is to hold for the tokens that it has and its next few."""
        return self._holdings.pages(min(request.length + HEADROOM, request.limit - 1))

    def _decodes(self, request: Request, plan: dict[Request, int]) -> bool:
        """Plans the next token of a request that has a slot for it, as most have; ``_advance`` does all else."""
        at = request.computed
        ready = at >= request.num_prompt and request.length == at + 1 <= len(request.slots) and request.row >= 0
        if ready and request.length < request.limit:
            plan[request] = at
            request.computed = request.length
            return True
        return False

    def _advance(self, request: Request, budget: int, plan: dict[Request, int]) -> int:
        """Plans the next token or chunk of a running request; the lowest ranks make room if there is none.

        Returns what it cost of the budget: a decode costs nothing, and one that was retracted on the way has no row.
        """
        prefill = _is_prefill(request)
        draws = request.pooling is None and request.length < request.limit
        if not (budget if prefill else draws):
            return 0
        while request.row >= 0:
            taken = self._compute(request, budget if prefill else 1, plan)
            if taken:
                return taken if prefill else 0
            self._runs.retract(self._runs.running[-1])
        return 0

    def _alone(self, request: Request, plan: dict[Request, int]) -> bool:
        """Plans a step of this request only; False if it waits for room that others hold."""
        claimed = sum(self._claim(r) - self._holdings.pages(len(r.slots)) for r in self._runs.running)
        if request.row < 0 and not (self._runs.rows and self._enter(request, claimed, None)):
            return False
        return self._compute(request, self._bounds.tokens, plan) > 0

    def _admit(self, left: int, plan: dict[Request, int]) -> int:
        """Starts waiting requests, in order, until one finds no row, room or budget; returns the budget left."""
        if not self._runs.waiting:
            return left
        busy = any(map(_is_prefill, self._runs.running))
        claimed = sum(self._claim(r) - self._holdings.pages(len(r.slots)) for r in self._runs.running)
        admitted = 0
        for request in self._order():
            # While others prefill, a prompt that the rest of the budget would cut does better first in the next step.
            whole = left if busy and admitted else None
            if not left or request.length > len(request.tokens) or request in self._suspects:
                break
            if (self.held and self._runs.running) or len(self._runs.running) >= self._bounds.rows:
                break
            if not self._enter(request, claimed, whole):
                break
            left -= self._compute(request, left, plan)
            claimed += self._claim(request) - self._holdings.pages(len(request.slots))
            admitted += 1
        self._lpm_turn += bool(admitted)
        return left

    def _order(self) -> list[Request]:
        """Those waiting, best first, as many as there are rows."""
        if self._policy == "lpm" and self._runs.rows and self._lpm_turn % _LPM_TURNS != _LPM_TURNS - 1:
            return sorted(
                self._runs.waiting[:_LPM_WINDOW],
                key=lambda r: (-r.priority, not r.retractions, -self._holdings.known(r), r.seq),
            )[: len(self._runs.rows)]
        return self._runs.waiting[: len(self._runs.rows)]

    def _enter(self, request: Request, claimed: int, whole: int | None) -> bool:
        """Gives a waiting request a row and its cached prefix, if there is room for it beside what others claim.

        ``whole``: only if no more tokens than that are left to compute.
        """
        self._runs.at = request
        if self._is_blocked(request, claimed) or not self._windows_fit(request):
            return False
        found = self._holdings.find(request)
        cached = len(found.slots)
        wanted = self._claim(request) - self._holdings.pages(cached)
        cut = whole is not None and request.length - cached > whole
        if wanted + claimed > self._holdings.room or cut:
            self._holdings.give_back(found)
            self._blocked = request, self._holdings.changes, cached
            return False
        self._blocked = None
        request.entered = time.monotonic() if request.entered is None else request.entered
        self._runs.enter(request, found)
        self._spend(self._takes(request))
        return True

    def _is_blocked(self, request: Request, claimed: int) -> bool:
        """Whether it is as it was when the request found no room: looking for its prefix again would be for nothing."""
        if self._blocked is None or self._blocked[:2] != (request, self._holdings.changes):
            return False
        wanted = self._claim(request) - self._holdings.pages(self._blocked[2])
        return wanted + claimed > self._holdings.room

    def _windows_fit(self, request: Request) -> bool:
        """Whether a waiting request's window finds room beside those that run; alone it makes do with what there is."""
        if self._windows is None or not self._runs.running:
            return True
        return self._windows.begins_with(self._claim(request), self._chunk) <= self._left_by_windows()

    def _left_by_windows(self) -> int:
        """Pages of windowed layers that a step's prompts may have beside what all that run take."""
        if self._windows is not None and self._spare is None:
            self._spare = self._windows.num_pages - sum(map(self._takes, self._runs.running))
        return self._spare or 0

    def _takes(self, request: Request) -> int:
        return self._windows.takes(request, self._claim(request)) if self._windows is not None else 0

    def _spend(self, pages: int) -> None:
        if self._spare is not None:
            self._spare -= pages

    def _compute(self, request: Request, budget: int, plan: dict[Request, int]) -> int:
        """Plans up to ``budget`` more tokens of a request, as far as pages go; returns how many."""
        self._runs.at = request
        prefill = _is_prefill(request)
        spare, before = (self._left_by_windows(), self._takes(request)) if prefill else (0, 0)
        if prefill and request not in plan:
            self._holdings.rematch(request)
        elif prefill and self._holdings.is_known(request):
            return 0  # a newcomer computes what comes next
        elif prefill and not self._holdings.unsave(request):
            return 0
        begin = request.computed
        end = min(request.length, begin + budget)
        if request.scored < request.num_prompt and request.params.prompt_logprobs:
            end = min(end, plan.get(request, begin) + _SCORED_CHUNK)
        if prefill and self._windows is not None:  # others are to find their windows beside it
            left = spare + before - self._takes(request)
            end = min(end, self._windows.ahead(request, self._claim(request), left))
        end = self._holdings.reach(request, self._holdings.boundary(request, begin, end) if prefill else end)
        self._spend(self._takes(request) - before if prefill else 0)
        if end <= begin:
            return 0
        plan.setdefault(request, begin)
        request.computed = end
        # What skips to its newest token is a decode: it may run behind those who would read it.
        if prefill and not (request.pooling is None and request.num_prompt <= plan[request] == request.length - 1):
            self._holdings.publish(request)
        return end - begin

    def _batch(self, plan: dict[Request, int]) -> Batch:
        snapshots = [self._planned(request) for request in plan]
        works = [self._work(r, start, *kept) for (r, start), kept in zip(plan.items(), snapshots, strict=True)]
        works.sort(key=lambda work: work.end - work.start > 1)
        return Batch(tuple(works))

    def _planned(self, request: Request) -> tuple[int | None, int | None]:
        self._runs.at = request
        return self._holdings.planned(request)

    def _work(self, request: Request, start: int, restore: int | None, save: int | None) -> Work:
        end, scores = request.computed, None
        samples = end == request.length and request.pooling is None
        if start < request.num_prompt or end - start > 1:
            self.prefilled += end - start
        else:
            self.decoded += 1
        if request.params.prompt_logprobs and request.scored < min(end, request.num_prompt):
            scores = request.scored + 1
            request.scored = min(end, request.num_prompt)
        request.length += samples
        return Work(request, start, end, samples, scores, restore, save, _pools_from(request, end))


def _pools_from(request: Request, end: int) -> int | None:
    """From which token on a Work up to ``end`` gives hidden states to the request's vector; None if it gives none."""
    if request.pooling is None:
        return None
    if not request.pools_all:
        return end - 1 if end == request.num_prompt else None
    begin, request.scored = request.scored, max(request.scored, end)
    return begin if begin < end else None


def _is_prefill(request: Request) -> bool:
    """Whether more than the newest token is left to compute, or a prompt token."""
    return request.length - request.computed > 1 or request.computed < request.num_prompt
