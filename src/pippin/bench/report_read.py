"""Reads result files of every kind: our lines, those of ``benchmarks/gpu.py``, and SGLang's own bench_serving."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from pippin.bench.results import BenchResult, Value
from pippin.errors import ConfigError

Json = dict[str, Any]


def read_any(paths: Sequence[Path]) -> list[BenchResult]:
    """All results, in order. Raises ConfigError naming the file and the line that is none, or if there are none."""
    found = []
    for path in paths:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ConfigError(f"{path} can't be read: {error.strerror}") from error
        for number, line in enumerate(content.split(b"\n"), 1):
            if line.strip():
                try:
                    found.append(read_line(line))
                except (ValueError, RecursionError) as error:
                    raise ConfigError(f"{path}, line {number}, is no benchmark result: {error}") from error
    if not found:
        raise ConfigError("there are no results in " + ", ".join(map(str, paths)))
    return found


def read_line(line: bytes) -> BenchResult:
    """One result. Raises ValueError for a line of no known form. SGLang writes ``Infinity``, which is not JSON's."""
    raw = json.loads(line)
    if isinstance(raw, dict) and "kind" not in raw:
        if "side" in raw and "shape" in raw:
            return of_gpu(raw)
        if "request_throughput" in raw and "mean_ttft_ms" in raw:
            return of_sglang(raw)
    return msgspec.convert(raw, BenchResult)


def of_gpu(raw: Json) -> BenchResult:
    """A line of ``benchmarks/gpu.py``: tokens a second of decoding at a number of streams, or of reading a prompt."""
    apart = ("streams", "context", "bits")
    known: dict[str, Value] = {k: v for k, v in raw.items() if isinstance(v, int | float) and k not in apart}
    return BenchResult(
        kind="gpu",
        run_name="default",
        side=str(raw["side"]),
        model=f"{raw['shape']}, {raw.get('bits', 16)} bits",
        device=str(raw.get("device", "unknown")),
        settings={"streams": raw.get("streams"), "context": raw.get("context")},
        figures=known,
        versions={name: str(raw[key]) for name, key in (("mlx", "mlx"), ("mlx-lm", "mlx_lm")) if key in raw},
        commit=raw.get("commit"),
        when=str(raw.get("date", "")),
    )


def of_sglang(raw: Json) -> BenchResult:
    """A line of ``sglang.bench_serving --output-file``."""
    plain: dict[str, Value] = {k: v for k, v in raw.items() if isinstance(v, str | int | float | bool | None)}
    rate = raw.get("request_rate")
    settings: dict[str, Value] = {
        "dataset_name": raw.get("dataset_name", ""),
        "max_concurrency": raw.get("max_concurrency"),
        "request_rate": rate if isinstance(rate, int | float) and math.isfinite(rate) else "inf",
        "num_prompts": raw.get("num_prompts", raw.get("completed")),
    }
    return BenchResult(
        kind="serving",
        run_name="default",
        side=str(raw.get("tag") or raw.get("backend") or "sglang"),
        model=str(raw.get("model_id") or raw.get("model") or "unknown"),
        device="unknown",
        settings=settings,
        figures=plain,
        versions={},
        commit=None,
        when="",
    )
