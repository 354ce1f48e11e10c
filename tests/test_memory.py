"""The memory budget: parts add up, no plan exceeds it, and what can't be had is refused by the option's name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pippin import memory
from pippin.attention import backends_to_try
from pippin.cache.layout import CacheLayout, LayerShape, Leaf, StateShape
from pippin.cache.pool import KVPool
from pippin.config import EngineConfig
from pippin.errors import ConfigError, ModelError
from pippin.memory import Limits, MemoryPlan, device_bytes, limit_rows, limits, plan_memory, use_device
from pippin.probe import Choice

SHAPE = LayerShape(2, 16, 24, mx.float16)  # 160 bytes a slot
GB = 10**9


def choice(layers: int = 2) -> Choice:
    """Two layers that store and one that doesn't: 320 bytes a slot."""
    return Choice(backends_to_try("rows")[0], "", CacheLayout.of((*[SHAPE] * layers, None)))


def plan(
    *,
    weights: int = GB,
    activations: int = GB,
    context: int = 4096,
    running: int = 16,
    layers: int = 2,
    **options: Any,
) -> MemoryPlan:
    return plan_memory(
        EngineConfig(**options).with_pages(1),
        choice(layers),
        weight_bytes=weights,
        activation_bytes=activations,
        context_length=context,
        max_running=running,
    )


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets what the device is and has."""

    def use(size: int, gpu: bool = False) -> None:
        monkeypatch.setattr(memory, "device_bytes", lambda: size)
        monkeypatch.setattr(memory, "on_gpu", lambda: gpu)

    use(16 * GB)
    return use


@given(
    size=st.integers(0, 2**36),
    weights=st.integers(0, 2**35),
    activations=st.integers(0, 2**34),
    fraction=st.none() | st.floats(0.01, 0.99),
    page=st.integers(1, 300),
    tokens=st.none() | st.integers(16, 10**6),
    context=st.integers(2, 10**6),
    running=st.integers(1, 300),
    gpu=st.booleans(),
)
def test_a_plan_stays_within_the_budget_or_says_which_option_would_help(
    size: int,
    weights: int,
    activations: int,
    fraction: float | None,
    page: int,
    tokens: int | None,
    context: int,
    running: int,
    gpu: bool,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "device_bytes", lambda: size)
        patch.setattr(memory, "on_gpu", lambda: gpu)
        try:
            found = plan(
                weights=weights,
                activations=activations,
                context=context,
                running=running,
                mem_fraction_static=fraction,
                page_size=page,
                max_total_tokens=tokens,
            )
        except (ConfigError, ModelError) as error:
            refusal = str(error)
        else:
            refusal = ""
    budget = int(size * (fraction or (0.8 if gpu else 0.5)))
    if refusal:
        if tokens is not None and tokens < page:
            assert "--max-total-tokens: " in refusal
        else:
            assert "--mem-fraction-static" in refusal
            assert budget - weights - activations < ((tokens or 16) + 2 * page) * 320
        return
    assert found.slots >= 16 if tokens is None else found.slots > tokens - page
    assert found.slots % page == 0
    assert found.pool_bytes == (found.slots + page) * 320
    assert found.budget_bytes == budget
    assert weights + activations + found.pool_bytes <= found.budget_bytes
    if tokens is None:
        assert found.slots < max(16, running * context) + page, "no more than all requests together can use"
    else:
        assert found.slots <= tokens


def test_the_plan_is_what_the_pool_takes(device: Any) -> None:
    device(10 * GB)
    found = plan(max_total_tokens=1000, page_size=16)
    pool = KVPool(choice().shapes, found.slots + 16, 16)
    assert pool.nbytes == found.pool_bytes == sum(a.nbytes for a in pool.arrays)


@pytest.mark.parametrize(
    ("gpu", "options", "slots"),
    [
        (True, {}, (12_800_000_000 - 2 * GB) // 320 - 1),  # 0.8 of it
        (True, {"mem_fraction_static": 0.5}, 6 * GB // 320 - 1),
        (False, {}, 32768),
        (False, {"context": 131_072}, 32768),  # zeroed memory: a longer context is asked for by flag
        (False, {"mem_fraction_static": 0.5}, 6 * GB // 320 - 1),
        (False, {"mem_fraction_static": 0.5, "context": 100, "running": 4}, 400),
        (False, {"max_total_tokens": 5_000_000}, 5_000_000),
    ],
)
def test_how_many_slots_there_are_by_default(device: Any, gpu: bool, options: dict[str, Any], slots: int) -> None:
    device(16 * GB, gpu)
    assert plan(**{"context": 10**7 if gpu or "mem_fraction_static" in options else 4096, **options}).slots == slots


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        (
            {"weights": 9 * GB},
            ModelError,
            r"weights \(9\.00 GB\) and activations \(1\.00 GB\) leave no room .* 8\.00 GB; use --quantization, "
            r"a smaller --chunked-prefill-size or --context-length, or a larger --mem-fraction-static",
        ),
        (
            {"max_total_tokens": 30_000_000},
            ConfigError,
            r"--max-total-tokens: 30000000 slots take 9\.60 GB.* room for \d+ .* 8\.00 GB",
        ),
        (
            {"max_total_tokens": 100, "page_size": 128},
            ConfigError,
            r"--max-total-tokens: 100 slots are less than a page, which has 128",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_the_sizes(
    device: Any, options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        plan(**options)


def test_what_is_copied_for_the_disk_is_taken_from_the_slots(device: Any, tmp_path: Path) -> None:
    device(16 * GB, gpu=True)
    without, found = plan(context=10**7), plan(context=10**7, kv_disk=str(tmp_path))
    assert found.copy_bytes > 256 << 20, "what may wait for the writer"
    assert found.total_bytes <= found.budget_bytes
    assert without.slots - found.slots == -(-found.copy_bytes // 320)
    device(4 * GB, gpu=True)
    with pytest.raises(ModelError, match=r"and copies for --kv-disk \(0\.\d+ GB\), leave no room"):
        plan(weights=2 * GB, kv_disk=str(tmp_path))


def test_a_short_context_for_one_request_is_still_served(device: Any) -> None:
    """The most that requests can use may be less than the sixteen slots that a pool has at least."""
    assert plan(context=8, running=1).slots == 16
    assert plan(context=100, running=1, page_size=128).slots == 128


@pytest.mark.parametrize(("gpu", "chunk", "running"), [(True, 2048, 256), (False, 512, 32)])
def test_the_sizes_of_a_step_depend_on_the_device_unless_they_are_given(
    device: Any, gpu: bool, chunk: int, running: int
) -> None:
    device(GB, gpu)
    assert (limits(EngineConfig()).chunk, limits(EngineConfig()).max_running) == (chunk, running)
    given = limits(EngineConfig(chunked_prefill_size=7, max_running_requests=3))
    assert (given.chunk, given.max_running) == (7, 3)


@pytest.mark.parametrize(
    ("info", "gpu", "expected"),
    [
        ({"max_recommended_working_set_size": 5, "memory_size": 9}, True, 5),  # Metal
        ({"total_memory": 7}, True, 7),  # CUDA
        ({"memory_size": 9}, True, 9),
    ],
)
def test_what_a_gpu_may_use_is_what_it_says(
    monkeypatch: pytest.MonkeyPatch, info: dict[str, int], gpu: bool, expected: int
) -> None:
    monkeypatch.setattr(memory, "on_gpu", lambda: gpu)
    monkeypatch.setattr(mx, "device_info", lambda: info)
    assert device_bytes() == expected


def test_a_cpu_has_the_machines_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "on_gpu", lambda: False)
    assert 2**28 < device_bytes() < 2**45


@pytest.mark.parametrize(("said", "most"), [("536870912\n", 2**29), ("max\n", None), (None, None)])
def test_a_container_has_what_it_is_held_to(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: str | None, most: int | None
) -> None:
    monkeypatch.setattr(memory, "on_gpu", lambda: False)
    monkeypatch.setattr(memory, "_CGROUP_FILES", ())
    machine = device_bytes()
    if said is not None:
        (tmp_path / "memory.max").write_text(said)
    monkeypatch.setattr(memory, "_CGROUP_FILES", (tmp_path / "memory.max",))
    assert device_bytes() == (most or machine)


def test_a_gpu_that_is_not_there_is_refused_by_the_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "on_gpu", lambda: False)
    with pytest.raises(ConfigError, match=r"--device: .*no GPU here"):
        use_device("gpu")
    before = mx.default_device()
    use_device("auto")
    assert mx.default_device() == before


# --- recurrent state ---

STATE = StateShape((((1000, 1000), mx.float32),))  # 4 MB


def recurrent(layers: int = 2) -> Choice:
    """A hybrid of ``layers`` attention layers, or of none, whose state takes 4 MB a request."""
    shapes = (SHAPE,) * layers
    tree = (Leaf(0, True), *map(Leaf, range(layers)))
    return Choice(backends_to_try("solo")[0], "", CacheLayout(tree, shapes, (STATE,)))


def hybrid_plan(running: int, layers: int = 2, **options: Any) -> MemoryPlan:
    return plan_memory(
        EngineConfig(**options).with_pages(1),
        recurrent(layers),
        weight_bytes=GB,
        activation_bytes=GB,
        context_length=4096,
        max_running=running,
    )


@pytest.mark.parametrize("gpu", [True, False])
@pytest.mark.parametrize("layers", [0, 2])
def test_states_and_snapshots_are_in_the_plan(device: Any, gpu: bool, layers: int) -> None:
    device(16 * GB, gpu)
    found = hybrid_plan(16, layers)
    assert found.state_bytes == 16 * 4_000_000
    assert found.snapshot_bytes == found.snapshots * 4_000_000 > 0
    parts = found.weight_bytes + found.activation_bytes + found.pool_bytes + found.state_bytes + found.snapshot_bytes
    assert parts <= found.budget_bytes
    assert found.slots >= 16 * 4096 or not gpu
    assert (found.pool_bytes == 0) == (layers == 0)


def test_snapshots_are_as_many_as_asked_for_or_refused_by_the_flag(device: Any) -> None:
    assert hybrid_plan(4, max_mamba_cache_size=7).snapshots == 7
    assert hybrid_plan(4, max_mamba_cache_size=0).snapshots == 0
    assert hybrid_plan(4, disable_radix_cache=True).snapshots == 0
    with pytest.raises(ConfigError, match=r"--max-mamba-cache-size: 9999 snapshots take 40.00 GB"):
        hybrid_plan(4, max_mamba_cache_size=9999)
    assert plan().snapshots == plan().state_bytes == 0


def test_rows_are_as_many_as_states_have_room(device: Any) -> None:
    device(2 * GB, gpu=True)
    sizes = Limits(chunk=512, max_running=256)
    assert limit_rows(EngineConfig(), choice(), sizes, GB) == sizes
    fewer = limit_rows(EngineConfig(), recurrent(), sizes, GB)
    assert 1 <= fewer.max_running < 256
    assert fewer.max_running * 3 * 4_000_000 <= 0.6 * GB / 3
    assert limit_rows(EngineConfig(max_running_requests=3), recurrent(), Limits(512, 3), GB).max_running == 3
    with pytest.raises(ConfigError, match="--max-running-requests: the recurrent states of 256 requests"):
        limit_rows(EngineConfig(max_running_requests=256), recurrent(), sizes, GB)
    with pytest.raises(ModelError, match="no room for a request's recurrent state"):
        limit_rows(EngineConfig(), recurrent(), sizes, int(1.6 * GB))
