"""Requests with grammars in the engine's loop: compiled before they are scheduled, followed as they draw."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait

from pippin.errors import RequestError
from pippin.grammar.compiler import GrammarCompiler
from pippin.grammar.matcher import GrammarMatcher
from pippin.masks import RowMasks
from pippin.messages import Output, output_of
from pippin.scheduler import Scheduler
from pippin.types import Finish, Request, Token, Work, failed

log = logging.getLogger(__name__)

LEAST_FORCED, ROWS_A_TOKEN = 2, 8
"""How many tokens must be forced at once to be appended: two, and one more for so many requests that run. Fewer are
drawn, from masks that leave nothing else: a row of several new tokens saves one request steps, and costs all a longer
one. With 64 of an 8B on an H200 that was a quarter longer."""


class GrammarRequests:
    """What an engine does for requests with grammars. ``compiler`` is None where they are refused."""

    def __init__(self, compiler: GrammarCompiler | None, scheduler: Scheduler) -> None:
        self._compiler, self._scheduler = compiler, scheduler
        self._compiling: dict[str, tuple[Request, Future[GrammarMatcher]]] = {}

    def __bool__(self) -> bool:
        """Whether any request waits for its grammar."""
        return bool(self._compiling)

    def submit(self, request: Request) -> None:
        """Has its grammar compiled; ``compiled`` gives it back. Raises RequestError if that is refused."""
        grammar = request.params.grammar
        assert grammar is not None
        if self._compiler is None:
            raise RequestError(f"{grammar.field}: grammars are switched off (--grammar-backend)", grammar.field)
        if request.id in self._compiling:
            raise RequestError(f"a request with id {request.id!r} is running already", "rid")
        generated = request.tokens[request.num_prompt :]
        future = self._compiler.submit(grammar, generated, request.params.ignore_eos)
        self._compiling[request.id] = request, future

    def abort(self, id: str) -> Request | None:
        """Forgets a request that waits for its grammar; None if there is no such one."""
        request, _ = self._compiling.pop(id, (None, None))
        return request

    def compiled(self) -> Iterator[Request]:
        """Requests whose grammars are ready, or that ended because theirs can't be: ``finish`` says why."""
        for request, future in [*self._compiling.values()]:
            if not future.done():
                continue
            del self._compiling[request.id]
            try:
                request.matcher = future.result()
            except RequestError as error:
                request.finish = failed(error)
            except Exception as error:
                log.exception("the grammar of request %s could not be compiled", request.id)
                message = f"the grammar could not be compiled ({type(error).__name__})"
                request.finish = Finish("error", None, message)
            yield request

    def close(self) -> None:
        """Ends threads."""
        if self._compiler is not None:
            self._compiler.close()

    def wait(self, seconds: float) -> None:
        """Until a grammar is ready, or so long."""
        wait([future for _, future in self._compiling.values()], seconds, FIRST_COMPLETED)

    def force(self, request: Request) -> Output | None:
        """Appends what its grammar leaves no choice of: the step's draw is ignored, the next computes on.

        With logprobs such tokens are drawn one by one, from masks that allow nothing else: each needs its logits.
        """
        matcher = request.matcher
        params = request.params
        if matcher is None or request.finish is not None or params.logprobs or params.prompt_logprobs:
            return None
        if self._compiler is not None:
            self._compiler.wait()
        try:
            tokens = matcher.forced()
        except Exception as error:
            self._scheduler.fail(request, self._broken(request, error))
            return output_of(request)
        if len(tokens) < LEAST_FORCED + len(self._scheduler.runs.running) // ROWS_A_TOKEN:
            return None
        finish = self.follow(request, tokens)
        if finish is not None and finish.reason == "error":
            self._scheduler.fail(request, finish)
            tokens = []
        elif tokens:
            tokens = self._scheduler.force(request, tokens, finish)
        if not tokens and request.finish is None:
            return None
        return output_of(request, tokens)

    def look_ahead(self, works: Sequence[Work], drawn: Callable[[], Sequence[tuple[Work, Token]]]) -> None:
        """Has what a queued step draws taken into grammars as soon as it is there, while the caller goes on queueing.

        ``drawn`` waits for it. ``follow_all`` comes next, with what is to be kept of it.
        """
        matchers = {
            w.request: w.request.matcher
            for w in works
            if isinstance(w.request.matcher, GrammarMatcher) and w.samples and w.request.finish is None
            if w.end == len(w.request.tokens)  # nothing was forced in place of what it draws
        }
        if matchers and self._compiler is not None:
            self._compiler.follow(lambda: [(matchers[w.request], t) for w, t in drawn() if w.request in matchers])

    def follow_all(self, drawn: Sequence[tuple[Request, Token]]) -> dict[Request, Finish]:
        """Takes the next token of each request into its grammar; returns how those end that do.

        Of the others, masks are begun if ``look_ahead`` has not: whoever goes on leaves matchers alone until ``force``.
        """
        compiler = self._compiler
        moved = [(r.matcher, token) for r, token in drawn if isinstance(r.matcher, GrammarMatcher)]
        if compiler is not None:
            compiler.take(moved)
        ends = {request: finish for request, token in drawn if (finish := self.follow(request, [token])) is not None}
        if compiler is not None:
            going = [r.matcher for r, _ in drawn if r not in ends]
            compiler.begin([m for m in going if isinstance(m, GrammarMatcher)])
        return ends

    def follow(self, request: Request, tokens: Sequence[Token]) -> Finish | None:
        """Takes a request's next tokens into its grammar; returns how it ends, if it does."""
        matcher = request.matcher
        if matcher is None:
            return None
        try:
            for token in tokens:
                matcher.take(token)
        except RequestError as error:
            return failed(error)
        except Exception as error:
            return self._broken(request, error)
        return Finish("stop") if matcher.ended else None

    def _broken(self, request: Request, error: Exception) -> Finish:
        log.error("the grammar of request %s failed", request.id, exc_info=error)
        return Finish("error", None, f"the grammar of this request failed ({type(error).__name__})")

    def masks(self, works: Sequence[Work], outputs: list[Output]) -> Callable[[], RowMasks]:
        """What each work may draw, in a while. A request whose grammar can't go on fails then, alone."""
        assert self._compiler is not None
        made = self._compiler.fill(works)

        def masks() -> RowMasks:
            found, failures = made.result()
            for row, error in failures.items():
                request = works[row].request
                self._scheduler.fail(request, failed(error))
                outputs.append(output_of(request))
            return found

        return masks
