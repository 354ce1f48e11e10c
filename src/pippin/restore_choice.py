"""Whether a prefix comes back from disk sooner than it is computed, by what this engine has seen of both. Plain Python.

A step takes some time however few tokens it computes, so tokens are computed faster the more of them a step has: paces
are kept by the size of the step. Every step with prompts in it is seen. Where none as large as a prefix's would be has
been, or not for long, some of a prefix is computed to see: as much as is sure not to take long by what smaller steps
took. Where prefixes are computed, some of one is read now and then.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable

from pippin.types import Batch, Token

LEAST = 16
"""Fewest prompt tokens of a step by whose time a pace is told."""

TRIAL = 64
"""The fewest tokens that are computed for a trial; others are as many times two, up to a step's most."""

TRIAL_READ = 512
"""Tokens that are read for a trial; by the time of half as many a pace is told."""

WORTH_TRYING = 2048
"""Fewest tokens of a prefix that is used for a trial."""

AGAIN = 16
"""Prefixes one way, and then the other way is tried again."""

GAIN = 1.25
"""How much sooner the other way must be done to be taken: times that are alike change nothing."""

TRIAL_SECONDS = 0.25
"""The most that a trial is expected to add to the time of a request."""

CREDIT = 1.0
"""Seconds that trials may add at first, and the most that they may save up."""

SHARE = 1 / 16
"""Of the time that restoring takes, by which that credit grows."""

_KEPT = 5  # times
_SURE = 2  # times: the first may be spoilt, as where a kernel was compiled


class Pace:
    """Seconds a token: the median of the last few times, the lower one of two. ``at``: prefixes before the last."""

    def __init__(self) -> None:
        self._seen: deque[float] = deque(maxlen=_KEPT)
        self.at = 0

    def add(self, tokens: int, seconds: float, at: int = 0) -> None:
        self._seen.append(max(seconds, 1e-9) / tokens)
        self.at = at

    @property
    def known(self) -> bool:
        return bool(self._seen)

    @property
    def sure(self) -> bool:
        return len(self._seen) >= _SURE

    @property
    def seconds(self) -> float:
        return statistics.median_low(self._seen)


class Computing:
    """How long prompts take to compute: paces by the size of a step, and by how long the context before was.

    Both by powers of two; steps of three quarters of ``chunk`` tokens, the most that a step has, are of one size.
    """

    def __init__(self, chunk: int) -> None:
        self.chunk = chunk
        self._paces: dict[tuple[int, int], Pace] = {}

    def size(self, tokens: int) -> int:
        """The size of the largest step that computes so many tokens."""
        return self.chunk.bit_length() + 1 if 4 * tokens >= 3 * self.chunk else tokens.bit_length()

    def add(self, tokens: int, middle: Token, seconds: float, at: int) -> None:
        """A step computed so many round token ``middle``; what larger ones took, and more a token, is forgotten."""
        size, power = self.size(tokens), middle.bit_length()
        pace = self._paces.setdefault((size, power), Pace())
        pace.add(tokens, seconds, at)
        for key in [k for k, seen in self._paces.items() if k[0] > size and seen.seconds > GAIN * pace.seconds]:
            if key[1] <= power:
                del self._paces[key]

    def nearest(self, tokens: int, power: int) -> tuple[int, Pace] | None:
        """The size nearest to what ``tokens`` take, smaller ones first as they are slower, and its pace.

        Of the contexts that were seen the nearest, the shorter ones first.
        """
        if not self._paces:
            return None
        size, sizes = self.size(tokens), {size for size, _ in self._paces}
        size = max((s for s in sizes if s <= size), default=min(sizes))
        found = min((p for s, p in self._paces if s == size), key=lambda seen: (seen > power, abs(seen - power)))
        return size, self._paces[size, found]

    def seconds(self, begin: Token, end: Token) -> float | None:
        """To compute tokens ``begin`` … ``end`` - 1; None if nothing was seen."""
        total, at = 0.0, begin
        while at < end:
            power = at.bit_length()
            stop = min(end, 1 << power)
            nearest = self.nearest(end - begin, power)
            if nearest is None:
                return None
            total += (stop - at) * nearest[1].seconds
            at = stop
        return total

    def rate(self) -> float:
        """Tokens a second by the largest steps, in front of a short context; 0 if nothing was seen."""
        nearest = self.nearest(self.chunk, 0)
        return 1 / nearest[1].seconds if nearest is not None else 0.0


