"""The device's memory taken away from under an engine, so that its steps fail: they are to be done in smaller ones.

    python -m benchmarks.shortage [--shape 0.6b] [--json results.jsonl]

On a GPU ballast fills what is free but for a part of what the largest step took when it was measured, less and less
until steps fail in two rows; what fails are the device's own allocations. The ballast stands for another program's
memory, so neither MLX's memory limit counts it, above which steps are queued piece by piece and take little, nor the
engine's watch, which would begin one request at a time. A CPU's memory is the machine's, which is not to be filled:
there launches of more than a part of the largest step's tokens raise what MLX would.

One JSON line says what was seen, after one for each row on standard error. Exit status 1 unless steps failed and
requests were served all the same, all others ended with a 503 that says why, and with memory again all are served in
steps as large as ever, and no slot is lost.

MLX's allocator on CUDA asks cudaMallocAsync for what is computed on the device, and raises if that is refused: there is
no second way to managed memory (0.32). What the host lays out or has looked at is managed, though, and stays so in
MLX's cache of free buffers: so the cache is emptied before ballast is laid, and nobody looks at ballast. Managed
ballast would show in a row: ``free`` would not fall as ``active`` grows.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import logging
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pippin.backend import prepare

prepare()  # as in benchmarks.gpu

import mlx.core as mx

from benchmarks.grammar import shaped_core
from pippin.bounds import LEAST_TOKENS, OUT_OF_MEMORY
from pippin.config import EngineConfig
from pippin.core import EngineCore
from pippin.flight import Flight, ModelRunner
from pippin.memory import device_bytes, on_gpu
from pippin.messages import Submit
from pippin.types import Batch, SamplingParams

BLOCKS = tuple(size << 20 for size in (1024, 256, 64, 16, 4, 1))
"""Bytes of a piece of ballast, large ones first."""

NEW = 16
"""Tokens of an answer."""

SHARES = (0.5, 0.25, 0.1, 0.05, 0.02, 0.0)
"""Of what the largest step needs, what is left to it."""

ENOUGH = 2
"""Rows in which steps failed and requests were served."""


class ShortRunner:
    """A runner whose device has memory for steps of so many tokens. ``largest`` is the most that was asked for."""

    def __init__(self, runner: ModelRunner, tokens: int = sys.maxsize) -> None:
        self.runner, self.tokens, self.largest = runner, tokens, 0

    def launch(self, batch: Batch) -> Flight:
        self.largest = max(self.largest, batch.num_tokens)
        if batch.num_tokens > self.tokens:
            raise RuntimeError("[malloc] Unable to allocate 34359738368 bytes.")
        return self.runner.launch(batch)

    def reset(self) -> None:
        self.runner.reset()


class FailedSteps(logging.Handler):
    """Counts steps that the core reports as failed, by what was raised."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.raised: Counter[str] = Counter()

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        said = str(error).splitlines() or [""]
        self.raised[f"{type(error).__name__}: {said[0][:120]}" if error else record.getMessage()] += 1


@contextmanager
def counting_failures() -> Iterator[FailedSteps]:
    failed, log = FailedSteps(), logging.getLogger("pippin.core")
    log.addHandler(failed)
    try:
        yield failed
    finally:
        log.removeHandler(failed)


@dataclass(frozen=True, slots=True)
class Scale:
    """So many ``requests`` of ``length`` tokens come at once, which a step of ``chunk`` tokens takes all."""

    requests: int
    length: int
    chunk: int


SMALL, LARGE = Scale(5, 25, 128), Scale(16, 500, 8192)


@dataclass(slots=True)
class Served:
    """How the requests of one round ended, and the smallest bounds that steps had meanwhile."""

    ends: Counter[str]
    answers: dict[str, list[int]]
    rows: int
    tokens: int


