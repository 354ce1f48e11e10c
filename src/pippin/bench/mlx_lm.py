"""mlx-lm as it is: its model class without our hooks, driven by its own generators, greedy, no answer ending early."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator, Sequence

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import BatchGenerator, generate_step

from pippin.bench.runner import Prompts
from pippin.config import EngineConfig
from pippin.memory import use_device
from pippin.models import seam
from pippin.models.load import load_mlx_model
from pippin.types import Token


def load(config: EngineConfig) -> nn.Module:
    """The model as mlx-lm would run it, in the dtype and quantization that ours has."""
    use_device(config.device)
    model = load_mlx_model(config.model_path, config).model
    # Serving hooks mlx-lm's files for the whole process: what is measured here must be in another.
    assert vars(sys.modules[type(model).__module__]).get("scaled_dot_product_attention") is not seam.attention
    return model


class MlxLmRunner:
    """A BenchRunner: ``generate_step`` for one prompt, ``BatchGenerator`` for several, all prefilled at once."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._steps: Iterator[list[Token]] = iter(())

    def prefill(self, prompts: Prompts, output_len: int) -> list[Token]:
        single = len(prompts) == 1
        self._steps = self._single(prompts[0], output_len) if single else self._batch(prompts, output_len)
        return next(self._steps)

    def decode(self) -> Iterator[list[Token]]:
        return self._steps

    def clear(self) -> None:
        self._steps = iter(())
        mx.clear_cache()

    def _single(self, prompt: Sequence[Token], output_len: int) -> Iterator[list[Token]]:
        for token, _ in generate_step(mx.array(list(prompt)), self._model, max_tokens=output_len):
            yield [token]

    def _batch(self, prompts: Prompts, output_len: int) -> Iterator[list[Token]]:
        size = len(prompts)
        batch = BatchGenerator(self._model, max_tokens=output_len, completion_batch_size=size, prefill_batch_size=size)
        waiting: dict[int, deque[Token]] = {uid: deque() for uid in batch.insert([list(p) for p in prompts])}
        for _ in range(output_len):
            while not all(waiting.values()):
                for response in batch.next()[1]:
                    waiting[response.uid].append(response.token)
            yield [tokens.popleft() for tokens in waiting.values()]
        batch.close()
