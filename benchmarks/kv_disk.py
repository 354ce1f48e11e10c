"""From restart to first token with the prefix on disk, against cold: ``python -m benchmarks.kv_disk [--shape 8b]``.

A random model of one of ``benchmarks.gpu.SHAPES``, or without a shape a Qwen3 of 42 M parameters in float32: speed does
not depend on the weights. Each engine is new and has computed another prompt of that length; loading the model, which
is the same in both, is left out. Prompts are computed by an engine that finds nothing, and read by one that always
reads; then one that chooses is sent ``--choices`` of them, one after the other. Tokens must be equal. ``parts`` says
how fast files alone are read and checked, and put into the pool. One line of JSON; on an idle machine the medians are
worth quoting.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx

from benchmarks.checkpoint import FULL, make_checkpoint
from benchmarks.gpu import SHAPES, make_core, make_model, prompts
from pippin.cache.disk import BLOCK, block_keys
from pippin.config import EngineConfig
from pippin.core import EngineCore
from pippin.loading import build_core
from pippin.messages import Submit
from pippin.models.load import LoadedModel, load_mlx_model
from pippin.runner import MlxModelRunner
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

    def make(self, kv: str, restore: str) -> EngineCore:
        options = {
            "kv_disk": kv,
            "kv_disk_gb": 40.0,
            "kv_disk_restore": restore,
            "max_total_tokens": 4 * self._length,
            "max_running_requests": 8,
        }
        if self._model is not None:
            return make_core(self._model, **options)
        assert self._loaded is not None
        return build_core(self._loaded, EngineConfig(model_path=str(self._loaded.path), **options), lambda _: None)  # type: ignore[arg-type]


def written(core: EngineCore) -> None:
    """Waits until what has ended is on disk: writing would take time from what is timed next."""
    assert core._disk is not None
    core._disk._writer.submit(lambda: None).result()


def parts(core: EngineCore, row: Sequence[int]) -> dict[str, Any]:
    """GB/s of reading and checking a prompt's files, and of putting them into a pool of which nothing is used."""
    disk, runner = core._disk, core._runner
    assert disk is not None
    assert isinstance(runner, MlxModelRunner)
    assert runner._landing is not None
    count = min(len(row) // BLOCK, len(disk._reads.memory))
    keys, size = block_keys(disk._root, row, count), disk._reads.memory[0].nbytes

    def read(i: int) -> bool:
        return disk._files.read(keys[i], row[i * BLOCK : (i + 1) * BLOCK], disk._reads.memory[i]) is not None

    found: dict[str, Any] = {"blocks": count, "block_bytes": size, "host_memory": runner._landing.stays}
    for threads in (1, 4):
        with ThreadPoolExecutor(threads) as pool:
            whole = list(pool.map(read, range(count)))  # and into the page cache
            began = time.perf_counter()
            whole += pool.map(read, range(count))
        found[f"read_{threads}"] = round(count * size / (time.perf_counter() - began) / 1e9, 2)
        assert all(whole)
    page = core.info.page_size
    for name in ("put_first", "put"):
        began = time.perf_counter()
        runner.write_landed([*range(page, page + count * BLOCK)], [*range(count)])
        mx.synchronize()
        found[name] = round(count * size / (time.perf_counter() - began) / 1e9, 2)
    core.flush()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--choices", type=int, default=6)
    args = parser.parse_args()
    times: dict[str, list[float]] = {"computed": [], "always": []}
    told, facts = list[list[int]](), dict[str, Any]()
    with tempfile.TemporaryDirectory() as folder:
        engines, kv = Engines(args.shape, Path(folder), args.tokens), str(Path(folder) / "kv")
        count = max(args.rounds, args.choices)
        rows = prompts(count, args.tokens, engines.vocab_size, 100)
        others = iter(prompts(2 * args.rounds, args.tokens, engines.vocab_size, 101))
        core = engines.make(kv, "always")
        for row in rows[args.rounds :]:
            first_token(core, row, "row")
        core.close()
        for row in rows[: args.rounds]:
            for seen in times.values():
                core = engines.make(kv, "always")
                first_token(core, next(others), "other")
                written(core)
                before = core.stats.kv_disk_read_bytes
                seconds, tokens, cached = first_token(core, row, "row")
                seen.append(seconds)
                told.append(tokens)
                facts |= {"cached": cached, "read_bytes": core.stats.kv_disk_read_bytes - before}
                core.close()
        core = engines.make(kv, "always")
        facts["parts"] = parts(core, rows[0])
        core.close()
        facts["auto"], answers = choices(engines.make(kv, "auto"), rows[: args.choices])
    cold, warm = (statistics.median(seen) for seen in times.values())
    facts |= {
        "benchmark": "kv_disk",
        "device": str(mx.device_info().get("device_name")),
        "model": args.shape or "qwen3 42M float32",
        "tokens": args.tokens,
        "cold_s": round(cold, 4),
        "restored_s": round(warm, 4),
        "ratio": round(cold / warm, 2),
        "same_tokens": told[::2] == told[1::2] and all(a == b for a, b in zip(answers, told[::2], strict=False)),
    }
    print(json.dumps(facts))


def choices(core: EngineCore, rows: Sequence[list[int]]) -> tuple[dict[str, Any], list[list[int]]]:
    """What an engine that chooses did with prompts that are all on disk, and their tokens."""
    seen = [first_token(core, row, "row") for row in rows]
    core.close()
    stats = core.stats
    found = {
        "seconds": [round(seconds, 4) for seconds, _, _ in seen],
        "cached": [cached for _, _, cached in seen],
        "computed_prefixes": stats.kv_disk_computed_prefixes,
        "computed_tokens": stats.kv_disk_computed_tokens,
        "restore_rate": round(stats.kv_disk_restore_rate),
        "compute_rate": round(stats.kv_disk_compute_rate),
    }
    return found, [tokens for _, tokens, _ in seen]


if __name__ == "__main__":
    main()
