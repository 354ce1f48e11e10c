"""Windowed layers' own pool: what is held, what goes first, what is reused; the same tokens, in less memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pippin.attention import backends_to_try
from pippin.cache.layout import CacheLayout, LayerShape
from pippin.cache.windows import WindowPages, WindowTable, least_pages, span, streams
from pippin.config import EngineConfig
from pippin.core import EngineCore
from pippin.errors import ConfigError, ModelError
from pippin.memory import MemoryPlan, plan_memory
from pippin.planner import HEADROOM
from pippin.probe import Choice
from pippin.types import CacheMiss, Request
from tests.checkpoints import WINDOW, make_checkpoint
from tests.compiling import play_gpu, traces_of
from tests.cores import GREEDY, make_core, prompts, replace_params, run, submits
from tests.fake_device import Loop, endless
from tests.recording import AgainRecorder, play_recorder


def windows_of(loop: Loop) -> WindowPages:
    assert loop.windows is not None
    return loop.windows


def told(loop: Loop, tokens: list[int], count: int = 4) -> Request:
    """A request that runs alone, to its end."""
    request = loop.add(tokens, endless(count))
    loop.run()
    return request


# --- how many pages ---


@given(reach=st.integers(1, 50), page=st.integers(1, 9), position=st.integers(0, 500))
def test_a_window_never_touches_more_pages_than_its_span(reach: int, page: int, position: int) -> None:
    table = WindowTable.empty(reach, 100, 100, page)
    pages = {at // page for at in range(table.first(position), position + 1)}
    assert len(pages) <= table.span == span(reach, page)
    assert len(range(table.first(position), position + 1)) == min(reach, position + 1)


def test_tokens_without_slots_are_never_read_or_written() -> None:
    table = WindowTable.empty(4, 100, 10, 2)
    table.pages[3] = 5
    assert table.slots(np.array([6, 7], np.int32)).tolist() == [10, 11]
    with pytest.raises(AssertionError, match="without slots in windowed layers"):
        table.slots(np.array([7, 8], np.int32))


# --- what is held, and what goes first ---


def test_a_long_request_needs_no_more_than_its_window_and_a_chunk() -> None:
    loop = Loop(num_pages=1000, chunk=16, window=(8, 17))
    request = told(loop, [i % 13 for i in range(300)], 100)
    assert len(request.tokens) == 400
    assert windows_of(loop).num_pages == 25
    assert windows_of(loop).num_evicted == 399 - 25, "the last token is never computed"
    assert loop.scheduler.stats().retractions == 0


@pytest.mark.parametrize("page", [1, 4])
def test_the_next_turn_and_the_same_again_compute_what_is_new(page: int) -> None:
    loop = Loop(page=page, num_pages=200, chunk=16, window=(9, 60 // page))
    first = told(loop, [i % 7 for i in range(48)], 13)
    told(loop, [9] * 40)  # others go by
    again = told(loop, first.tokens[:48], 13)
    assert again.num_cached == 47 // page * page
    turn = told(loop, [*first.tokens, 1, 2, 3])
    assert (len(first.tokens), turn.num_cached) == (61, 60), "the answer's last token was never computed"
    assert turn.miss is None


def test_where_prompts_part_others_can_begin() -> None:
    """The first that parts from a prompt in its midst computes all; whoever parts there next finds it."""
    loop = Loop(num_pages=400, chunk=8, window=(6, 30))
    trunk = [i % 11 for i in range(80)]
    told(loop, [*trunk, *[1] * 60])
    second = told(loop, [*trunk, *[2] * 60])
    assert (second.num_cached, second.miss) == (0, CacheMiss("no_window", 80))
    told(loop, [3] * 100)
    third = told(loop, [*trunk, *[4] * 60])
    assert (third.num_cached, third.miss) == (80, CacheMiss("diverged", 80))


def test_while_there_is_room_what_lies_behind_is_of_use() -> None:
    loop = Loop(num_pages=400, chunk=8, window=(6, 300))
    trunk = [i % 11 for i in range(80)]
    told(loop, [*trunk, *[1] * 60])
    assert told(loop, [*trunk, *[2] * 60]).num_cached == 80
    assert windows_of(loop).num_evicted == 0


def test_what_was_left_behind_goes_before_ends_and_those_longest_unused_first() -> None:
    loop = Loop(num_pages=400, chunk=8, window=(5, 24))
    first = told(loop, [1] * 20)
    second = told(loop, [2] * 20)
    pages = windows_of(loop).table.pages
    kept = [[at for at, slot in enumerate(loop.radix.slots(r.tokens, 24)) if pages[slot]] for r in (first, second)]
    assert all(at in kept[0] for at in (*range(15, 23),)), "ends of the prompt and of the answer"
    assert 3 not in kept[0], "in between"
    loop.radix.release(loop.radix.match(first.tokens).pin)
    for i in range(3, 6):
        told(loop, [i] * 20)
    assert told(loop, [*first.tokens, 0]).num_cached < 20
    assert windows_of(loop).room == windows_of(loop).num_pages


def test_requests_that_arrive_together_compute_a_prefix_once_whose_window_has_gone() -> None:
    loop = Loop(num_pages=1000, chunk=64, max_running=8, window=(6, 80))
    trunk = [i % 11 for i in range(40)]
    told(loop, trunk)
    for i in range(4):
        told(loop, [i] * 60)
    assert loop.radix.peek(trunk) == 0
    assert loop.radix.known(trunk) == 40
    before = loop.scheduler.stats().prefill_tokens
    together = [loop.add([*trunk, i], endless(3)) for i in range(8)]
    loop.run()
    assert [r.num_cached for r in together] == [0, *[40] * 7]
    assert loop.scheduler.stats().prefill_tokens - before == 48


def test_a_request_that_runs_holds_the_prefix_that_another_lends() -> None:
    """Two requests stand on one window's slots, by pages of their own and the tree's: the last one frees them."""
    loop = Loop(num_pages=300, chunk=64, window=(6, 50))
    trunk = [i % 11 for i in range(40)]
    told(loop, trunk)
    for i in range(4):
        told(loop, [i] * 30)
    lender, borrower = loop.add([*trunk, 1], endless(3)), loop.add([*trunk, 2], endless(30))
    loop.run()
    assert (lender.num_cached, borrower.num_cached) == (0, 40)
    assert windows_of(loop).room == windows_of(loop).num_pages


def test_no_more_run_than_there_are_windows_for() -> None:
    loop = Loop(num_pages=1000, chunk=10, max_running=8, window=(20, 31))  # 51: two windows, and a chunk
    for length, answer, together in ((50, 20, 2), (3, 4, 6)):
        for i in range(6):
            loop.add([i] * length, endless(answer))
        most = 0
        while loop.scheduler.has_work:
            loop.step()
            most = max(most, loop.scheduler.stats().num_running)
        assert most == min(6, streams(51, 20, 1, 10, length + answer - 1)) == together
    assert loop.scheduler.stats().retractions == 0


def most_at_a_time(loop: Loop) -> int:
    """Runs all requests; how many ran together at the most, each of whom stayed until its end."""
    most = 0
    while loop.scheduler.has_work:
        loop.step()
        most = max(most, loop.scheduler.stats().num_running)
    assert loop.scheduler.stats().retractions == 0
    return most


def test_a_chunk_is_not_set_aside_that_nobody_computes() -> None:
    """gpt-oss' windows and chunks of 8192: 32 prompts fill one step, and then need no more than their windows."""
    pages = least_pages(128, 16, 8192, 8)
    loop = Loop(page=16, num_pages=1317, chunk=8192, max_running=32, window=(128, pages - span(128, 16)))
    for i in range(32):
        loop.add([i % 3, *[3 + i] * 255], endless(101))
    assert most_at_a_time(loop) == 32
    assert [len(batch.works) for batch in loop.batches] == [32] * 101


