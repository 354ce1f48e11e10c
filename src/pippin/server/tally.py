"""Counts of what passes with every token, kept as plain numbers: prometheus_client's take a lock for each."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector


@dataclass(slots=True)
class Tally:
    """Values by bucket, of which the last is for those beyond all ``bounds``. For one thread."""

    bounds: Sequence[float]
    counts: list[int] = field(init=False)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def add(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    def buckets(self) -> list[tuple[str, float]]:
        """Prometheus' buckets: each counts what is not above its bound."""
        return list(zip([*map(str, map(float, self.bounds)), "+Inf"], accumulate(self.counts), strict=True))


class Tokens(Collector):
    """What is counted token by token, of each model that was served: seconds between tokens, and tokens."""

    def __init__(self, prefix: str, bounds: Sequence[float]) -> None:
        self._prefix, self._bounds = prefix, bounds
        self._between: dict[str, Tally] = {}
        self._generated: dict[str, list[int]] = {}

    def of(self, model: str) -> tuple[Tally, list[int]]:
        """The model's intervals, and one number to add its tokens to."""
        return self._between.setdefault(model, Tally(self._bounds)), self._generated.setdefault(model, [0])

    def collect(self) -> Iterator[Metric]:
        between = HistogramMetricFamily(
            self._prefix + "inter_token_latency_seconds", "From token to token.", labels=("model_name",)
        )
        for model, tally in self._between.items():
            between.add_metric((model,), tally.buckets(), tally.total)
        yield between
        generated = CounterMetricFamily(self._prefix + "generation_tokens", "Tokens generated.", labels=("model_name",))
        for model, (count,) in self._generated.items():
            generated.add_metric((model,), count)
        yield generated