class Shortage:
    """Rounds of prompts that all come at once, with memory and without."""

    def __init__(self, core: EngineCore, scale: Scale) -> None:
        self.core, self.scale = core, scale
        self._round = 0

    def round(self) -> Served:
        self._round += 1
        vocab = self.core.info.vocab_size
        params = SamplingParams(temperature=0.0, max_new_tokens=NEW, ignore_eos=True)
        for i in range(self.scale.requests):
            tokens = [(7919 * (i + 1) * (j + 1)) % (vocab - 5) + 5 for j in range(self.scale.length)]
            self.core.add(Submit(f"{self._round}-{i}", tokens, len(tokens), params))
        bounds = self.core._scheduler._bounds
        served = Served(Counter(), {}, bounds.rows, bounds.tokens)
        while self.core.has_work:
            step = self.core.step()
            served.rows, served.tokens = min(served.rows, bounds.rows), min(served.tokens, bounds.tokens)
            for output in step.outputs if step else ():
                name = output.id.split("-")[1]
                served.answers.setdefault(name, []).extend(output.tokens)
                if output.finish is not None:
                    error = f" {output.finish.status}: {output.finish.message}"
                    served.ends[output.finish.reason + (error if output.finish.reason == "error" else "")] += 1
        self.core.flush()
        return served

    def need(self) -> int:
        """Bytes that a round takes beside what the engine holds anyhow."""
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        self.round()
        return mx.get_peak_memory() - before


def memory_now() -> dict[str, int]:
    """Bytes: what MLX holds, keeps free and is limited to, and what the device has free, where it says so."""
    mx.synchronize()
    found = {"active": mx.get_active_memory(), "cache": mx.get_cache_memory(), "limit": mx.get_memory_limit()}
    free = mx.device_info().get("free_memory")
    return found | ({"free": free} if isinstance(free, int) else {})


def ballast(room: int) -> list[mx.array]:
    """Fills the device until it refuses, and then leaves ``room`` bytes of it or a little more.

    Raises RuntimeError, having taken no more than the device has, if nothing is refused.
    """
    _settle()
    held, total, most = list[mx.array](), 0, device_bytes()
    for size in BLOCKS:
        while total + size <= most and (block := _block(size)) is not None:
            held.append(block)
            total += size
    if total + BLOCKS[-1] > most:
        raise RuntimeError("as much as the device has could be had: allocations do not fail here")
    freed = 0
    while held and freed < room:
        freed += held.pop().nbytes
    _settle()
    for size in BLOCKS:  # a large one may have gone
        while freed - room >= size and (block := _block(size)) is not None:
            held.append(block)
            freed -= size
    return held


def _settle() -> None:
    """What is freed goes back to the device: also what waited for work that is done now."""
    mx.synchronize()
    mx.clear_cache()
    mx.synchronize()


