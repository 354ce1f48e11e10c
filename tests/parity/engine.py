"""The engine's path from a checkpoint to logits, without a scheduler: the tests say what each step computes."""

from __future__ import annotations

import random
from array import array
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pippin.config import EngineConfig
from pippin.models.load import LoadedModel, load_mlx_model
from pippin.probe import choose_attention
from pippin.runner import MlxModelRunner
from pippin.types import Batch, Request, SamplingParams, Work

SLOTS = 512


class Engine:
    """A loaded model on the attention backend that Pippin chooses, with a pool whose slots are dealt at random."""

    def __init__(self, path: Path, backend: str = "mlx") -> None:
        self.loaded: LoadedModel = load_mlx_model(str(path), EngineConfig(dtype="float32"))
        choice = choose_attention(self.loaded.model, backend, self.loaded.vocab_size)
        self.backend = choice.backend.name
        pool = choice.pool(SLOTS)
        self._runner = MlxModelRunner(
            self.loaded.model, choice.backend, pool, max_running=8, vocab_size=self.loaded.vocab_size
        )
        self._free: list[int] = []

    def requests(self, *prompts: list[int], shared: int = 0) -> list[Request]:
        """Requests with slots all over the pool; each after the first begins in ``shared`` slots of the first."""
        self._free = list(range(1, SLOTS))
        random.Random(7).shuffle(self._free)
        found: list[Request] = []
        for row, prompt in enumerate(prompts, 1):
            request = Request(f"r{row}", list(prompt), len(prompt), SamplingParams(), row=row)
            prefix = found[0].slots[:shared] if found else array("i")
            own = len(prompt) - len(prefix)
            request.slots = prefix + array("i", self._free[:own])
            del self._free[:own]
            found.append(request)
        return found

    def logits(self, *works: tuple[Request, int, int]) -> npt.NDArray[np.float32]:
        """Runs tokens[start:end] of each request in one step: logits [works, vocab] after each one's last token."""
        return self.run(*(Work(request, start, end, True) for request, start, end in works))

    def run(self, *works: Work) -> npt.NDArray[np.float32]:
        """The same, of works as they are given."""
        return np.asarray(self._runner.logits(Batch(works)))
