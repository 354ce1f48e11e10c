"""Large steps begin on the device before all of them is built: which layers are queued, and that tokens stay alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from pippin.models.early import LEAST_TOKENS, EarlyQueue
from tests.checkpoints import make_checkpoint
from tests.compiling import play_gpu
from tests.cores import GREEDY, make_core, replace_params, run, submits

LAYERS = 6


class Queue:
    """Notes what is queued at which layer, and queues it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.layers = 0
        self.queued: list[int] = []
        self._queue: Callable[..., None] = mx.async_eval
        built = EarlyQueue.built

        def count(early: EarlyQueue, attended: Any) -> None:
            self.layers += 1
            built(early, attended)

        monkeypatch.setattr(EarlyQueue, "built", count)
        monkeypatch.setattr(mx, "async_eval", self)

    def __call__(self, *arrays: object) -> None:
        self.queued.append(self.layers)
        self._queue(*arrays)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(LEAST_TOKENS, [1, 2, 4, 8, 16, 32, 64]), (2048, [1, 2, 4, 8, 16]), (16384, [1, 2]), (1 << 17, [1])],
)
def test_few_layers_are_queued_and_fewer_the_more_they_hold(
    tokens: int, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    queue, early = Queue(monkeypatch), EarlyQueue(tokens)
    for _ in range(100):
        early.built(mx.zeros(1))
    assert queue.queued == expected


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("early") / "qwen3"
    return make_checkpoint(path, "qwen3", head_dim=16, num_hidden_layers=LAYERS, max_position_embeddings=1024)


def test_a_long_prompt_is_begun_when_one_layer_is_built(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [[(7 * i * i + r) % 280 for i in range(LEAST_TOKENS + 40 * r)] for r in range(2)]
    asked = submits(rows, replace_params(GREEDY, max_new_tokens=4))
    expected = run(make_core(checkpoint), asked)
    play_gpu(monkeypatch)
    core = make_core(checkpoint, page_size=4, chunked_prefill_size=1024, skip_server_warmup=True)
    queue = Queue(monkeypatch)
    assert run(core, asked) == expected
    assert queue.queued[:4] == [1, 2, 4, LAYERS], "some layers, and then all that is left"
    assert queue.layers == LAYERS, "neither short steps nor compiled ones"


def test_a_short_step_is_queued_as_a_whole(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    play_gpu(monkeypatch)
    core = make_core(checkpoint, page_size=4, disable_graph=True, skip_server_warmup=True)
    queue = Queue(monkeypatch)
    run(core, submits([[5] * (LEAST_TOKENS - 1)], replace_params(GREEDY, max_new_tokens=2)))
    assert (queue.layers, len(queue.queued)) == (0, 2)


def test_a_step_that_fails_when_it_is_half_queued_is_done_again(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = submits([[i % 280 for i in range(LEAST_TOKENS + 9)]], replace_params(GREEDY, max_new_tokens=3))
    expected = run(make_core(checkpoint), asked)
    play_gpu(monkeypatch)
    core = make_core(checkpoint, page_size=4, chunked_prefill_size=1024, skip_server_warmup=True)
    queue, fails = Queue(monkeypatch), [2]

    def fail(*arrays: object) -> None:
        queue(*arrays)
        if queue.layers in fails:
            fails.clear()
            raise RuntimeError("out of memory")

    monkeypatch.setattr(mx, "async_eval", fail)
    assert run(core, asked) == expected
    assert not fails


def test_attention_that_models_compute_by_themselves_is_told_too(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    play_gpu(monkeypatch)
    core = make_core(checkpoint, page_size=4, attention_backend="padded", skip_server_warmup=True)
    queue = Queue(monkeypatch)
    run(core, submits([[5] * LEAST_TOKENS], replace_params(GREEDY, max_new_tokens=2)))
    assert queue.queued[0] == 1