def test_a_long_prompt_moves_on_beside_short_ones_that_come_and_go() -> None:
    """It is cut to what windows leave, at least half a chunk, and newcomers take none of that."""
    loop = Loop(num_pages=4000, chunk=64, max_running=16, window=(8, 100), cache=False)
    for i in range(9):
        loop.add([i] * 20, endless(12))
    loop.step()
    long = loop.add([12] * 1000, endless(4))
    for i in range(60):
        loop.add([i] * 20, endless(12))
    begun = False
    while long.computed < 1000 and loop.scheduler.has_work:
        batch = loop.step()
        work = next((w for w in batch.works if w.request is long), None) if batch is not None else None
        assert not begun or (work is not None and work.end - work.start >= min(32, 1000 - work.start))
        begun = begun or work is not None
    assert most_at_a_time(loop) > 4
    assert long.finish is not None


def test_prompts_that_go_first_leave_others_the_windows_they_grow_to() -> None:
    """Six that come to 20 tokens, two windows of 40, and 10 for both prompts' chunks, which are of 16."""
    loop = Loop(num_pages=9000, chunk=16, max_running=8, window=(40, 6 * 20 + 2 * 40 + 10 - 40), cache=False)
    for i in range(6):
        loop.add([i], endless(20))
    loop.step()
    for i in range(2):
        loop.add([7 + i] * 600, priority=1)
    assert most_at_a_time(loop) == 8


