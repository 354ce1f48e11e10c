"""MLX's JIT, several kernels at a time: processes that draw tokens as a model to come will, before it is ready.

On CUDA MLX compiles an operation when it first meets it, for two seconds and more, one after the other: that took two
minutes of a first start on an H200, most of it for the ways to draw. But it is kept on disk, for any process.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Self

from pippin.backend import prepare

prepare()  # before any import of MLX

import mlx.core as mx

from pippin import kernels
from pippin.folders import cache_folder
from pippin.graph import Compiler
from pippin.kernels.build import store
from pippin.kernels.launch import dialect_digest
from pippin.sampler_graphs import SamplerGraphs
from pippin.worker import die_with_parent

log = logging.getLogger(__name__)

MOST_PROCESSES = 6
"""Each has a CUDA context of half a gigabyte."""

PATIENCE = 180.0
"""Seconds after which the engine goes on without them."""

_DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}

Start = Callable[[Sequence[str]], "subprocess.Popen[bytes]"]


def jit_folder() -> Path:
    """Where MLX keeps what its JIT compiled for CUDA."""
    given = os.environ.get("MLX_PTX_CACHE_DIR")
    return Path(given) if given else Path(tempfile.gettempdir()) / "mlx" / version("mlx") / "ptx"


def start_process(arguments: Sequence[str]) -> subprocess.Popen[bytes]:
    """``python -m pippin.jit_ahead``, which says nothing and ends with this process."""
    command, quiet = [sys.executable, "-m", "pippin.jit_ahead", *arguments], subprocess.DEVNULL
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet)


class JitAhead:
    """Compiles what drawing from logits [S, width] of ``dtype`` launches; ``vocab_size`` as in ``SamplingPlan``.

    Where it can't be, or need not be, nothing is started, and the engine compiles for itself. ``wanted``: steps are
    compiled at all. Whoever leaves the block leaves no process behind.
    """

    def __init__(
        self, vocab_size: int, width: int, dtype: mx.Dtype, wanted: bool = True, start: Start = start_process
    ) -> None:
        self._note = cache_folder() / f"jit-{_digest(vocab_size, width, dtype)}.json"
        self._processes: list[subprocess.Popen[bytes]] = []
        count = min(MOST_PROCESSES, (os.cpu_count() or 1) // 2)
        if not wanted or kernels.backend() != "cuda" or count < 2 or self._is_kept():
            return
        log.info("MLX compiles the ways to draw in %d processes, once on this machine", count)
        kind = next(name for name, known in _DTYPES.items() if known == dtype)
        whole = [str(vocab_size), str(width), kind, str(os.getpid())]
        with suppress(OSError):
            for part in range(count):
                self._processes.append(start([*whole, f"{part}/{count}"]))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.wait(0.0)

    def wait(self, seconds: float = PATIENCE) -> None:
        """Until all have ended; those that take longer are ended."""
        until = time.monotonic() + seconds
        for process in self._processes:
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdin is not None:
                process.stdin.close()
        self._processes.clear()

    def note(self) -> None:
        """To be called once the engine has warmed up: what it needed is on disk now."""
        if kernels.backend() != "cuda" or self._is_kept():
            return
        names = sorted(path.name for path in jit_folder().glob("*.ptx"))
        try:
            store.write(self._note, json.dumps(names).encode())
        except OSError as error:
            log.info("what MLX compiled is not noted: %s", error)

    def _is_kept(self) -> bool:
        try:
            names = json.loads(self._note.read_text(encoding="utf-8"))
            return all((jit_folder() / str(name)).exists() for name in names)
        except (OSError, ValueError, TypeError):
            return False


def _digest(vocab_size: int, width: int, dtype: mx.Dtype) -> str:
    """Of what decides which operations there are: the logits, MLX, the chip, and what draws."""
    here = Path(__file__).parent
    sources = [
        (here / name).read_text(encoding="utf-8") for name in ("sampler.py", "sampler_graphs.py", "penalties.py")
    ]
    facts = [str(vocab_size), str(width), str(dtype), version("mlx"), store.chip(), dialect_digest("cuda"), *sources]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]


def compile_part(vocab_size: int, width: int, dtype: mx.Dtype, part: int, parts: int) -> None:
    """Draws in every ``parts``-th way."""
    graphs, table = SamplerGraphs(vocab_size, Compiler()), mx.zeros(8, mx.int32)
    graphs.warm(mx.zeros((2, width), dtype), table, part=slice(part, None, parts))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("vocab_size", type=int)
    parser.add_argument("width", type=int)
    parser.add_argument("dtype", choices=_DTYPES)
    parser.add_argument("parent", type=int, help="the process that this one ends with")
    parser.add_argument("part", help="0/6 is the first of six")
    options = parser.parse_args(arguments)
    die_with_parent(options.parent)
    part, parts = map(int, options.part.split("/"))
    compile_part(options.vocab_size, options.width, _DTYPES[options.dtype], part, parts)


if __name__ == "__main__":
    main()
