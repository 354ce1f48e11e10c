"""Vectors of prompts are the model's own hidden states, however their tokens are cut, mixed, cached and retracted."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from mlx_lm.models.cache import make_prompt_cache

from pippin.errors import ModelError, RequestError
from pippin.messages import Output, Submit
from pippin.models.load import load_model
from pippin.models.quantize import Form
from pippin.models.vectors import VectorForm, read_vector_form
from pippin.types import Finish, Pooling, SamplingParams
from tests import cores
from tests.checkpoints import make_checkpoint
from tests.cores import collect, make_core

LABELS = (7, 5, 100)
KINDS = [Pooling("last"), Pooling("mean"), Pooling("labels", LABELS)]
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=6, ignore_eos=True)

Values = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "qwen3", head_dim=32)


def prompts(count: int, longest: int = 60) -> list[list[int]]:
    rows = cores.prompts(count, longest, seed=3)
    rows[-1] = rows[0] + rows[-1][:5]  # one that begins as another does
    return rows


def expected(path: Path, rows: Sequence[Sequence[int]]) -> list[list[Values]]:
    """For each row, what each of KINDS should give: by mlx-lm's own model with its own caches, each row alone."""
    model, _, _ = load_model(str(path), Form(mx.float32, None))
    found = []
    for row in rows:
        hidden = np.array(model.model(mx.array([list(row)]), cache=make_prompt_cache(model)))[0]
        logits = np.array(model(mx.array([list(row)]), cache=make_prompt_cache(model)))[0, -1].astype(np.float64)
        logprobs = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
        found.append([hidden[-1], hidden.mean(axis=0), logprobs[list(LABELS)].astype(np.float32)])
    return found


def asked(rows: Sequence[Sequence[int]]) -> list[Submit]:
    return [
        Submit(f"{i}-{k}", list(row), len(row), SamplingParams(), 0, kind)
        for i, row in enumerate(rows)
        for k, kind in enumerate(KINDS)
    ]


def assert_vectors(found: dict[str, list[Output]], want: list[list[Values]]) -> None:
    for i, kinds in enumerate(want):
        for k, values in enumerate(kinds):
            (output,) = found[f"{i}-{k}"]
            assert output.finish == Finish("stop")
            assert not output.tokens
            got = np.frombuffer(output.pooled, "<f4")
            np.testing.assert_allclose(got, values, atol=2e-4 * max(1.0, float(np.abs(values).max())))


OPTIONS: list[dict[str, Any]] = [
    {},
    {"chunked_prefill_size": 7},
    {"chunked_prefill_size": 1},
    {"disable_overlap_schedule": True},
    {"disable_radix_cache": True},
    {"page_size": 16},
    {"max_running_requests": 2},
    {"max_total_tokens": 104, "chunked_prefill_size": 9},
    {"attention_backend": "padded", "chunked_prefill_size": 7},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ",".join(f"{k}={v}" for k, v in o.items()) or "default")
def test_vectors_are_mlx_lms_whatever_the_schedule(checkpoint: Path, options: dict[str, Any]) -> None:
    rows = prompts(7)
    want = expected(checkpoint, rows)
    core = make_core(checkpoint, **options)
    answers = [Submit(f"a{i}", row, len(row), GREEDY) for i, row in enumerate(rows)]
    alone = {id: [t for o in outs for t in o.tokens] for id, outs in collect(core, answers).items()}
    core.flush()
    for _ in range(2):  # the second time, from the cache
        mixed = collect(core, random.Random(1).sample([*asked(rows), *answers], 4 * len(rows)))
        assert_vectors(mixed, want)
        assert {id: [t for o in mixed[id] for t in o.tokens] for id in alone} == alone, "answers beside vectors"
        if options.get("disable_radix_cache"):
            assert core.stats.cached_tokens == 0
    if "max_total_tokens" not in options:
        assert core.stats.retractions == 0, "a prompt that waits to be read wants no slot"
    core.flush()
    assert core.stats.slots_free == core.stats.slots_total


@pytest.mark.parametrize("cached", [True, False])
def test_a_prompt_that_was_retracted_half_way_gives_the_same_mean(checkpoint: Path, cached: bool) -> None:
    """An answer of higher rank takes its slots; what its first tokens gave is not asked for again."""
    row = [5 + i for i in range(77)]
    core = make_core(checkpoint, max_total_tokens=112, chunked_prefill_size=1, disable_radix_cache=not cached)
    long = SamplingParams(temperature=0.0, max_new_tokens=80, ignore_eos=True)
    found = collect(core, [Submit("a", row[:10], 10, long, priority=1), *asked([row])[:2]])
    assert core.stats.retractions > 0, "the pool was to be too small for both"
    assert len([t for o in found["a"] for t in o.tokens]) == 80
    assert_vectors(found, [expected(checkpoint, [row])[0][:2]])