def _block(size: int) -> mx.array | None:
    """An array of so many bytes that are there, or None."""
    try:
        block = mx.zeros(size // 4, mx.float32)  # MLX counts elements in 31 bits
        mx.eval(block)
        mx.synchronize()
    except RuntimeError:
        mx.clear_cache()
        return None
    return block


@contextmanager
def short_of(core: EngineCore, share: float, need: int, tokens: int) -> Iterator[ShortRunner]:
    """Leaves ``share`` of the ``need`` bytes, or of the ``tokens`` of the largest step where memory is not real."""
    runner = core._runner
    core._runner = short = ShortRunner(runner, sys.maxsize if on_gpu() else max(LEAST_TOKENS, int(tokens * share)))
    held: list[mx.array] = []
    try:
        held += ballast(int(need * share)) if on_gpu() else []
        with others_memory(core, sum(block.nbytes for block in held)):
            yield short
    finally:
        core._runner = runner
        held.clear()
        _settle()


@contextmanager
def others_memory(core: EngineCore, taken: int) -> Iterator[None]:
    """``taken`` bytes of MLX's arrays count as another program's: for its limit, and for the engine's watch."""
    watch, limit = core._memory, mx.get_memory_limit()
    mx.set_memory_limit(limit + taken)
    read = watch._read if watch is not None else None
    if watch is not None and read is not None:
        watch._read = lambda: (now := read())._replace(held=now.held - taken)
    try:
        yield
    finally:
        mx.set_memory_limit(limit)
        if watch is not None and read is not None:
            watch._read = read


def starved(core: EngineCore, scale: Scale) -> dict[str, Any]:
    """The report: a row for each share, and ``failures``, which says what is not as it must be."""
    rounds = Shortage(core, scale)
    rounds.round()
    before, need = rounds.round(), rounds.need()
    facts = {"need": need, "simulated": not on_gpu(), "device_bytes": device_bytes(), "undisturbed": memory_now()}
    print(json.dumps(facts), file=sys.stderr, flush=True)
    rows, failures, shown = list[dict[str, Any]](), list[str](), 0
    for share in SHARES:
        try:
            row, wrong = _row(rounds, share, need, before)
        except Exception as error:  # the device is lost: a server would begin another process
            failures.append(f"left {share}: the engine ended: {type(error).__name__}: {error}")
            break
        print(json.dumps(row), file=sys.stderr, flush=True)
        rows.append(row)
        failures += [f"left {share}: {what}" for what in wrong + _recovered(rounds)]
        shown += bool(row["failed_steps"] and row["ends"].get("length"))
        if shown >= ENOUGH:
            break
    if not shown:
        failures.append("no request was served in spite of steps that failed, so nothing is shown")
    return facts | asdict(scale) | {"rows": rows, "failures": failures}


def _row(rounds: Shortage, share: float, need: int, before: Served) -> tuple[dict[str, Any], list[str]]:
    """What was seen with ``share`` of the ``need`` left, and what of it is wrong."""
    core, began, free = rounds.core, time.monotonic(), memory_now().get("free")
    with counting_failures() as failed, short_of(core, share, need, rounds.scale.chunk) as short:
        memory = memory_now()
        mx.reset_peak_memory()
        served = rounds.round()
        took = mx.get_peak_memory() - memory["active"]
        after = memory_now()
    row = {
        "left": share,
        "room": int(need * share),
        "free_before_ballast": free,
        "with_ballast": memory,
        "after_steps": after,
        "steps_took": took,
        "failed_steps": dict(failed.raised),
        "largest_step": short.largest,
        "least_rows": served.rows,
        "least_tokens": served.tokens,
        "level": core.stats.memory_level,
        "ends": dict(served.ends),
        "same_answers": sum(served.answers.get(id) == tokens for id, tokens in before.answers.items()),
        "seconds": round(time.monotonic() - began, 2),
    }
    return row, _wrong(served, rounds.scale.requests)


def _wrong(served: Served, requests: int) -> list[str]:
    typed = sum(count for end, count in served.ends.items() if end.startswith("error 503") and OUT_OF_MEMORY in end)
    return [] if served.ends["length"] + typed == requests else [f"ends {dict(served.ends)}"]


def _recovered(rounds: Shortage) -> list[str]:
    """With memory again all are served, at last in steps as large as ever, and every slot is free."""
    core = rounds.core
    for _ in range(50):
        served = rounds.round()
        if served.ends["length"] != rounds.scale.requests:
            return [f"with memory again: ends {dict(served.ends)}"]
        if (served.rows, served.tokens) == core._scheduler._bounds._most:
            stats = core.stats
            lost = stats.slots_total - stats.slots_free
            return [f"{lost} slots lost"] if lost else []
    return [f"with memory again steps stayed at {served.rows} rows and {served.tokens} tokens"]


def shortage(shape: str) -> dict[str, Any]:
    """``starved`` of an engine of its own."""
    scale = SMALL if shape == "tiny" else LARGE
    slots = scale.requests * (scale.length + NEW) * 2 // 16 * 16
    config = EngineConfig(max_total_tokens=slots, chunked_prefill_size=scale.chunk, disable_memory_sharing=True)
    with tempfile.TemporaryDirectory() as folder:
        core = shaped_core(shape, config, Path(folder))
        try:
            return starved(core, scale)
        finally:
            core.close()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="0.6b", help="of benchmarks.gpu: tiny, 0.6b, 8b")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if not faulthandler.is_enabled():
        faulthandler.enable()
    return told(shortage(options.shape), options.shape, options.json)


def told(report: dict[str, Any], shape: str, file: Path | None) -> int:
    """Prints a report as one line of JSON, adds it to ``file``; the exit status."""
    device = mx.device_info().get("device_name")
    line = json.dumps({"shape": shape, "mlx": version("mlx"), "device": device} | report)
    print(line, flush=True)
    if file:
        with file.open("a") as opened:
            opened.write(line + "\n")
    return 1 if report["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
