"""Logits of tiny random models equal transformers', however the engine cuts and mixes their tokens."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pippin.types import Work
from tests.checkpoints import FAMILIES, HYBRIDS, WINDOW
from tests.parity.engine import Engine
from tests.parity.reference import LENGTH, SHARED, Reference, build_reference

TOLERANCE = 1e-4
"""Of the largest logit; float32 through three layers stays a hundred times nearer."""

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {family: (family, {}) for family in FAMILIES} | {
    "qwen2-windows": (
        "qwen2",
        {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": WINDOW},
    ),
    "phi3-window": ("phi3", {"sliding_window": WINDOW}),
    "mixtral-window": ("mixtral", {"sliding_window": WINDOW}),
}
RECURRENT = ("qwen3_next", "qwen3_5_text", "granitemoehybrid", "lfm2", "mamba", "mamba2")
VARIANTS |= {family: (family, {}) for family in RECURRENT} | {
    "jamba-dense": ("jamba", {"num_experts": 1, "num_experts_per_tok": 1}),
}
BACKENDS = {"gemma2": "padded_grouped", "deepseek_v3": "latent"} | dict.fromkeys([*HYBRIDS, "qwen3_5"], "solo")
"""Of models that compute with their mask or hide their queries; all others run as rows."""

Model = tuple[Reference, Engine]


@pytest.fixture(scope="module", params=VARIANTS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    family, overrides = VARIANTS[request.param]
    reference = build_reference(tmp_path_factory.mktemp(request.param), family, **overrides)
    return reference, Engine(reference.path)


def assert_equal(model: Model, found: Any, at: list[tuple[int, int]]) -> None:
    """``found`` [n, vocab] are the logits after token ``length`` of sequence ``i``, for each (i, length)."""
    reference = model[0]
    expected = np.stack([reference.logits[i, length - 1] for i, length in at])
    difference = np.abs(found - expected).max(axis=1) / reference.scale
    print(f"parity {reference.path.name} {difference.max():.1e}")
    assert difference.max() <= TOLERANCE, difference


def test_backend(model: Model) -> None:
    """A fault of one backend must not hide behind the next, which the probe would choose instead."""
    engine = model[1]
    assert engine.backend == BACKENDS.get(engine.loaded.model_type, "rows")


def test_one_prompt_alone(model: Model) -> None:
    reference, engine = model
    (request,) = engine.requests(reference.tokens[0])
    assert_equal(model, engine.logits((request, 0, LENGTH)), [(0, LENGTH)])


def test_ragged_prompts_and_decodes_in_one_step(model: Model) -> None:
    reference, engine = model
    requests = engine.requests(*reference.tokens)
    lengths = [1, 5, 17, 30, LENGTH - 4]
    found = engine.logits(*((r, 0, n) for r, n in zip(requests, lengths, strict=True)))
    assert_equal(model, found, list(enumerate(lengths)))
    for step in range(3):
        # Decodes beside a second chunk of the first request.
        works = [(r, n + step, n + step + 1) for r, n in list(zip(requests, lengths, strict=True))[1:]]
        chunk = (requests[0], 1 + 13 * step, 14 + 13 * step)
        found = engine.logits(*works, chunk)
        assert_equal(model, found, [*((i + 1, w[2]) for i, w in enumerate(works)), (0, chunk[2])])


def test_chunks(model: Model) -> None:
    reference, engine = model
    first, second = engine.requests(reference.tokens[2], reference.tokens[3])
    bounds = [0, 7, 8, 9, 22, 39, 40, LENGTH]
    for start, end in pairwise(bounds):
        found = engine.logits((first, start, end), (second, start, end))
        assert_equal(model, found, [(2, end), (3, end)])


@settings(max_examples=8)
@given(st.data())
def test_any_way_to_cut_and_mix(model: Model, data: st.DataObject) -> None:
    reference, engine = model
    requests = engine.requests(*reference.tokens)
    done = [0] * len(requests)
    while unfinished := [i for i, n in enumerate(done) if n < LENGTH]:
        chosen = data.draw(st.lists(st.sampled_from(unfinished), min_size=1, unique=True), label="requests")
        ends = [min(LENGTH, done[i] + data.draw(st.sampled_from([1, 2, 9, 20, 33]), label="tokens")) for i in chosen]
        found = engine.logits(*((requests[i], done[i], end) for i, end in zip(chosen, ends, strict=True)))
        assert_equal(model, found, list(zip(chosen, ends, strict=True)))
        for i, end in zip(chosen, ends, strict=True):
            done[i] = end


def test_prefix_hits(model: Model) -> None:
    reference, engine = model
    giver, taker = engine.requests(reference.tokens[0], reference.tokens[1], shared=SHARED)
    if engine.backend == "solo":  # where the state was kept, in the same step as it is made
        found = engine.run(Work(taker, SHARED, LENGTH, True, restore=1), Work(giver, 0, SHARED, True, save=1))
        assert_equal(model, found, [(1, LENGTH), (0, SHARED)])
        return
    # In the same step as the request that fills the shared slots, then behind it.
    found = engine.logits((giver, 0, LENGTH - 1), (taker, SHARED, SHARED + 9))
    assert_equal(model, found, [(0, LENGTH - 1), (1, SHARED + 9)])
    found = engine.logits((taker, SHARED + 9, LENGTH), (giver, LENGTH - 1, LENGTH))
    assert_equal(model, found, [(1, LENGTH), (0, LENGTH)])
