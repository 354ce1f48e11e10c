"""Whether a prefix comes back from disk sooner than it is computed, by what this engine has seen of both. Plain Python.

Where one of them has not been seen, or not for long, a small part of a prefix is done that way, and is timed.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable

from pippin.types import Batch, Token

TRIAL = 256
"""Fewest tokens by whose time a pace is told. So many are computed for a trial."""

TRIAL_READ = 512
"""Tokens that are read for a trial."""

WORTH_TRYING = 8
"""A prefix has at least so many trials' tokens: they cost a fraction of what they decide about."""

AGAIN = 16
"""Prefixes one way, and then the other way is tried again."""

GAIN = 1.25
"""How much sooner the other way must be done to be taken: times that are alike change nothing."""

_KEPT = 5  # times


class Pace:
    """Seconds a token: the median of the last few times, since some are spoilt, as where a step was compiled first."""

    def __init__(self) -> None:
        self._seen: deque[float] = deque(maxlen=_KEPT)

    def add(self, tokens: int, seconds: float) -> None:
        self._seen.append(max(seconds, 1e-9) / tokens)

    @property
    def known(self) -> bool:
        return bool(self._seen)

    @property
    def seconds(self) -> float:
        return statistics.median_low(self._seen)


class RestoreChoice:
    """Chooses for each prefix how far it is restored. ``always``: as far as it can be.

    Computing takes longer behind a long context, so it is told apart by powers of two of where a token stands.
    """

    def __init__(self, always: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self.always = always
        self.computed_prefixes = 0
        """Prefixes on disk that were computed, but for what a trial restored of them."""
        self.computed_tokens = 0
        """Their tokens that could have been restored."""
        self._clock = clock
        self._restoring = Pace()
        self._computing: dict[int, Pace] = {}
        self._computes: set[int] = set()  # lengths, by powers of two, that are computed
        self._since_read, self._since_computed = 0, AGAIN  # computing is tried at once
        self._launched: deque[tuple[Batch, float]] = deque(maxlen=4)
        self._read_at = 0.0

    def rates(self) -> tuple[float, float]:
        """Tokens a second that are restored, and computed in front of a short context; 0 where not seen yet."""
        first = next((self._computing[i] for i in sorted(self._computing)), None)
        restored = 1 / self._restoring.seconds if self._restoring.known else 0.0
        return restored, 1 / first.seconds if first is not None else 0.0

    def launched(self, batch: Batch) -> None:
        """A step was queued."""
        self._launched.append((batch, self._clock()))

    def finished(self, batch: Batch) -> None:
        """A step was read: if most of it were prompts, it tells how fast they are computed."""
        now, before = self._clock(), self._read_at
        self._read_at = now
        while self._launched:
            found, at = self._launched.popleft()
            if found is batch:
                break
        else:
            return
        prompts = [w for w in batch.works if not w.decodes]
        tokens = sum(w.end - w.start for w in prompts)
        if tokens < TRIAL or 2 * tokens < batch.num_tokens:
            return
        middle = sum((w.start + w.end) // 2 * (w.end - w.start) for w in prompts) // tokens
        self._computing.setdefault(middle.bit_length(), Pace()).add(tokens, now - max(at, before))
        self._since_computed = 0

    def restored(self, tokens: int, seconds: float) -> None:
        """So many tokens came back, so long after they were first asked for; a few of them say nothing."""
        if tokens >= TRIAL:
            self._restoring.add(tokens, seconds)
            self._since_read = 0

    def end(self, begin: Token, end: Token) -> Token:
        """How far a prefix is restored that is in memory up to ``begin`` and on disk up to ``end``; counts it."""
        if self.always or not self._restoring.known:
            return end
        long = end - begin >= WORTH_TRYING * TRIAL
        if self._computes_sooner(begin, end):
            self._since_read += 1
            stop = begin
            if long and self._since_read >= AGAIN:
                self._since_read, stop = 0, begin + TRIAL_READ
            self.computed_prefixes += 1
            self.computed_tokens += end - stop
            return stop
        self._since_computed += 1
        if long and self._since_computed >= AGAIN:
            self._since_computed, end = 0, end - TRIAL  # whether or not its step says anything
        return end

    def _computes_sooner(self, begin: Token, end: Token) -> bool:
        """Stays with what was chosen for such a length, unless the other way is much faster."""
        if not self._computing:
            return False
        computing, restoring = self._seconds(begin, end), (end - begin) * self._restoring.seconds
        length = end.bit_length()
        if computing * GAIN < restoring:
            self._computes.add(length)
        elif restoring * GAIN < computing:
            self._computes.discard(length)
        return length in self._computes

    def _seconds(self, begin: Token, end: Token) -> float:
        """To compute tokens ``begin`` … ``end`` - 1, by the nearest contexts that were seen, the shorter ones first."""
        total, at = 0.0, begin
        while at < end:
            power = at.bit_length()
            stop = min(end, 1 << power)
            nearest = min(self._computing, key=lambda seen: (seen > power, abs(seen - power)))
            total += (stop - at) * self._computing[nearest].seconds
            at = stop
        return total
