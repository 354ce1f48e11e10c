"""Prefixes on disk where layers see a window: files of their own for these, as far as there is something to keep."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pippin.cache.disk import BLOCK, block_keys
from pippin.cache.disk_windows import WindowBlocks, window_key
from pippin.cache.windows import WindowPages, WindowTable
from pippin.core import EngineCore
from pippin.kvdisk import DiskTier
from tests.checkpoints import make_checkpoint
from tests.compiling import play_gpu
from tests.cores import replace_params
from tests.test_kvdisk import GREEDY, SOAK, Traffic, answer, files_of, make, prompt

WINDOW = 100
"""Longer than a block."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model(tmp_path_factory.mktemp("model"), "gpt_oss")


def model(path: Path, family: str, window: int = WINDOW) -> Path:
    return make_checkpoint(path, family, sliding_window=window, max_position_embeddings=1024)


@pytest.fixture(scope="module")
def cold(checkpoint: Path) -> EngineCore:
    return make(checkpoint, None, disable_radix_cache=True, disable_hybrid_swa_memory=True)


def windowed_files(core: EngineCore, tokens: Sequence[int]) -> list[int]:
    """Which blocks of a prompt have files of windowed layers."""
    assert core._disk is not None
    keys = block_keys(core._disk._root, tokens, len(tokens) // BLOCK)
    return [i for i, key in enumerate(keys) if core._disk._files.path(window_key(key)).exists()]


@pytest.mark.parametrize(
    ("family", "window", "options"),
    [
        ("gpt_oss", WINDOW, {}),
        ("gpt_oss", 8, {"page_size": 16, "chunked_prefill_size": 48}),
        ("gemma3_text", WINDOW, {"dtype": "bfloat16", "page_size": 64, "swa_full_tokens_ratio": 0.5}),
        ("mistral", WINDOW, {}),  # no other layers
        ("gemma2", WINDOW, {"swa_full_tokens_ratio": 0.5}),  # padded
    ],
    ids=str,
)
def test_a_prefix_outlives_the_server(family: str, window: int, options: dict[str, Any], tmp_path: Path) -> None:
    path, tokens = model(tmp_path / "model", family, window), prompt(1, 4 * BLOCK + 10)
    expected = answer(make(path, None, disable_hybrid_swa_memory=True, **options), tokens).tokens
    core = make(path, tmp_path / "kv", **options)
    assert 0 < core.info.window_slots < core.info.max_total_tokens
    assert answer(core, tokens).tokens == expected
    core.close()
    core = make(path, tmp_path / "kv", **options)
    again = answer(core, tokens)
    assert (again.tokens, again.num_cached) == (expected, 4 * BLOCK)
    assert (core.stats.kv_disk_hit_tokens, core.stats.prefill_tokens) == (4 * BLOCK, 10)
    core.close()


@pytest.mark.parametrize("less", [1, 2, 3])
def test_a_trial_restores_what_has_windows_or_all(
    checkpoint: Path, cold: EngineCore, tmp_path: Path, less: int
) -> None:
    tokens = prompt(1, 9 * BLOCK + 20)
    for ratio in (0.2, 1.0):  # windows of the last blocks, or of all
        core = make(checkpoint, tmp_path / str(ratio), swa_full_tokens_ratio=ratio, chunked_prefill_size=32)
        answer(core, tokens)
        core.close()
        core = make(checkpoint, tmp_path / str(ratio), swa_full_tokens_ratio=ratio, chunked_prefill_size=32)
        assert core._disk is not None
        core._disk.choice.end = lambda begin, end: end - less * BLOCK  # type: ignore[method-assign]
        found = answer(core, tokens)
        assert found.tokens == answer(cold, tokens).tokens
        assert found.num_cached in ((9 - less) * BLOCK, 9 * BLOCK)
        assert found.num_cached < 9 * BLOCK or ratio < 1
        core.close()


def test_kernels_by_page_read_and_write_windows_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, tokens = model(tmp_path / "model", "gpt_oss"), prompt(1, 2 * BLOCK + 10)
    expected = answer(make(path, None), tokens).tokens
    play_gpu(monkeypatch)
    for cached in (0, 2 * BLOCK):
        core = make(path, tmp_path / "kv", page_size=16, skip_server_warmup=True)
        found = answer(core, tokens)
        assert (found.tokens, found.num_cached) == (expected, cached)
        core.close()


def test_of_a_long_prompt_the_last_windows_are_kept_and_are_enough(
    checkpoint: Path, cold: EngineCore, tmp_path: Path
) -> None:
    tokens, small = prompt(1, 9 * BLOCK + 20), {"swa_full_tokens_ratio": 0.2, "chunked_prefill_size": 32}
    core = make(checkpoint, tmp_path, **small)
    assert core.info.window_slots < 5 * BLOCK
    answer(core, tokens)
    core.close()
    kept = windowed_files(core, tokens)
    assert kept[-2:] == [7, 8]
    assert len(kept) < 5
    assert len(files_of(tmp_path)) == 9 + len(kept)
    core = make(checkpoint, tmp_path, **small)
    again = answer(core, tokens)
    assert (again.tokens, again.num_cached) == (answer(cold, tokens).tokens, 9 * BLOCK)
    other = [*tokens[: 3 * BLOCK], *prompt(2, 30)]
    assert answer(core, other, "parts").tokens == answer(cold, other).tokens
    core.close()


def test_what_a_prompts_last_block_needs_outlives_a_long_answer(
    checkpoint: Path, cold: EngineCore, tmp_path: Path
) -> None:
    """A block's end is up to 63 tokens before the prompt's, and its window lies behind the answer's all the longer."""
    tokens, small = prompt(1, 9 * BLOCK + 50), {"swa_full_tokens_ratio": 0.2, "chunked_prefill_size": 32}
    core = make(checkpoint, tmp_path, **small)
    assert core.info.window_slots < WINDOW + 50 + 200
    answer(core, tokens, params=replace_params(GREEDY, max_new_tokens=200))
    core.close()
    core = make(checkpoint, tmp_path, **small)
    again = answer(core, tokens)
    assert (again.tokens, again.num_cached) == (answer(cold, tokens).tokens, 9 * BLOCK)
    core.close()


def test_a_prefix_is_cut_to_where_its_windows_are(
    checkpoint: Path, cold: EngineCore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = prompt(1, 6 * BLOCK + 20)
    core = make(checkpoint, tmp_path, swa_full_tokens_ratio=0.9, chunked_prefill_size=2000)
    answer(core, tokens)
    core.close()
    assert core._disk is not None
    keys = block_keys(core._disk._root, tokens, 6)
    assert windowed_files(core, tokens) == [0, 1, 2, 3, 4, 5]
    monkeypatch.setattr(DiskTier, "offer", lambda *_: None)  # what is missing stays so
    for gone, cached in ((4, 4), (1, 4), (3, 1), (0, 0)):
        core._disk._files.path(window_key(keys[gone])).unlink()
        other = make(checkpoint, tmp_path)
        found = answer(other, tokens)
        assert found.tokens == answer(cold, tokens).tokens
        assert found.num_cached == cached * BLOCK
        other.close()


def test_windows_that_gave_way_in_memory_come_back_from_disk(
    checkpoint: Path, cold: EngineCore, tmp_path: Path
) -> None:
    core = make(checkpoint, tmp_path, swa_full_tokens_ratio=0.1, chunked_prefill_size=32)
    rows = [prompt(seed, 4 * BLOCK + 10) for seed in range(4)]
    for row in rows:
        answer(core, row)
    read = core.stats.kv_disk_hit_tokens
    again = answer(core, rows[0])
    assert (again.tokens, again.num_cached) == (answer(cold, rows[0]).tokens, 4 * BLOCK)
    assert core.stats.kv_disk_hit_tokens == read, "K and V of the other layers were in memory"
    assert core.stats.kv_disk_read_bytes > 0
    core.flush()
    assert core.stats.slots_free == core.stats.slots_total
    assert core.stats.window_slots_free == core.stats.window_slots_total
    core.close()


@pytest.mark.timeout(3600)
def test_no_wrong_token_whatever_happens_to_the_files(checkpoint: Path, cold: EngineCore, tmp_path: Path) -> None:
    """As in ``test_kvdisk``, with windows too few for all that run."""
    hits = 0
    for seed in range(40 if SOAK else 2):
        rng = Random(seed)
        options = {"swa_full_tokens_ratio": rng.choice([0.1, 0.6]), "chunked_prefill_size": rng.choice([16, 100])}
        traffic = Traffic(checkpoint, cold, tmp_path / str(seed), rng, **options)
        traffic.play(40 if SOAK else 14)
        hits += traffic.hits
        for core in traffic.cores:
            core.flush()
            assert core.stats.window_slots_free == core.stats.window_slots_total
    assert hits > 3 * BLOCK


# --- what can be restored, in plain numbers ---


@given(
    page=st.sampled_from([1, 4, 16, 64]),
    reach=st.integers(1, 300),
    cached=st.integers(0, 5),
    files=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=6, max_size=6),
    holes=st.lists(st.booleans(), min_size=6 * 64, max_size=6 * 64),
)
def test_the_end_is_the_furthest_that_everything_needed_is_there_for(
    page: int, reach: int, cached: int, files: list[tuple[bool, bool]], holes: list[bool]
) -> None:
    pages = 6 * BLOCK // page + 1
    table = WindowTable.empty(reach, pages * page, pages, page)
    table.pages[1:] = np.where(np.array(holes[: pages - 1]), 0, np.arange(1, pages))
    keys = block_keys(b"root", list(range(6 * BLOCK)), 6)
    there = {k for k, (full, _) in zip(keys, files, strict=True) if full}
    there |= {window_key(k) for k, (_, part) in zip(keys, files, strict=True) if part}
    slots = array("i", range(page, page + cached * BLOCK))
    blocks = WindowBlocks(WindowPages(table, BLOCK))

    def whole(block: int) -> bool:
        tokens = range(page + block * BLOCK, page + (block + 1) * BLOCK)
        return block < cached and all(table.pages[slot // page] for slot in tokens)

    def usable(end: int) -> bool:
        full = all(i < cached or keys[i] in there for i in range(end))
        first = max(0, end * BLOCK - reach + 1) // BLOCK
        return full and all(whole(i) or window_key(keys[i]) in there for i in range(first, end))

    assert blocks.end(keys, slots, there.__contains__) == max(n for n in range(7) if usable(n))