@pytest.mark.parametrize("family", ["gemma2", "deepseek_v3", "qwen3_next", "gpt_oss"])
def test_other_backends(tmp_path: Path, family: str) -> None:
    path = make_checkpoint(tmp_path / family, family)
    rows = prompts(5, 30)
    core = make_core(path, chunked_prefill_size=16)
    for _ in range(2):
        assert_vectors(collect(core, asked(rows)), expected(path, rows))


def test_a_prompt_as_long_as_the_context_has_a_vector(checkpoint: Path) -> None:
    core = make_core(checkpoint, context_length=32)
    row = list(range(3, 35))
    assert_vectors(collect(core, asked([row])), expected(checkpoint, [row]))
    with pytest.raises(RequestError, match="context length is 32"):
        core.add(Submit("long", [*row, 9], 33, SamplingParams(), 0, KINDS[0]))


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.kind)
def test_a_vector_that_is_not_finite_is_an_error_and_leaves_nothing(checkpoint: Path, kind: Pooling) -> None:
    core = make_core(checkpoint)
    runner: Any = core._runner
    norm = runner.model.model.norm
    right, norm.weight = norm.weight, mx.full(norm.weight.shape, mx.nan)
    (output,) = collect(core, [Submit("r", [3, 4], 2, SamplingParams(), 0, kind)])["r"]
    assert output.finish is not None
    assert (output.finish.reason, output.finish.status) == ("error", 500)
    norm.weight = right
    assert_vectors(collect(core, asked([[3, 4]])), expected(checkpoint, [[3, 4]]))


def test_an_embedding_model_generates_nothing(checkpoint: Path) -> None:
    core = make_core(checkpoint, is_embedding=True)
    with pytest.raises(RequestError, match="generates none"):
        core.add(Submit("r", [3, 4], 2, GREEDY))
    assert_vectors(collect(core, asked([[3, 4]])), expected(checkpoint, [[3, 4]]))


def test_labels_outside_the_vocabulary_are_refused(checkpoint: Path) -> None:
    core = make_core(checkpoint)
    with pytest.raises(RequestError, match="label token ids must be between 0 and"):
        core.add(Submit("r", [3, 4], 2, SamplingParams(), 0, Pooling("labels", (10**6,))))


# --- checkpoints ---


def as_bare(path: Path, tied: bool) -> None:
    """Rewrites a checkpoint as AutoModel saves it: no head, names without ``model.``"""
    file = path / "model.safetensors"
    whole: Any = mx.load(str(file))
    weights = {k.removeprefix("model."): v for k, v in whole.items() if k != "lm_head.weight"}
    mx.save_safetensors(str(file), weights, metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": tied}))


@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_without_its_head_gives_the_same_vectors(tmp_path: Path, tied: bool) -> None:
    path = make_checkpoint(tmp_path / "model", "qwen3")
    rows = prompts(3)
    want = [kinds[:2] for kinds in expected(path, rows)]
    as_bare(path, tied)
    core = make_core(path)
    assert core.info.is_embedding is not tied
    assert_vectors(collect(core, asked(rows)), want)


SENTENCE = [{"type": f"sentence_transformers.models.{kind}", "path": kind} for kind in ("Transformer", "Pooling")]
NORMALIZE = [{"type": "sentence_transformers.models.Normalize", "path": "Normalize"}]


@pytest.mark.parametrize(
    ("modules", "pooling", "form"),
    [
        (
            SENTENCE,
            {"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False},
            VectorForm("last", False, True),
        ),
        (SENTENCE + NORMALIZE, {"pooling_mode_mean_tokens": True}, VectorForm("mean", True, True)),
        (SENTENCE + NORMALIZE, {"pooling_mode": "lasttoken"}, VectorForm("last", True, True)),
    ],
)
def test_sentence_transformers_files_say_how(
    tmp_path: Path, modules: list[Any], pooling: dict[str, Any], form: VectorForm
) -> None:
    (tmp_path / "Pooling").mkdir()
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 4} | pooling))
    assert read_vector_form(tmp_path, {}, "auto", False) == form
    assert read_vector_form(tmp_path, {}, "mean", False).pooling == "mean"


@pytest.mark.parametrize(
    ("modules", "pooling", "facts", "said"),
    [
        (SENTENCE, {"pooling_mode_max_tokens": True}, {}, "max_tokens"),
        ([*SENTENCE, {"type": "sentence_transformers.models.Dense", "path": "D"}], {}, {}, "Dense"),
        (SENTENCE, {}, {"use_bidirectional_attention": True}, "only causal models"),
        (SENTENCE, {}, {"is_causal": False}, "only causal models"),
    ],
)
def test_what_is_not_computed_is_refused(
    tmp_path: Path, modules: list[Any], pooling: dict[str, Any], facts: dict[str, Any], said: str
) -> None:
    (tmp_path / "Pooling").mkdir()
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "Pooling" / "config.json").write_text(json.dumps(pooling))
    with pytest.raises(ModelError, match=said):
        read_vector_form(tmp_path, facts, "auto", False)