class RestoreChoice:
    """Chooses for each prefix how far it is restored. ``always``: as far as it can be. ``chunk``: a step's most tokens.

    Until both ways are known well for prefixes of a length (by powers of two) the one that seems sooner is taken.
    """

    def __init__(self, always: bool = False, clock: Callable[[], float] = time.monotonic, chunk: int = 2048) -> None:
        self.always = always
        self.computed_prefixes = 0
        """Prefixes on disk that were computed, but for what a trial restored of them."""
        self.computed_tokens = 0
        """Their tokens that could have been restored."""
        self._clock = clock
        self._restoring = Pace()
        self._computing = Computing(chunk)
        self._computes: dict[int, bool] = {}  # what was chosen for a length
        self._since_read, self._asked, self._tried = 0, 0, 0
        self._trying, self._told = 0, True  # the size of the last trial, and whether a step has told of that since
        self._credit = CREDIT
        self._launched: deque[tuple[Batch, float, int]] = deque(maxlen=4)
        self._read_at = 0.0

    def rates(self) -> tuple[float, float]:
        """Tokens a second that are restored, and computed in front of a short context; 0 where not seen yet."""
        return 1 / self._restoring.seconds if self._restoring.known else 0.0, self._computing.rate()

    def launched(self, batch: Batch, traces: int = 0) -> None:
        """A step is queued, when so many functions had been compiled."""
        self._launched.append((batch, self._clock(), traces))

    def finished(self, batch: Batch, traces: int = 0) -> None:
        """A step was read: if most of it were prompts, and nothing was compiled, it tells how fast they are."""
        now, before = self._clock(), self._read_at
        self._read_at = now
        while self._launched:
            found, at, compiled = self._launched.popleft()
            if found is batch:
                break
        else:
            return
        prompts = [w for w in batch.works if not w.decodes]
        tokens = sum(w.end - w.start for w in prompts)
        if tokens < LEAST or 2 * tokens < batch.num_tokens or traces > compiled:
            return
        middle = sum((w.start + w.end) // 2 * (w.end - w.start) for w in prompts) // tokens
        self._computing.add(tokens, middle, now - max(at, before), self._asked)
        self._told |= self._computing.size(tokens) >= self._trying

    def restored(self, tokens: int, seconds: float) -> None:
        """So many tokens came back, so long after they were first asked for; a few of them say nothing."""
        if tokens >= TRIAL_READ // 2:
            self._restoring.add(tokens, seconds)
            self._since_read = 0
            self._credit = min(CREDIT, self._credit + SHARE * seconds)

    def end(self, begin: Token, end: Token) -> Token:
        """How far a prefix is restored that is in memory up to ``begin`` and on disk up to ``end``; counts it."""
        if self.always or not self._restoring.known:
            return end
        self._asked += 1
        if not self._computes_sooner(begin, end):
            return end - self._trial(begin, end)
        self._since_read += 1
        stop = begin
        if end - begin >= WORTH_TRYING and self._since_read >= AGAIN:
            self._since_read, stop = 0, begin + TRIAL_READ
        self.computed_prefixes += 1
        self.computed_tokens += end - stop
        return stop

    def _computes_sooner(self, begin: Token, end: Token) -> bool:
        """Stays with what was chosen for such a length, unless the other way is much faster."""
        computing, restoring = self._computing.seconds(begin, end), (end - begin) * self._restoring.seconds
        nearest = self._computing.nearest(end - begin, end.bit_length())
        if computing is None or nearest is None:
            return False
        length = end.bit_length()
        chosen = self._computes.get(length)
        gain = 1.0 if chosen is None else GAIN
        if computing * gain < restoring:
            chosen = True
        elif restoring * gain < computing:
            chosen = False
        size, pace = nearest
        if chosen is not None and pace.sure and size >= self._computing.size(end - begin):
            self._computes[length] = chosen
        return bool(chosen)

    def _trial(self, begin: Token, end: Token) -> int:
        """How many of the last tokens are computed to see how long that takes; 0: none of them."""
        if end - begin < WORTH_TRYING:
            return 0
        tokens, cost = self._largest(begin, end)
        if not tokens:
            return 0
        size, nearest = self._computing.size(tokens), self._computing.nearest(end - begin, end.bit_length())
        sure = nearest is not None and nearest[0] >= size and nearest[1].sure
        last = max(self._tried, nearest[1].at) if sure and nearest is not None else self._tried
        if (sure or not self._told) and self._asked - last < AGAIN:
            return 0
        self._tried, self._trying, self._told = self._asked, size, False
        self._credit -= cost
        return tokens

    def _largest(self, begin: Token, end: Token) -> tuple[int, float]:
        """The largest trial that can be paid for, and what it costs: seconds more than reading. (0, 0) if none can."""
        tokens = TRIAL
        while 2 * tokens < min(end - begin, self._computing.chunk + 1):
            tokens *= 2
        while tokens >= TRIAL:
            seconds = self._computing.seconds(end - tokens, end)
            if seconds is None:
                return TRIAL, 0.0
            cost = max(0.0, seconds - tokens * self._restoring.seconds)
            if cost <= min(TRIAL_SECONDS, self._credit):
                return tokens, cost
            tokens //= 2
        return 0, 0.0
