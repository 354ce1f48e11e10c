"""The device's memory taken away from under an engine, so that its steps fail: they are to be done in smaller ones.

    python -m benchmarks.shortage [--shape 0.6b] [--json results.jsonl]

On a GPU ballast fills what is free but for a part of what the largest step needs, and what fails are the device's own
allocations: MLX's limits free its cache and refuse nothing, on CUDA. A CPU's memory is the machine's, which is not to
be filled: there launches of more than a part of the largest step's tokens raise what MLX would.

One JSON line says what was seen. Exit status 1 unless steps failed and requests were served all the same, all others
ended with a 503 that says why, and with memory again all are served in steps as large as ever, and no slot is lost.
"""

from __future__ import annotations

import argparse
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

BLOCKS = tuple(size << 20 for size in (4096, 512, 64, 16))
"""Bytes of a piece of ballast, large ones first."""

NEW = 16
"""Tokens of an answer."""

SHARES = (0.5, 0.25, 0.1)
"""Of what the largest step needs, what is left to it."""


class ShortRunner:
    """A runner whose device has memory for steps of so many tokens."""

    def __init__(self, runner: ModelRunner, tokens: int) -> None:
        self.runner, self.tokens = runner, tokens

    def launch(self, batch: Batch) -> Flight:
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


def ballast(room: int) -> list[mx.array]:
    """Fills the device, and then leaves ``room`` bytes of it or a little more. Raises RuntimeError if nothing fails."""
    mx.clear_cache()
    held: list[mx.array] = []
    for size in BLOCKS:
        while (block := _block(size)) is not None:
            held.append(block)
            if sum(b.nbytes for b in held) > 2 * device_bytes():
                raise RuntimeError("twice the device's memory could be had: allocations do not fail here")
    freed = 0
    while held and freed < room:
        freed += held.pop().nbytes
    mx.clear_cache()
    while freed - room >= BLOCKS[-1] and (block := _block(BLOCKS[-1])) is not None:  # a large one may have gone
        held.append(block)
        freed -= block.nbytes
    return held


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
def short_of(core: EngineCore, share: float, need: int, tokens: int) -> Iterator[None]:
    """Leaves ``share`` of the ``need`` bytes, or of the ``tokens`` of the largest step where memory is not real."""
    if on_gpu():
        held = ballast(int(need * share))
        try:
            yield
        finally:
            del held
            mx.clear_cache()
        return
    runner = core._runner
    core._runner = ShortRunner(runner, max(LEAST_TOKENS, int(tokens * share)))
    try:
        yield
    finally:
        core._runner = runner


def starved(core: EngineCore, scale: Scale) -> dict[str, Any]:
    """The report: a row for each share, and ``failures``, which says what is not as it must be."""
    rounds = Shortage(core, scale)
    rounds.round()
    before, need = rounds.round(), rounds.need()
    rows, failures = list[dict[str, Any]](), list[str]()
    for share in SHARES:
        began = time.monotonic()
        try:
            with counting_failures() as failed, short_of(core, share, need, scale.chunk):
                served = rounds.round()
        except Exception as error:  # the device is lost: a server would begin another process
            failures.append(f"left {share}: the engine ended: {type(error).__name__}: {error}")
            break
        rows.append(
            {
                "left": share,
                "failed_steps": dict(failed.raised),
                "least_rows": served.rows,
                "least_tokens": served.tokens,
                "ends": dict(served.ends),
                "same_answers": sum(served.answers.get(id) == tokens for id, tokens in before.answers.items()),
                "seconds": round(time.monotonic() - began, 2),
            }
        )
        failures += [f"left {share}: {what}" for what in _wrong(served, scale.requests) + _recovered(rounds)]
    if not any(row["failed_steps"] and row["ends"].get("length") for row in rows):
        failures.append("no request was served in spite of steps that failed, so nothing is shown")
    return {"need": need, "simulated": not on_gpu(), **asdict(scale), "rows": rows, "failures": failures}


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
