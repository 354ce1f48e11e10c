"""--kv-cache-dtype: the same tokens however a prompt is cut, cached or retracted; near full slots; less memory."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
import pytest

from pippin import kernels
from pippin.attention import backends_to_try
from pippin.cache.layout import CacheLayout, LayerShape
from pippin.cache.pool import KVPool
from pippin.config import EngineConfig
from pippin.errors import ConfigError
from pippin.kernels import PACKINGS, Packing, checks
from pippin.kernels.packing import PackedPool, storage
from pippin.loading import load_core
from pippin.memory import plan_memory
from pippin.probe import Choice, choose_attention
from pippin.runner import MlxModelRunner
from pippin.types import Batch, Request, SamplingParams, Work
from tests.checkpoints import build_model, family_config, make_checkpoint, random_weights
from tests.cores import GREEDY, make_core, prompts, replace_params, run, submits
from tests.test_core import as_on_a_gpu
from tests.test_kernels_dispatch import Gpu, gpu, needs_compiler

__all__ = ["as_on_a_gpu", "gpu"]

VOCAB = 288
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 16},
    "gemma3_text": {"sliding_window": 6, "sliding_window_pattern": 2},
    "gpt_oss": {"sliding_window": 6, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma2": {},
    "qwen3_next": {},
}
"""Backend rows; windows; windows and sinks; masks of groups; states beside K and V."""

# What layers of random weights make of half a step in each number: gpt_oss' experts, which are chosen, most of all.
NEAR = {"int8": 0.06, "fp8": 0.3, "int4": 0.8}


def tiny(family: str) -> nn.Module:
    model = build_model(family_config(family, vocab_size=VOCAB, **FAMILIES[family]))
    model.load_weights(list(random_weights(model, 0).items()))
    mx.eval(model.parameters())
    return model


@pytest.fixture(scope="module")
def choices() -> dict[str, tuple[nn.Module, Choice]]:
    models = {family: tiny(family) for family in FAMILIES}
    return {family: (model, choose_attention(model, "mlx", VOCAB)) for family, model in models.items()}


def logits(model: nn.Module, choice: Choice, tokens: Sequence[int], ends: Sequence[int]) -> npt.NDArray[np.float32]:
    """After the last of ``tokens``, which are computed in chunks that end at ``ends``."""
    runner = MlxModelRunner(model, choice.backend, choice.pool(100), max_running=2, vocab_size=VOCAB)
    request = Request("r", list(tokens), len(tokens), SamplingParams(), row=1)
    request.slots = array("i", np.random.default_rng(0).permutation(np.arange(1, 100))[: len(tokens)].tolist())
    starts = [0, *ends[:-1]]
    found = [runner.logits(Batch((Work(request, s, e, True),))) for s, e in zip(starts, ends, strict=True)]
    return np.asarray(found[-1][0])


def distance(mine: npt.NDArray[np.float32], theirs: npt.NDArray[np.float32]) -> float:
    """Root mean square of the difference, as a share of that of the logits."""
    return float(np.sqrt(np.mean((mine - theirs) ** 2) / np.mean(theirs**2)))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("packing", PACKINGS)
def test_logits_do_not_depend_on_chunks_and_are_near_those_of_full_slots(
    choices: dict[str, tuple[nn.Module, Choice]], family: str, packing: Packing
) -> None:
    model, choice = choices[family]
    quantized = choice.with_kv_cache_dtype(packing)
    tokens = np.random.default_rng(1).integers(0, VOCAB, 23).tolist()
    full, whole = (logits(model, c, tokens, [23]) for c in (choice, quantized))
    assert 0 < distance(whole, full) <= NEAR[packing]
    for ends in ([9, 23], [7, 8, 9, 22, 23]):
        # Rounding may put a number on the other side of a half step: logits then move a little.
        assert distance(logits(model, quantized, tokens, ends), whole) <= 1e-3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("kv") / "qwen3", "qwen3", head_dim=16, num_hidden_layers=2)


@pytest.mark.parametrize("packing", PACKINGS)
def test_tokens_are_the_same_cached_chunked_and_retracted(checkpoint: Path, packing: str) -> None:
    rows = prompts(6)
    expected = [run(make_core(checkpoint, kv_cache_dtype=packing), submits([row]))["r0"] for row in rows]
    core = make_core(checkpoint, kv_cache_dtype=packing, chunked_prefill_size=16)
    for _ in range(2):
        assert list(run(core, submits(rows)).values()) == expected
    assert core.stats.cached_tokens > 0
    small = make_core(checkpoint, kv_cache_dtype=packing, max_total_tokens=104, chunked_prefill_size=9)
    found = run(small, submits(rows, replace_params(GREEDY, max_new_tokens=40)))
    assert [tokens[:12] for tokens in found.values()] == expected
    assert small.stats.retractions > 0


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("options", [{}, {"page_size": 8, "disable_graph": True}], ids=str)
def test_tokens_are_the_same_by_page_and_in_graphs(checkpoint: Path, options: dict[str, Any]) -> None:
    rows = prompts(6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pippin.kernels.writes_in_place", lambda *_: False)
        expected = run(make_core(checkpoint, kv_cache_dtype="int8"), submits(rows))
    core = make_core(checkpoint, kv_cache_dtype="int8", chunked_prefill_size=16, **options)
    for _ in range(2):
        assert run(core, submits(rows)) == expected
    assert core.stats.cached_tokens > 0


@needs_compiler
@pytest.mark.parametrize("packing", PACKINGS)
def test_kernels_of_quantized_slots_run_where_there_is_a_gpu(gpu: Gpu, packing: Packing) -> None:
    assert all(kernels.verify(mx.float32, packing).values())
    gpu.launched.clear()
    s, plain = checks.sample(mx.float32, packing), checks.sample(mx.float32, packing)
    assert kernels.writes_in_place(s.k_pool, s.v_pool)
    form = kernels.Form(4, 0.2, window=70)
    got = kernels.paged_decode(s.q, s.k_pool, s.v_pool, s.table, s.lengths, form, new=(s.k, s.v))
    assert gpu.launched == ["kv_write_packed", "paged_decode_packed"]
    slots = kernels.reference.newest_slots(plain.table, plain.lengths, 4)
    kernels.reference.kv_write(plain.k_pool, plain.v_pool, plain.k, plain.v, slots)
    want = kernels.reference.paged_decode(plain.q, plain.k_pool, plain.v_pool, plain.table, plain.lengths, form)
    assert mx.allclose(got, want, atol=1e-4)


@needs_compiler
def test_a_kernel_that_is_wrong_for_quantized_slots_is_replaced_for_those_alone(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "_wrong", ("kv_gather_packed",))
    s, full = checks.sample(mx.float32, "int8"), checks.sample(mx.float32)
    assert not kernels.writes_in_place(s.k_pool, s.v_pool)
    assert kernels.writes_in_place(full.k_pool, full.v_pool)
    right = kernels.verify(mx.float32, "int8")
    assert [name for name, ok in right.items() if not ok] == ["kv_gather"]


@needs_compiler
def test_each_kind_of_slot_has_a_verdict_of_its_own(gpu: Gpu, tmp_path: Path) -> None:
    for packing in (None, *PACKINGS):
        kernels.verify(mx.float32, packing)
    files = {path.name.rpartition("-")[0] for path in tmp_path.rglob("kernels-*.json")}
    assert files == {"kernels-float32", *(f"kernels-float32-{packing}" for packing in PACKINGS)}


@needs_compiler
@pytest.mark.parametrize("family", ["qwen3", "gpt_oss", "gemma2"])
def test_steps_over_kernels_give_the_logits_of_plain_mlx(
    gpu: Gpu, choices: dict[str, tuple[nn.Module, Choice]], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, choice = choices[family]
    choice = choice.with_kv_cache_dtype("int8")
    tokens = np.random.default_rng(2).integers(0, VOCAB, 20).tolist()
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "backend", lambda: None)
        want = logits(model, choice, tokens, [17, 18, 19, 20])
    got = logits(model, choice, tokens, [17, 18, 19, 20])
    assert {"kv_write_packed", "kv_gather_packed"} <= set(gpu.launched)
    assert np.abs(got - want).max() <= 0.02 * np.abs(want).max()


# --- memory and refusals ---


SHAPE = LayerShape(8, 128, 128, mx.bfloat16)


@pytest.mark.parametrize(("packing", "share"), [("int8", 0.516), ("fp8", 0.516), ("int4", 0.3125)])
def test_slots_take_their_share_and_the_plan_counts_it(packing: Packing, share: float) -> None:
    full, shape = SHAPE.bytes_per_slot, SHAPE.quantized(packing)
    assert shape.bytes_per_slot == pytest.approx(share * full, rel=1e-3)
    assert shape.bytes_in_full == full
    pool = KVPool([shape, None], 33, 16)
    assert pool.nbytes == sum(a.nbytes for a in pool.arrays) == 33 * shape.bytes_per_slot
    plans = []
    for layout in (CacheLayout.of([SHAPE]), CacheLayout.of([shape])):
        config = EngineConfig(mem_fraction_static=0.5).with_pages(16)
        choice = Choice(backends_to_try("rows")[0], "", layout)
        sizes = {"weight_bytes": 0, "activation_bytes": 0, "context_length": 10**6, "max_running": 256}
        plans.append(plan_memory(config, choice, **sizes, gpu=True, device=10**9))
    assert plans[1].slots / plans[0].slots == pytest.approx(1 / share, rel=1e-2)


def test_what_can_not_be_quantized_stays_as_it_is() -> None:
    shapes = [LayerShape(1, 20, 16, mx.float32), LayerShape(1, 64, 0, mx.float32), LayerShape(1, 8, 8, mx.int32)]
    layout = CacheLayout.of([SHAPE, *shapes, None]).quantized("int4")
    assert [s and s.packing for s in layout.shapes] == ["int4", None, None, None, None]
    keys, values = KVPool(layout.shapes, 4).layer(0)
    assert isinstance(keys, PackedPool)
    assert storage(values).dtype == mx.uint32
    assert isinstance(KVPool(layout.shapes, 4).layer(1)[0], mx.array)


def test_nothing_to_quantize_is_refused_by_the_flags_name() -> None:
    choice = Choice(backends_to_try("rows")[0], "", CacheLayout.of([LayerShape(1, 20, 16, mx.float32)]))
    with pytest.raises(ConfigError, match="--kv-cache-dtype"):
        choice.with_kv_cache_dtype("int8")
    assert choice.with_kv_cache_dtype("auto") is choice


def test_values_and_devices_that_do_not_go_are_refused_by_the_flags_name() -> None:
    with pytest.raises(ConfigError, match="--kv-cache-dtype"):
        EngineConfig(kv_cache_dtype="int2")
    with pytest.raises(ConfigError, match=r"--kv-cache-dtype|--device"):
        load_core(EngineConfig(device="torch:cpu", kv_cache_dtype="int8"))


def test_sglangs_spelling_is_the_same() -> None:
    choice = Choice(backends_to_try("rows")[0], "", CacheLayout.of([SHAPE]))
    assert choice.with_kv_cache_dtype("fp8_e4m3") == choice.with_kv_cache_dtype("fp8")
