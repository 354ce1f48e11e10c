"""Rows that attend to the pool by page, over the kernels' own launches: the logits of a model alone."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
import pytest

from pippin import kernels
from pippin.pieces import Pieces
from pippin.probe import Choice, choose_attention
from pippin.runner import MlxModelRunner
from pippin.types import Batch, Request, SamplingParams, Work
from tests.checkpoints import build_model, family_config, random_weights
from tests.test_kernels_dispatch import Gpu, gpu, needs_compiler, played

__all__ = ["gpu"]

pytestmark = needs_compiler

VOCAB = 288
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 16},
    "gpt_oss": {"sliding_window": 6, "num_local_experts": 4, "num_experts_per_tok": 2},
}
# Where each sequence's second work begins and ends: a single token, drafts to verify, a short prompt, a chunk of many
# tokens, and two of so few that latents are read for each.
WORKS = ((11, 12), (9, 14), (0, 6), (3, 25), (12, 14), (13, 16))


def tiny(family: str) -> nn.Module:
    model = build_model(family_config(family, vocab_size=VOCAB, **FAMILIES[family]))
    model.load_weights(list(random_weights(model, 0).items()))
    mx.eval(model.parameters())
    return model


def sequences(page_size: int) -> list[Request]:
    """One for each of WORKS, in shuffled pages."""
    random, found = np.random.default_rng(5), []
    pages = random.permutation(len(WORKS) * (26 // page_size + 1)) + 1
    for i, (_, end) in enumerate(WORKS):
        mine = pages[i * (26 // page_size + 1) :][: end // page_size + 1]
        request = Request(f"r{i}", random.integers(0, VOCAB, end).tolist(), end, SamplingParams(), row=i + 1)
        request.slots = array("i", [int(p) * page_size + j for p in mine for j in range(page_size)])
        found.append(request)
    return found


def logits(model: nn.Module, choice: Choice, page_size: int) -> npt.NDArray[np.float32]:
    """Of each sequence's last token, once what comes before WORKS is stored."""
    requests = sequences(page_size)
    runner = MlxModelRunner(model, choice.backend, choice.pool(300, page_size), max_running=8, vocab_size=VOCAB)
    runner.logits(Batch(tuple(Work(r, 0, s, False) for r, (s, _) in zip(requests, WORKS, strict=True) if s)))
    works = [Work(r, s, e, True) for r, (s, e) in zip(requests, WORKS, strict=True)]
    return np.asarray(runner.logits(Batch(tuple(works))))


def alone(model: nn.Module, page_size: int) -> npt.NDArray[np.float32]:
    rows = [model(mx.array([r.tokens]))[0, -1] for r in sequences(page_size)]
    return np.asarray(mx.stack(rows).astype(mx.float32))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("page_size", [1, 4])
def test_several_rows_of_a_sequence_attend_at_once(gpu: Gpu, family: str, page_size: int) -> None:
    # The prefixes but the first chunk's are short too: what is gathered is the last work's alone.
    assert_attends_at_once(gpu, family, page_size)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("page_size", [1, 4])
def test_works_that_are_cut_attend_as_whole_ones(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch, family: str, page_size: int
) -> None:
    cut: list[range] = []

    class Told(Pieces):
        def parts(self, works: Sequence[Work]) -> list[tuple[int, Work]]:
            found = super().parts(works)
            cut.extend(range(p.start, p.end) for i, p in found if p.start != works[i].start or p.end != works[i].end)
            return found

    monkeypatch.setattr(Pieces, "of", staticmethod(lambda several: Told(4, planned=True)))
    # Of the fourth work tokens 8 to 23 gather; 3 to 7 go with all others, 24 with the single token.
    assert_attends_at_once(gpu, family, page_size)
    assert {range(3, 8), range(8, 24), range(24, 25)} <= set(cut)


def assert_attends_at_once(gpu: Gpu, family: str, page_size: int) -> None:
    """With the right logits: two launches a layer for several rows, one for single ones, one that gathers."""
    model = tiny(family)
    choice = choose_attention(model, "rows", VOCAB, fuse=False)
    want = alone(model, page_size)
    gpu.launched.clear()
    got = logits(model, choice, page_size)
    assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()
    layers = len(choice.shapes)
    assert gpu.launched.count("paged_extend") == 2 * layers
    assert gpu.launched.count("paged_decode") == layers
    assert gpu.launched.count("kv_gather") == layers


@pytest.mark.parametrize("wrong", ["paged_extend", "paged_reduce"])
def test_rows_gather_first_where_the_kernel_for_several_is_wrong(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, wrong: str
) -> None:
    model = tiny("qwen3")
    for machine in played(monkeypatch, tmp_path, Gpu(wrong=(wrong,))):
        choice = choose_attention(model, "rows", VOCAB, fuse=False)
        pools = choice.pool(300).layer(0)
        assert kernels.rows_by_page(*pools) == 1
        machine.launched.clear()
        got = logits(model, choice, 1)
        assert "paged_extend" not in machine.launched
    want = alone(model, 1)
    assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()
