"""From restart to first token with the prefix on disk, against cold: ``python -m benchmarks.kv_disk [--shape 8b]``.

A random model of one of ``benchmarks.gpu.SHAPES``, or without a shape a Qwen3 of 42 M parameters in float32: speed does
not depend on the weights. Each engine is new and has run another prompt of that length; loading the model, which is the
same in both, is left out. Tokens must be equal. One line of JSON; on an idle machine the medians are worth quoting.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import mlx.core as mx

from benchmarks.checkpoint import FULL, make_checkpoint
from benchmarks.gpu import SHAPES, make_core, make_model, prompts
from pippin.config import EngineConfig
from pippin.core import EngineCore
from pippin.loading import build_core
from pippin.messages import Submit
from pippin.models.load import LoadedModel, load_mlx_model
from pippin.types import SamplingParams


def first_token(core: EngineCore, row: list[int], id: str) -> tuple[float, list[int], int]:
    """Seconds to the first token, 32 greedy tokens, and how many of the prompt's came from a cache."""
    began, first, tokens, cached = time.perf_counter(), 0.0, list[int](), 0
    core.add(Submit(id, row, len(row), SamplingParams(temperature=0.0, max_new_tokens=32, ignore_eos=True)))
    while core.has_work:
        step = core.step()
        for output in step.outputs if step else ():
            first = first or time.perf_counter() - began
            tokens, cached = tokens + output.tokens, output.num_cached
    return first, tokens, cached


class Engines:
    """New engines over one model."""

    def __init__(self, shape: str | None, directory: Path, length: int) -> None:
        self._shape, self._directory, self._length = shape, directory, length
        self._model = make_model(shape) if shape else None
        self._loaded: LoadedModel | None = None
        if shape is None:
            path = str(make_checkpoint(directory / "model", FULL))
            self._loaded = load_mlx_model(path, EngineConfig(model_path=path))

    @property
    def vocab_size(self) -> int:
        return int(self._model.args.vocab_size) if self._model is not None else FULL.vocab

    def make(self, kv: str | None) -> EngineCore:
        options = {"kv_disk": kv, "kv_disk_gb": 40.0, "max_total_tokens": 4 * self._length, "max_running_requests": 8}
        if self._model is not None:
            return make_core(self._model, **options)
        assert self._loaded is not None
        return build_core(self._loaded, EngineConfig(model_path=str(self._loaded.path), **options), lambda _: None)  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    cold, warm, told, cached, read = list[float](), list[float](), list[list[int]](), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        engines = Engines(args.shape, Path(folder), args.tokens)
        for turn in range(args.rounds):
            other, row = prompts(2, args.tokens, engines.vocab_size, 100 + turn)
            kv = str(Path(folder) / f"kv{turn}")
            for times in (cold, warm):
                core = engines.make(kv)
                first_token(core, other[: args.tokens - turn - 1], "other")
                seconds, tokens, cached = first_token(core, row, "row")
                times.append(seconds)
                read = core.stats.kv_disk_read_bytes
                core.close()
                told.append(tokens)
    facts = {
        "benchmark": "kv_disk",
        "device": str(mx.default_device()),
        "model": args.shape or "qwen3 42M float32",
        "tokens": args.tokens,
        "cached": cached,
        "read_bytes": read,
        "cold_s": round(statistics.median(cold), 4),
        "restored_s": round(statistics.median(warm), 4),
        "ratio": round(statistics.median(cold) / statistics.median(warm), 2),
        "same_tokens": told[::2] == told[1::2],
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
