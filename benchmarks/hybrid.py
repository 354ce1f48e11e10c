"""What the prefix cache costs and gives a model with recurrent state: ``python -m benchmarks.hybrid``.

Cold: prompts that share nothing, with the cache and without it, one right after the other, since a machine's speed
drifts; the median of ``--rounds`` such pairs. Chat: turns of one
conversation, and how much of each prompt came from the cache. The model is a random Qwen3-Next of a few layers: speed
does not depend on the weights. One line of JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from pippin.config import EngineConfig
from pippin.core import EngineCore
from pippin.loading import build_core
from pippin.messages import Submit
from pippin.models.load import load_mlx_model
from pippin.types import SamplingParams
from tests.checkpoints import family_config, write_checkpoint

SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 8,
    "layer_types": ["linear_attention", "full_attention"] * 4,
    "linear_num_value_heads": 8,
    "linear_num_key_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "head_dim": 64,
    "max_position_embeddings": 8192,
}


def run(core: EngineCore, rows: list[list[int]], name: str, new: int) -> tuple[float, list[int], list[int]]:
    """Seconds that requests take together, how much of each came from the cache, and the last one's tokens."""
    params = SamplingParams(temperature=0.0, max_new_tokens=new, ignore_eos=True)
    cached, tokens = [0] * len(rows), list[int]()
    began = time.perf_counter()
    for i, row in enumerate(rows):
        core.add(Submit(f"{name}-{i}", row, len(row), params))
    while core.has_work:
        step = core.step()
        for output in step.outputs if step else ():
            i = int(output.id.rpartition("-")[2])
            cached[i] = output.num_cached
            tokens += output.tokens if i == len(rows) - 1 else []
    return time.perf_counter() - began, cached, tokens


def measure(path: Path, rounds: int, prompts: int, length: int) -> dict[str, Any]:
    options: dict[str, Any] = {"model_path": str(path), "max_total_tokens": 4 * prompts * length}
    loaded = load_mlx_model(str(path), EngineConfig(**options))
    configs = {on: EngineConfig(**options, disable_radix_cache=not on) for on in (1, 0)}
    cores = {on: build_core(loaded, config, lambda _: None) for on, config in configs.items()}
    source, seconds = random.Random(0), dict[int, list[float]]({0: [], 1: []})
    for turn in range(rounds + 1):
        rows = [[source.randrange(3, 280) for _ in range(length)] for _ in range(prompts)]
        for on in (turn % 2, 1 - turn % 2):
            took = run(cores[on], rows, f"cold{turn}", 16)[0]
            seconds[on] += [took] * bool(turn)  # the first is to warm up
    stats, pairs = cores[1].stats, (seconds[1], seconds[0])
    history, hits = [source.randrange(3, 280) for _ in range(length)], []
    for turn in range(5):
        _, cached, tokens = run(cores[1], [history], f"chat{turn}", 32)
        hits.append([cached[0], len(history)])
        history = history + tokens + [source.randrange(3, 280) for _ in range(40)]
    info = cores[1].info
    return {
        "prompts": prompts,
        "prompt_tokens": length,
        "cold_on_of_off": round(statistics.median(off / on for on, off in zip(*pairs, strict=True)), 3),
        "cold_seconds_on": [round(s, 3) for s in seconds[1]],
        "cold_seconds_off": [round(s, 3) for s in seconds[0]],
        "snapshots": stats.snapshots,
        "bytes_per_snapshot": snapshot_bytes(cores[1]),
        "max_mamba_cache_size": info.max_mamba_cache_size,
        "chat_cached_of_prompt": hits,
    }


def snapshot_bytes(core: EngineCore) -> int:
    """Bytes of one snapshot."""
    info = core.info
    return info.state_bytes // (info.max_mamba_cache_size + info.max_running_requests)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--length", type=int, default=600)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = write_checkpoint(Path(folder), family_config("qwen3_next", **SIZES))
        print(json.dumps(measure(path, args.rounds, args.prompts, args.length)))


if __name__ == "__main__":
    main()