@pytest.mark.parametrize("page", [1, 4])
def test_windows_that_have_grown_beyond_the_pool_leave_each_prompt_a_next_token(page: int) -> None:
    loop = Loop(page=page, num_pages=4000, chunk=16, max_running=16, window=(40, 60), cache=False)
    for i in range(12):
        loop.add([i], endless(60))
    loop.add([12] * 300)
    while loop.scheduler.has_work:
        loop.step()
        running, windows = loop.scheduler.runs.running, windows_of(loop)
        windows.advance(running)
        for request in running:
            claim = -(-(request.computed + 1) // page)
            assert request.computed < windows.ahead(request, claim, -100) <= request.computed + page
    assert loop.scheduler.stats().retractions > 0


@settings(max_examples=20)
@example(page=4, reach=16, chunk=200, more=60, length=60, drawn=30)
@example(page=1, reach=8, chunk=40, more=32, length=2, drawn=12)
@given(
    page=st.sampled_from([1, 4, 16]),
    reach=st.integers(2, 70),
    chunk=st.sampled_from([8, 40, 200]),
    more=st.integers(2, 60),
    length=st.integers(2, 150),
    drawn=st.integers(2, 40),
)
def test_as_many_run_as_there_are_windows_for(
    page: int, reach: int, chunk: int, more: int, length: int, drawn: int
) -> None:
    """As many as are said to, if they draw for long enough; no one makes room where none outgrows what he claimed."""
    loop = Loop(page=page, num_pages=3000, chunk=chunk, max_running=12, window=(reach, more), cache=False)
    for i in range(12):
        loop.add([i] * length, endless(drawn))
    windows = windows_of(loop)
    said = min(12, streams(windows.num_pages * page, reach, page, chunk, length + drawn - 1))
    most = 0
    while loop.scheduler.has_work:
        loop.step()
        most = max(most, loop.scheduler.stats().num_running)
    if drawn > 12 * (1 + 2 * length // chunk):
        assert most >= said
    if drawn <= HEADROOM:
        assert loop.scheduler.stats().retractions == 0


# --- the memory plan ---

FULL, PART = LayerShape(8, 64, 64, mx.bfloat16), LayerShape(8, 64, 64, mx.bfloat16, window=128)


def plan(layers: list[LayerShape], context: int, device: int = 10**11, gpu: bool = True, **options: Any) -> MemoryPlan:
    config = EngineConfig(**options).with_pages(16)
    choice = Choice(backends_to_try("rows")[0], "", CacheLayout.of(layers))
    parts = {"weight_bytes": 10**9, "activation_bytes": 10**8, "context_length": context, "max_running": 32}
    return plan_memory(config, choice, **parts, gpu=gpu, device=device)


def test_gpt_oss_at_32k_keeps_less_than_60_percent_of_its_k_and_v() -> None:
    layers = [PART, FULL] * 12  # gpt-oss-20b: every second layer sees 128 tokens
    windowed, full = (
        plan(layers, 32768, max_total_tokens=32768, disable_hybrid_swa_memory=off) for off in (False, True)
    )
    assert (full.reach, full.window_slots) == (0, 0)
    assert (windowed.reach, windowed.slots) == (128, full.slots)
    assert full.pool_bytes == (32768 + 16) * 24 * 2048
    assert windowed.pool_bytes == ((32768 + 16) * 12 + (windowed.window_slots + 16) * 12) * 2048
    assert windowed.pool_bytes <= 0.6 * full.pool_bytes
    assert windowed.window_slots // 16 >= least_pages(128, 16, 2048, 8), "eight requests, and a long prompt's chunk"


@given(
    windows=st.lists(st.sampled_from([None, 8, 100, 500, 10**6]), min_size=1, max_size=4),
    device=st.integers(10**9, 10**11),
    context=st.sampled_from([64, 400, 10**5]),
    ratio=st.none() | st.floats(0.001, 1.0),
    tokens=st.none() | st.integers(16, 10**5),
)
def test_both_pools_stay_within_the_budget(
    windows: list[int | None], device: int, context: int, ratio: float | None, tokens: int | None
) -> None:
    layers = [LayerShape(1, 16, 16, mx.float16, window=w) for w in windows]
    options: dict[str, Any] = {"max_total_tokens": tokens, "chunked_prefill_size": 64, "swa_full_tokens_ratio": ratio}
    try:
        found = plan(layers, context, device, **options)
    except (ConfigError, ModelError):
        return
    reach = max((w for w in windows if w is not None and w < context), default=0)
    assert found.total_bytes <= found.budget_bytes
    part = sum(w is not None and w <= found.reach for w in windows)
    own = found.window_slots or found.slots
    assert found.pool_bytes == 64 * ((found.slots + 16) * (len(layers) - part) + (own + 16) * part)
    assert found.window_slots < found.slots
    assert found.window_slots % 16 == 0
    if found.window_slots:
        assert found.reach == reach
        assert found.window_slots // 16 > span(reach, 16), "someone can always move on"
    else:
        assert not found.reach
    if ratio is not None and found.window_slots:
        assert found.window_slots <= max(ratio * found.slots, least_pages(reach, 16, 1) * 16)


def test_memory_that_is_left_goes_to_the_windows_of_all_that_may_run() -> None:
    layers = [PART, FULL] * 12
    most = least_pages(128, 16, 1024, 32)
    found = plan(layers, 32768, max_total_tokens=20000, max_running_requests=32)
    assert found.window_slots == most * 16 > 20000 / 6
    assert streams(found.window_slots, 128, 16, 2048, 32768) == 32
    assert plan(layers, 32768, max_total_tokens=8000).window_slots == 8000 // 32 * 16, "half as many as others"
    base = plan(layers, 32768, max_total_tokens=20000, swa_full_tokens_ratio=1 / 6)
    assert base.window_slots == 20000 // 6 // 16 * 16, "as asked for"
    more, taken = found.pool_bytes - base.pool_bytes, found.total_bytes - found.pool_bytes + base.pool_bytes
    for spare, eased in ((2 * more + 100, True), (2 * more - 100, False)):
        tight = plan(layers, 32768, int((taken + spare) / 0.8), max_total_tokens=20000, max_running_requests=32)
        assert tight.slots == 20000
        assert tight.window_slots == (found if eased else base).window_slots
        assert tight.total_bytes <= tight.budget_bytes


def test_on_a_cpu_that_nobody_gave_a_size_for_windows_get_no_more() -> None:
    layers = [LayerShape(8, 64, 64, mx.bfloat16, window=512), FULL]
    by_default, asked = (plan(layers, 32768, gpu=False, max_total_tokens=n) for n in (None, 32768))
    assert (by_default.slots, by_default.window_slots) == (32768, 32768 // 6 // 16 * 16)
    assert (asked.slots, asked.window_slots) == (32768, 16384)


def test_only_windows_that_are_shorter_than_the_context_count() -> None:
    assert CacheLayout.of([FULL, PART]).reach(128) is None
    assert CacheLayout.of([FULL, PART]).reach(129) == 128
    assert CacheLayout.of([FULL, FULL]).reach(10**6) is None
    assert plan([FULL, PART], 128).reach == 0
    assert plan([FULL], 32768).reach == 0
    assert plan([FULL, PART], 32768, kv_disk="/nowhere").reach == 128, "windowed layers have files of their own"
    assert plan([PART], 32768, 4 * 10**9).window_slots > 0, "windowed layers alone"


# --- real models ---

SMALL = {"chunked_prefill_size": 16, "swa_full_tokens_ratio": 0.03}
OPTIONS: list[dict[str, Any]] = [
    {"chunked_prefill_size": 32},
    {**SMALL},
    {**SMALL, "page_size": 4, "disable_overlap_schedule": True},
    {"chunked_prefill_size": 7, "max_total_tokens": 150, "swa_full_tokens_ratio": 0.3},
    {**SMALL, "attention_backend": "padded"},
    {**SMALL, "kv_cache_dtype": "int8"},
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Windows, sinks and experts."""
    return make_checkpoint(tmp_path_factory.mktemp("windows") / "gpt_oss", "gpt_oss")


def tokens_twice(core: EngineCore, rows: list[list[int]]) -> list[list[int]]:
    """Of two rounds of the same requests."""
    params = replace_params(GREEDY, max_new_tokens=30)
    return [*run(core, submits(rows, params)).values(), *run(core, submits(rows, params)).values()]


def compare(path: Path, options: dict[str, Any]) -> EngineCore:
    """Tokens with a pool of their own are those with one for all; the engine of the first."""
    rows = prompts(5, 80)
    options = {"skip_server_warmup": True, **options}
    kinds = {name: options[name] for name in ("kv_cache_dtype", "skip_server_warmup") if name in options}
    expected = tokens_twice(make_core(path, disable_hybrid_swa_memory=True, **kinds), rows)
    core = make_core(path, kv_canary="raise", **options)
    assert core.info.window_slots < core.info.max_total_tokens
    assert core.info.window == WINDOW
    assert tokens_twice(core, rows) == expected
    core.flush()
    stats = core.stats
    assert stats.slots_free == stats.slots_total
    assert stats.window_slots_free == stats.window_slots_total == core.info.window_slots
    return core


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ",".join(f"{k}={v}" for k, v in o.items()))
def test_tokens_are_the_same_as_with_one_pool_for_all_layers(checkpoint: Path, options: dict[str, Any]) -> None:
    core = compare(checkpoint, options)
    if options == OPTIONS[0]:
        assert core.stats.cached_tokens > 0
    if "max_total_tokens" in options:
        assert core.stats.retractions > 0


@pytest.mark.parametrize("options", [{"page_size": 4}, {"page_size": 8, "disable_graph": True}], ids=str)
def test_tokens_are_the_same_by_page_and_in_graphs(
    checkpoint: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    play_gpu(monkeypatch)
    compare(checkpoint, {**SMALL, **options})


@pytest.mark.parametrize(("family", "backend"), [("gemma2", "padded_grouped"), ("gemma3_text", "padded")])
def test_tokens_are_the_same_in_graphs_of_models_that_mask(
    family: str, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One mask for layers of both kinds, so what windowed ones read is as wide."""
    play_gpu(monkeypatch)
    core = compare(make_checkpoint(tmp_path / family, family), {**SMALL, "page_size": 4, "attention_backend": backend})
    assert traces_of(core._runner) > 0


@pytest.mark.parametrize(("family", "backend", "page"), [("gpt_oss", "rows", 4), ("gemma3_text", "padded", 4)])
def test_tokens_are_the_same_in_recorded_steps(
    family: str, backend: str, page: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps are recorded as they come, while all pages of windowed layers are lent to requests."""
    recorder = AgainRecorder()
    play_gpu(monkeypatch)
    play_recorder(monkeypatch, recorder)
    compare(make_checkpoint(tmp_path / family, family), {**SMALL, "page_size": page, "attention_backend": backend})
    assert recorder.launches > 100
    assert all(not graph.closed for graph in recorder.graphs)


@pytest.mark.parametrize("family", ["gemma2", "mistral", "recurrent_gemma"])
def test_tokens_are_the_same_where_models_mask_or_keep_states(family: str, tmp_path: Path) -> None:
    compare(make_checkpoint(tmp_path / family, family), {**SMALL})


def test_a_model_without_windows_has_one_pool(tmp_path: Path) -> None:
    core = make_core(make_checkpoint(tmp_path / "qwen3", "qwen3", head_dim=16, num_hidden_layers=2))
    assert (core.info.window, core.info.window_slots, core.stats.window_slots_total) == (0, 0, 0)
