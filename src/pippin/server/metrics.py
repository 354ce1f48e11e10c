"""/metrics: SGLang's names with our prefix, in a registry of the app's own.

The engine's counts come from the last step's ``Stats`` when somebody asks; latencies are observed as tokens pass.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from pippin.client import EngineClient
from pippin.completion import Delta
from pippin.messages import Stats
from pippin.server.tally import Tokens

PREFIX = "pippin:"

# Seconds. A first token takes from milliseconds (a cached prompt) to minutes, the next ones far less.
FIRST_TOKEN = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 180)
NEXT_TOKEN = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.4, 1, 2.5)
WHOLE_REQUEST = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 180, 600)


class Metrics:
    """One server's metrics. ``track`` wraps each request's deltas, ``render`` is the page."""

    def __init__(self, client: EngineClient, model_name: str) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(EngineCounts(client, lambda: self._model_name))
        first = self._histogram("time_to_first_token_seconds", "From request to first token.", FIRST_TOKEN)
        whole = self._histogram("e2e_request_latency_seconds", "From request to its end.", WHOLE_REQUEST)
        queue = self._histogram("queue_time_seconds", "In the engine's queue before it first ran.", FIRST_TOKEN)
        self._families = first, whole, queue
        self._tokens = Tokens(PREFIX, NEXT_TOKEN)
        self._registry.register(self._tokens)
        self._requests = Counter(
            PREFIX + "num_requests", "Answers by how they ended.", ("model_name", "outcome"), registry=self._registry
        )
        self.rename(model_name)

    def _histogram(self, name: str, help: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(PREFIX + name, help, ("model_name",), registry=self._registry, buckets=buckets)

    def rename(self, model_name: str) -> None:
        """What is observed from here on is another model's."""
        self._model_name = model_name
        self._first, self._whole, self._queue = (family.labels(model_name) for family in self._families)
        self._between, self._generated = self._tokens.of(model_name)

    @contextmanager
    def track(self, n: int) -> Iterator[Callable[[Delta], None]]:
        """Gives what observes the deltas of ``n`` answers. Those without a finish were left by their client."""
        began, latest = time.perf_counter(), dict[int, float]()
        outcome = "disconnect"

        def note(delta: Delta) -> None:
            nonlocal n
            if delta.tokens:
                self._observe(delta, began, latest)
            if delta.finish is not None:
                self._end(delta.finish.reason, began)
                n -= 1

        try:
            yield note
        except Exception:
            outcome = "error"
            raise
        finally:
            for _ in range(n):
                self._end(outcome, began)

    def _observe(self, delta: Delta, began: float, latest: dict[int, float]) -> None:
        now, count = time.perf_counter(), len(delta.tokens)
        before = latest.get(delta.index)
        if before is None:
            self._first.observe(now - began)
            self._queue.observe(delta.waited)
        else:
            self._between.add((now - before) / count, count)
        latest[delta.index] = now
        self._generated[0] += count

    def _end(self, outcome: str, began: float) -> None:
        self._requests.labels(self._model_name, outcome).inc()
        self._whole.observe(time.perf_counter() - began)

    def render(self) -> bytes:
        """The page in Prometheus' text format."""
        return generate_latest(self._registry)


@dataclass(frozen=True)
class EngineCounts(Collector):
    """The engine's own counts, read when the page is."""

    client: EngineClient
    model_name: Callable[[], str]

    def collect(self) -> Iterator[Metric]:
        stats, model = self.client.stats, self.model_name()
        for name, help, gauge in gauges(stats):
            family: Metric = GaugeMetricFamily(PREFIX + name, help, labels=("model_name",))
            family.add_sample(PREFIX + name, {"model_name": model}, gauge)
            yield family
        for name, help, count in counters(stats):
            counter = CounterMetricFamily(PREFIX + name, help, labels=("model_name",))
            counter.add_metric((model,), count)
            yield counter
        misses = CounterMetricFamily(
            PREFIX + "cache_misses",
            "Prompts found in the cache in part only, by why.",
            labels=("model_name", "reason"),
        )
        for reason, number in stats.misses.items():
            misses.add_metric((model, reason), number)
        yield misses
        drops = CounterMetricFamily(
            PREFIX + "kv_disk_drops",
            "Blocks of K and V that --kv-disk did not keep, by why.",
            labels=("model_name", "reason"),
        )
        for reason, number in stats.kv_disk_drops.items():
            drops.add_metric((model, reason), number)
        yield drops


