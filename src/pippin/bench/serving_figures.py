"""From recorded times to figures: SGLang's names and definitions, in its units."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

import numpy as np

from pippin.bench.results import Value
from pippin.bench.serving_api import Answer

Figures = dict[str, Value]


def ttft(answer: Answer) -> float:
    """Seconds from sending to the first text."""
    return answer.arrivals[0] - answer.sent


def latency(answer: Answer) -> float:
    """Seconds from sending to the end of the answer."""
    return answer.end - answer.sent


def tokens_of(answer: Answer) -> int:
    """Tokens of the answer: the server's count, else one for each arrival."""
    return sum(answer.counts) if answer.output_tokens is None else answer.output_tokens


def tpot(answer: Answer) -> float | None:
    """Seconds a token after the first; None of a single one. Tokens that share an event count, where servers count."""
    tokens = tokens_of(answer)
    return (answer.arrivals[-1] - answer.arrivals[0]) / (tokens - 1) if tokens > 1 else None


def gaps(answer: Answer) -> list[float]:
    """Seconds between tokens. Tokens that came together share the time since those before."""
    found = []
    for (before, now), count in zip(pairwise(answer.arrivals), answer.counts[1:], strict=True):
        found += [(now - before) / count] * count
    return found


def is_good(answer: Answer, goals: Mapping[str, float]) -> bool:
    """Whether an answer came, and kept each bound, in seconds: ``ttft``, ``tpot``, ``itl`` (its mean), ``e2el``."""
    if answer.error is not None:
        return False
    between = gaps(answer)
    found = {
        "ttft": ttft(answer),
        "tpot": tpot(answer) or 0.0,
        "itl": sum(between) / len(between) if between else 0.0,
        "e2el": latency(answer),
    }
    return all(found[name] <= bound for name, bound in goals.items())


def figures(answers: Sequence[Answer], seconds: float, goals: Mapping[str, float]) -> Figures:
    """All figures of a run of ``seconds``; those that nothing was measured for are None.

    Rates are a second, over the whole run; latencies are milliseconds, over the requests that did not fail. Shares are
    from 0 to 1.
    """
    good = [a for a in answers if a.error is None]
    prompts = [a.prompt_tokens for a in good if a.prompt_tokens is not None]
    outputs = sum(map(tokens_of, good))
    known = len(prompts) == len(good) > 0
    found: Figures = {
        "duration": seconds,
        "completed": len(good),
        "total_input_tokens": sum(prompts) if known else None,
        "total_output_tokens": outputs,
        "request_throughput": len(good) / seconds,
        "input_throughput": sum(prompts) / seconds if known else None,
        "output_throughput": outputs / seconds,
        "total_throughput": (sum(prompts) + outputs) / seconds if known else None,
        "concurrency": sum(map(latency, good)) / seconds,
        "output_counted_by": "server" if all(a.output_tokens is not None for a in good) else "events",
    }
    found |= spread("ttft", map(ttft, good)) | spread("tpot", [each for a in good if (each := tpot(a)) is not None])
    found |= spread("itl", [gap for a in good for gap in gaps(a)]) | spread("e2e_latency", map(latency, good))
    found |= spread("start_delay", (max(0.0, a.sent - a.due) for a in answers))
    return found | failures(answers) | caching(good) | goodput(answers, seconds, goals)


def spread(name: str, seconds: Iterable[float]) -> Figures:
    """Mean, median, deviation, percentiles and the largest of some times, in milliseconds."""
    values = np.fromiter(seconds, float) * 1000
    if not len(values):
        return {f"{kind}_{name}_ms": None for kind in ("mean", "median", "std", "p90", "p95", "p99", "max")}
    median, p90, p95, p99 = map(float, np.percentile(values, [50, 90, 95, 99]))
    return {
        f"mean_{name}_ms": float(values.mean()),
        f"median_{name}_ms": median,
        f"std_{name}_ms": float(values.std()),
        f"p90_{name}_ms": p90,
        f"p95_{name}_ms": p95,
        f"p99_{name}_ms": p99,
        f"max_{name}_ms": float(values.max()),
    }


def failures(answers: Sequence[Answer]) -> Figures:
    kinds = Counter(a.error for a in answers if a.error is not None)
    first = {a.error: a.detail for a in reversed(answers) if a.error is not None}
    return {
        "errors": sum(kinds.values()),
        "error_kinds": [f"{kind}: {count}" for kind, count in kinds.most_common()],
        "error_samples": [f"{kind}: {first[kind]}" for kind, _ in kinds.most_common()],
    }


def caching(good: Sequence[Answer]) -> Figures:
    """Cached prompt tokens where the server tells them, and times to the first token, cold and warm.

    Warm are requests whose beginning, at least half of the prompt, the run had sent before; cold are the others.
    """
    told = [(a.cached_tokens, a.prompt_tokens) for a in good if a.cached_tokens is not None and a.prompt_tokens]
    cached = sum(c for c, _ in told)
    found: Figures = {
        "cached_tokens": cached if told else None,
        "cache_hit_rate": cached / sum(p for _, p in told) if told else None,
    }
    for name, warm in (("cold", False), ("warm", True)):
        times = [ttft(a) * 1000 for a in good if a.warm is warm]
        found |= {f"{name}_requests": len(times), f"median_ttft_{name}_ms": float(np.median(times)) if times else None}
    return found


def goodput(answers: Sequence[Answer], seconds: float, goals: Mapping[str, float]) -> Figures:
    """Requests that kept all bounds: a second, and as a share of those that were answered or failed."""
    if not goals:
        return {"request_goodput": None, "good_share": None}
    kept = sum(is_good(a, goals) for a in answers)
    return {"request_goodput": kept / seconds, "good_share": kept / len(answers) if answers else math.nan}


def details(answers: Sequence[Answer]) -> Figures:
    """Numbers of each request that was answered, in the order in which they ended; SGLang's names, seconds."""
    good = [a for a in answers if a.error is None]
    return {
        "input_lens": [a.prompt_tokens or 0 for a in good],
        "output_lens": [tokens_of(a) for a in good],
        "ttfts": [ttft(a) for a in good],
        "latencies": [latency(a) for a in good],
    }
