"""What was asked of the engine and not answered in full: what goes to it when, and what a next one is asked.

Plain Python: nothing here knows of processes.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass, field

import msgspec

from pippin.messages import Output, Submit
from pippin.restarts import Docket
from pippin.types import CacheMiss, Finish

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Job:
    """A request that has not ended: what was asked, and what has been told since.

    ``given``: the engine that lives now has it. ``told`` prompt logprobs; ``skip`` of those that come are known.
    """

    submit: Submit
    tokens: list[int] = field(default_factory=list)
    given: bool = False
    aborted: bool = False
    resumed: bool = False
    told: int = 0
    skip: int = 0
    num_cached: int = 0
    miss: CacheMiss | None = None
    waited: float = 0.0

    def again(self) -> Submit:
        """What another engine is asked, so that it goes on where the last one stopped."""
        self.skip = 0 if self.tokens else self.told  # with tokens, the engine knows that the prompt's were told
        return msgspec.structs.replace(self.submit, tokens=self.submit.tokens + self.tokens)

    def take(self, output: Output) -> Output:
        """Notes what has come; returns what of it is new to whoever asked."""
        if self.resumed:
            output = self._continued(output)
        elif output.tokens or output.num_cached:
            self.num_cached, self.miss, self.waited = output.num_cached, output.miss, output.waited
        self.tokens += output.tokens
        self.told += len(output.prompt_logprobs)
        return output

    def _continued(self, output: Output) -> Output:
        """A prompt's logprobs are told once; what the cache gave, and the time in the queue, are the first engine's."""
        known, self.skip = min(self.skip, len(output.prompt_logprobs)), max(0, self.skip - len(output.prompt_logprobs))
        if not self.tokens:
            self.num_cached, self.miss, self.waited = output.num_cached, output.miss, output.waited
        return msgspec.structs.replace(
            output,
            prompt_logprobs=output.prompt_logprobs[known:],
            num_cached=self.num_cached,
            miss=self.miss,
            waited=self.waited,
        )


class Journal:
    """All jobs. A job is added, given to the engine (``next``), and gone with the Output that has its finish."""

    def __init__(self) -> None:
        self.docket = Docket()
        self.num_resumed = 0
        """Jobs that went on in another engine, each time counted."""
        self._jobs: dict[str, Job] = {}

    def __len__(self) -> int:
        return len(self._jobs)

    def __contains__(self, id: str) -> bool:
        return id in self._jobs

    @property
    def given(self) -> bool:
        """Whether the engine has any."""
        return any(job.given for job in self._jobs.values())

    def add(self, submit: Submit) -> None:
        self._jobs[submit.id] = Job(submit)
        self.docket.add(submit.id)

    def next(self) -> list[Submit]:
        """What the engine is to be given now."""
        jobs = [self._jobs[id] for id in self.docket.next()]
        for job in jobs:
            job.given = True
        return [job.again() if job.resumed else job.submit for job in jobs]

    def abort(self, id: str) -> bool:
        """Whether the engine is to be told, which answers then. One that no engine has is to be ended."""
        job = self._jobs.get(id)
        if job is None or not job.given:
            return False
        job.aborted = True
        return True

    def take(self, output: Output) -> Output | None:
        """Notes what has come; what of it is new, or None if nobody waits for it."""
        job = self._jobs.get(output.id)
        if job is None:
            return None
        self.docket.heard(output.id, len(output.tokens))
        if output.finish is not None:
            self.end(output.id)
        return job.take(output)

    def end(self, id: str) -> None:
        del self._jobs[id]
        self.docket.ended(id)

    def end_all(self) -> list[str]:
        """Ends all; returns their ids."""
        ids = [*self._jobs]
        for id in ids:
            self.end(id)
        return ids

    def left(self, step: Collection[str] | None, why: str) -> dict[str, Finish]:
        """The engine is gone; ``step`` are the requests that it died on, if that is known, empty if it was told to go.

        Those that end with it, and how; all others are to be given out again.
        """
        guilty, ended = self.docket.crashed(step), dict[str, Finish]()
        for id, job in self._jobs.items():
            if id == guilty:
                log.error("request %s is failed: the engine died on it twice", id)
                ended[id] = Finish("error", None, f"the engine's process died on this request twice ({why})")
            elif job.given and job.aborted:
                ended[id] = Finish("abort")
            elif job.given:
                job.given, job.resumed = False, True
                self.num_resumed += 1
        for id in ended:
            self.end(id)
        return ended