def gauges(stats: Stats) -> list[tuple[str, str, float]]:
    total = stats.slots_total
    used = total - stats.slots_free - stats.slots_evictable  # SGLang's: what only the cache holds gives way
    return [
        ("num_running_reqs", "Requests that run.", stats.num_running),
        ("num_queue_reqs", "Requests that wait.", stats.num_waiting),
        ("max_total_num_tokens", "KV slots there are.", total),
        ("num_used_tokens", "KV slots that running requests hold.", used),
        ("num_cached_tokens", "KV slots that the prefix cache holds.", stats.slots_cached),
        ("num_evictable_tokens", "Of these, those that no running request holds.", stats.slots_evictable),
        ("num_free_tokens", "KV slots that are free.", stats.slots_free),
        ("kv_disk_bytes", "Bytes of K and V on disk, by the last look.", stats.kv_disk_bytes),
        ("kv_disk_restore_rate", "Tokens a second that lately came from disk.", stats.kv_disk_restore_rate),
        ("kv_disk_compute_rate", "Tokens a second of prompts that were lately computed.", stats.kv_disk_compute_rate),
        ("kv_disk_restoring_reqs", "Requests that wait for K and V from disk.", stats.kv_disk_restoring),
        (
            "window_slots",
            "KV slots that windowed layers have of their own.",
            stats.window_slots_total,
        ),
        ("window_slots_free", "Of these, those of no token.", stats.window_slots_free),
        ("window_slots_cached", "Of these, those that no request's window reaches.", stats.window_slots_cached),
        ("num_mamba_snapshots", "Snapshots of recurrent state kept for reuse.", stats.snapshots),
        ("memory_bytes", "Bytes of MLX's arrays on its device.", stats.memory_bytes),
        ("memory_peak_bytes", "The most bytes that they had so far.", stats.memory_peak_bytes),
        ("token_usage", "Share of the KV slots that running requests hold.", used / total if total else 0.0),
        (
            "cache_hit_rate",
            "Share of all prompt tokens so far that came from the prefix cache.",
            stats.cached_tokens / stats.prompt_tokens if stats.prompt_tokens else 0.0,
        ),
    ]


def counters(stats: Stats) -> list[tuple[str, str, float]]:
    return [
        ("prompt_tokens", "Prompt tokens of admitted requests.", stats.prompt_tokens),
        ("cached_tokens", "Prompt tokens that came from the prefix cache.", stats.cached_tokens),
        ("prefill_tokens", "Tokens computed for prompts.", stats.prefill_tokens),
        ("decode_tokens", "Tokens computed one at a time.", stats.decode_tokens),
        ("steps", "Steps of the engine.", stats.steps),
        ("overlapped_steps", "Steps queued before the one before was read.", stats.overlapped_steps),
        ("forced_tokens", "Tokens that grammars left no choice of.", stats.forced_tokens),
        ("step_seconds", "Time spent in steps.", stats.step_seconds),
        ("evicted_mamba_snapshots", "Snapshots of recurrent state given up for others.", stats.snapshots_evicted),
        ("graph_traces", "Steps compiled while serving: after a while, no more.", stats.graph_traces),
        ("graph_replays", "Steps launched as they were recorded (CUDA).", stats.graph_replays),
        (
            "kv_canary_mismatches",
            "Requests ended since a KV slot was not what it should be.",
            stats.kv_canary_mismatches,
        ),
        ("engine_restarts", "Times that the engine's process was restarted.", stats.restarts),
        ("num_resumed_reqs", "Requests that went on in another engine process.", stats.resumed),
        ("kv_disk_hit_tokens", "Tokens whose K and V came from disk.", stats.kv_disk_hit_tokens),
        (
            "kv_disk_computed_prefixes",
            "Prefixes on disk that were computed, since that is faster.",
            stats.kv_disk_computed_prefixes,
        ),
        ("kv_disk_computed_tokens", "Tokens of such prefixes.", stats.kv_disk_computed_tokens),
        ("kv_disk_read_bytes", "Bytes of K and V read from disk.", stats.kv_disk_read_bytes),
        ("kv_disk_written_bytes", "Bytes of K and V written to disk.", stats.kv_disk_written_bytes),
        ("num_retracted_reqs", "Requests that gave their slots back and started over.", stats.retractions),
    ]
