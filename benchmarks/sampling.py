"""What a step's sampling costs, by feature and by the way in which filters are computed, on MLX's default device.

    python -m benchmarks.sampling [--vocab 32000 152000] [--rows 1 16] [--json results.jsonl]

Milliseconds: the host's side, building the graph, and the device, each the best of some tries. ``mlx.sort`` is the
sort that a filter would need otherwise, alone.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

import benchmarks  # noqa: F401  (its BLAS comes before MLX)
from pippin.sampler import Sampled, sample, sampling_inputs
from pippin.types import Request, SamplingParams, Work

CASES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.7},
    "min_p": {"min_p": 0.05},
    "top_k 20": {"top_k": 20},
    "top_k 1000": {"top_k": 1000},
    "top_k 20, top_p": {"top_k": 20, "top_p": 0.95},
    "top_p": {"top_p": 0.95},
    "penalties": {"temperature": 0.0, "repetition_penalty": 1.1, "presence_penalty": 0.5},
    "5 logprobs": {"temperature": 0.0, "logprobs": True, "top_logprobs": 5},
}


def works(params: dict[str, Any], rows: int) -> list[Work]:
    """Rows that have read 600 tokens, the newest of which the host has not seen."""
    requests = [Request(str(i), list(range(599)), 500, SamplingParams(seed=i, **params)) for i in range(rows)]
    return [Work(r, 599, 600, True) for r in requests]


def milliseconds(params: dict[str, Any], logits: mx.array, partition: bool, tries: int) -> tuple[float, float, float]:
    """Host, graph and device time of one step's sampling; the best of ``tries``."""
    rows, vocab = logits.shape
    newest = mx.zeros((rows,), mx.int32)
    mx.eval(newest)
    best = [float("inf")] * 3
    for _ in range(tries):
        batch = works(params, rows)
        times = [time.perf_counter()]
        plan, inputs = sampling_inputs(batch, vocab, partition=partition)
        times.append(time.perf_counter())
        sampled: Sampled = sample(logits, plan, inputs, newest)
        times.append(time.perf_counter())
        mx.eval([x for x in sampled if x is not None])
        times.append(time.perf_counter())
        best = [min(b, 1e3 * (t - s)) for b, s, t in zip(best, times, times[1:], strict=False)]
    return best[0], best[1], best[2]


def sort_milliseconds(logits: mx.array, tries: int) -> float:
    best = float("inf")
    for _ in range(tries):
        began = time.perf_counter()
        mx.eval(mx.sort(logits, axis=-1))
        best = min(best, 1e3 * (time.perf_counter() - began))
    return best


def measure(vocab: int, rows: int, tries: int = 5) -> list[dict[str, Any]]:
    """A line for each case and way."""
    logits = 3 * mx.random.normal((rows, vocab), key=mx.random.key(0))
    mx.eval(logits)
    found: list[dict[str, Any]] = []
    for name, params in CASES.items():
        for partition in (False, True) if "top_k" in params else (False,):
            host, graph, device = milliseconds(params, logits, partition, tries)
            way = "partition" if partition else "bisection" if {"top_k", "top_p"} & set(params) else ""
            line = {"case": name, "way": way, "host_ms": host, "graph_ms": graph, "device_ms": device}
            found.append({"vocab": vocab, "rows": rows} | line)
    line = {
        "case": "mlx.sort",
        "way": "",
        "host_ms": 0.0,
        "graph_ms": 0.0,
        "device_ms": sort_milliseconds(logits, tries),
    }
    return [*found, {"vocab": vocab, "rows": rows} | line]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.sampling", description="What sampling costs in a step.")
    parser.add_argument("--vocab", type=int, nargs="+", default=[32_000, 152_000])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--json", type=Path, help="where to append a line per case")
    options = parser.parse_args(arguments)
    for vocab in options.vocab:
        for rows in options.rows:
            for line in measure(vocab, rows):
                print(
                    f"{vocab:7d} x {rows:3d}  {line['case']:16s} {line['way']:10s} host {line['host_ms']:6.2f}  "
                    f"graph {line['graph_ms']:5.2f}  device {line['device_ms']:8.2f} ms",
                    flush=True,
                )
                if options.json:
                    with options.json.open("a") as file:
                        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
