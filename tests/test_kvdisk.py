"""Prefixes on disk under a real model: the tokens are those of a cold run, whatever lies there."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import wait
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from pippin import kvdisk
from pippin.cache.disk import BLOCK, Rows, block_keys
from pippin.config import EngineConfig
from pippin.core import EngineCore
from pippin.errors import ConfigError, RequestError
from pippin.loading import load_core
from pippin.messages import Output, Submit
from pippin.restore_choice import RestoreChoice
from pippin.runner import MlxModelRunner
from pippin.types import Batch, Finish, Request, SamplingParams, Work
from tests.checkpoints import make_checkpoint

SOAK = bool(os.environ.get("PIPPIN_SOAK"))
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("model")
    return make_checkpoint(path, "qwen3", head_dim=16, num_hidden_layers=2, max_position_embeddings=1024)


@pytest.fixture(scope="module")
def cold(checkpoint: Path) -> EngineCore:
    return make(checkpoint, None, disable_radix_cache=True)


def make(checkpoint: Path, directory: Path | None, **options: Any) -> EngineCore:
    given: dict[str, Any] = {"max_total_tokens": 1500, "kv_canary": "raise", "kv_disk": directory and str(directory)}
    given["kv_disk_restore"] = "always"  # these models compute in no time
    return load_core(EngineConfig(model_path=str(checkpoint), **given | options))


def prompt(seed: int, length: int) -> list[int]:
    rng = Random(seed)
    return [rng.randrange(3, 280) for _ in range(length)]


def answer(core: EngineCore, tokens: Sequence[int], id: str = "r", params: SamplingParams = GREEDY) -> Output:
    """All that one request is told, in one."""
    core.add(Submit(id, [*tokens], len(tokens), params))
    return drain(core)[id]


def drain(core: EngineCore, most: int = 10**9, found: dict[str, Output] | None = None) -> dict[str, Output]:
    """What each request is told until nothing is left, or in ``most`` steps, beside what it was told before."""
    found = {} if found is None else found
    deadline = time.monotonic() + 120
    for _ in range(most):
        if not core.has_work:
            break
        assert time.monotonic() < deadline, "the engine never came to rest"
        step = core.step()
        for o in step.outputs if step else ():
            before = found.get(o.id, Output(o.id))
            found[o.id] = Output(o.id, before.tokens + o.tokens, num_cached=o.num_cached, finish=o.finish)
    return found


def files_of(directory: Path) -> list[Path]:
    return sorted(directory.glob("*/*.kv2"))


@pytest.mark.parametrize("options", [{}, {"page_size": 16, "chunked_prefill_size": 48}, {"dtype": "bfloat16"}], ids=str)
def test_a_prefix_outlives_the_server(checkpoint: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    tokens = prompt(1, 3 * BLOCK + 10)
    core = make(checkpoint, tmp_path, **options)
    first = answer(core, tokens)
    assert first.num_cached == 0
    core.close()
    assert len(files_of(tmp_path)) == 3
    core = make(checkpoint, tmp_path, **options)
    again = answer(core, tokens)
    assert (again.tokens, again.num_cached) == (first.tokens, 3 * BLOCK)
    stats = core.stats
    assert (stats.kv_disk_hit_tokens, stats.prefill_tokens) == (3 * BLOCK, 10)
    assert stats.kv_disk_read_bytes == stats.kv_disk_bytes == sum(f.stat().st_size for f in files_of(tmp_path))
    longer = answer(core, [*tokens, *again.tokens, *prompt(2, BLOCK)], "next")  # the answer has been written too
    core.close()
    assert longer.num_cached >= len(tokens) + 5 - 16
    core = make(checkpoint, tmp_path, **options)
    assert answer(core, [*tokens, *again.tokens, *prompt(2, BLOCK)]).tokens == longer.tokens
    assert core.stats.kv_disk_hit_tokens == 4 * BLOCK
    core.close()


def test_a_prefix_that_gave_way_in_memory_is_on_disk(checkpoint: Path, tmp_path: Path, cold: EngineCore) -> None:
    core = make(checkpoint, tmp_path, max_total_tokens=400)
    rows = [prompt(seed, 250) for seed in range(4)]
    for row in [*rows, *rows]:
        assert answer(core, row).tokens == answer(cold, row).tokens
    assert core.stats.kv_disk_hit_tokens >= 4 * 3 * BLOCK
    assert core.stats.slots_free + core.stats.slots_cached == 400
    core.close()


class Traffic:
    """Prompts that overlap, together and one after the other, over servers that come and go on one directory."""

    def __init__(self, checkpoint: Path, cold: EngineCore, directory: Path, rng: Random, **options: Any) -> None:
        self.rng, self.cold, self.directory = rng, cold, directory
        self.cores = [make(checkpoint, directory, max_total_tokens=rng.choice([420, 900]), **options) for _ in range(2)]
        self.rows: list[list[int]] = []
        self.hits = 0

    def row(self) -> list[int]:
        rng = self.rng
        base = rng.choice(self.rows)[: rng.randrange(300)] if self.rows and rng.random() < 0.8 else []
        row = [*base, *prompt(rng.randrange(10**6), rng.randrange(1, 150))][:390]
        self.rows.append(row)
        return row

    def spoil(self) -> None:
        """Flips, cuts or removes what lies there."""
        for file in files_of(self.directory):
            kind = self.rng.random()
            data = bytearray(file.read_bytes())
            if kind < 0.1:
                data[self.rng.randrange(len(data))] ^= 1 << self.rng.randrange(8)
                file.write_bytes(data)
            elif kind < 0.2:
                file.write_bytes(data[: self.rng.randrange(len(data))])
            elif kind < 0.25:
                file.unlink()

    def play(self, turns: int) -> None:
        rng = self.rng
        for turn in range(turns):
            core = rng.choice(self.cores)
            asked = {f"{turn}-{i}": self.row() for i in range(rng.choice([1, 1, 2, 4]))}
            for id, row in asked.items():
                core.add(Submit(id, row, len(row), GREEDY))
            early = drain(core, rng.randrange(4))
            gone = rng.choice([*asked]) if rng.random() < 0.2 else ""
            core.abort(gone)
            for id, told in drain(core, found=early).items():
                expected = answer(self.cold, asked[id]).tokens
                assert told.finish is not None
                assert told.finish == Finish("length") or id == gone
                assert told.tokens == expected[: len(told.tokens)], "a wrong token"
            if rng.random() < 0.3:
                self.spoil()
            if rng.random() < 0.3:
                core.flush()
        for core in self.cores:
            core.close()
            self.hits += core.stats.kv_disk_hit_tokens
            assert core.stats.slots_free + core.stats.slots_cached == core.stats.slots_total
            assert core.stats.kv_canary_mismatches == 0


@pytest.mark.timeout(3600)
def test_no_wrong_token_whatever_happens_to_the_files(checkpoint: Path, cold: EngineCore, tmp_path: Path) -> None:
    """Two engines share a directory whose files are flipped, cut and removed; small pools, aborts, flushes."""
    hits = 0
    for seed in range(40 if SOAK else 2):
        traffic = Traffic(checkpoint, cold, tmp_path / str(seed), Random(seed))
        traffic.play(40 if SOAK else 25)
        hits += traffic.hits
    assert hits > 10 * BLOCK


# --- others go on ---


class SlowReads:
    """Reads of a BlockFiles that wait until ``go`` is set."""

    def __init__(self, core: EngineCore) -> None:
        assert core._disk is not None
        self.go, self.files = threading.Event(), core._disk._files
        self._read = self.files.read
        self.files.read = self.read  # type: ignore[method-assign]

    def read(self, key: bytes, tokens: Sequence[int], into: Rows | None = None) -> list[Rows] | None:
        self.go.wait(60)
        return self._read(key, tokens, into)


@pytest.fixture
def warm(checkpoint: Path, tmp_path: Path) -> Iterator[EngineCore]:
    """An engine that has three blocks of prompt(1, 200) on disk, and nothing in memory."""
    core = make(checkpoint, tmp_path)
    answer(core, prompt(1, 200))
    core.close()
    core = make(checkpoint, tmp_path)
    yield core
    core.close()


def test_others_go_on_while_a_request_reads(warm: EngineCore, cold: EngineCore) -> None:
    slow = SlowReads(warm)
    warm.add(Submit("reads", prompt(1, 200), 200, GREEDY))
    assert warm.stats.kv_disk_restoring == 1
    other = Submit("other", prompt(5, 90), 90, GREEDY)
    warm.add(other)
    told: list[Output] = []
    while not any(o.id == "other" and o.finish for o in told):
        step = warm.step()
        told += step.outputs if step else []
    assert {o.id for o in told} == {"other"}
    assert warm.has_work
    slow.go.set()
    assert drain(warm)["reads"].tokens == answer(cold, prompt(1, 200)).tokens
    assert warm.stats.kv_disk_hit_tokens == 3 * BLOCK


def test_blocks_that_come_together_go_where_they_belong(warm: EngineCore) -> None:
    slow = SlowReads(warm)
    warm.add(Submit("r", prompt(1, 200), 200, GREEDY))
    warm.step()
    slow.go.set()
    assert warm._disk is not None
    wait(warm._disk._restoring["r"].reads)
    warm.step()
    runner, slots = warm._runner, warm._scheduler.holdings.cached_slots(prompt(1, 200), 3 * BLOCK)
    assert isinstance(runner, MlxModelRunner)
    restored = [np.array(rows) for rows in runner.read_slots(slots)]
    drain(warm)
    keys = block_keys(warm._disk._root, prompt(1, 200), 3)
    for i, key in enumerate(keys):
        block = warm._disk._files.read(key, prompt(1, 200)[i * BLOCK : (i + 1) * BLOCK])
        for rows, kept in zip(restored, block or [], strict=True):
            assert np.array_equal(rows[i * BLOCK : (i + 1) * BLOCK], kept)


def test_many_that_wait_for_one_prefix_read_it_once(warm: EngineCore, cold: EngineCore) -> None:
    rows = {f"r{i}": [*prompt(1, 195), *prompt(100 + i, 20)] for i in range(12)}
    for id, row in rows.items():
        warm.add(Submit(id, row, len(row), GREEDY))
    found = drain(warm)
    assert all(found[id].tokens == answer(cold, row).tokens for id, row in rows.items())
    assert all(found[id].num_cached >= 3 * BLOCK for id in rows)
    assert warm.stats.kv_disk_hit_tokens == 3 * BLOCK
    assert warm.stats.kv_disk_read_bytes == warm.stats.kv_disk_bytes - warm.stats.kv_disk_written_bytes


def test_a_request_that_waits_can_be_aborted_and_is_known(warm: EngineCore) -> None:
    slow = SlowReads(warm)
    warm.add(Submit("a", prompt(1, 200), 200, GREEDY))
    warm.step()
    with pytest.raises(RequestError, match="running already"):
        warm.add(Submit("a", prompt(9, 20), 20, GREEDY))
    with pytest.raises(RequestError, match="while requests run"):
        warm.flush()
    with pytest.raises(RequestError, match="the prompt has"):
        warm.add(Submit("long", prompt(1, 200) + prompt(3, 900), 1100, GREEDY))
    warm.abort("a")
    assert drain(warm)["a"].finish == Finish("abort")
    slow.go.set()
    assert answer(warm, prompt(1, 200), "a").num_cached == 3 * BLOCK


def test_a_disk_that_hangs_is_given_up(warm: EngineCore, cold: EngineCore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvdisk, "PATIENCE", 0.2)
    slow = SlowReads(warm)
    assert answer(warm, prompt(1, 200)).tokens == answer(cold, prompt(1, 200)).tokens
    assert warm.stats.kv_disk_hit_tokens == 0
    assert answer(warm, [*prompt(1, 150), *prompt(8, 30)], "next").finish == Finish("length")
    slow.go.set()


def test_a_device_that_fails_to_take_a_block(
    warm: EngineCore, cold: EngineCore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The request computes its prompt, and the next one finds its prefix as ever."""
    assert warm._disk is not None
    with monkeypatch.context() as patched, caplog.at_level(logging.CRITICAL):
        patched.setattr(type(warm._runner), "write_landed", lambda *_: 1 / 0)
        assert answer(warm, prompt(1, 200)).tokens == answer(cold, prompt(1, 200)).tokens
    warm.flush()
    assert answer(warm, prompt(1, 200)).num_cached == 3 * BLOCK


def test_every_place_is_free_again(warm: EngineCore, cold: EngineCore) -> None:
    """Of blocks that were put into the pool, and of those that nobody waits for any more."""
    slow, disk = SlowReads(warm), warm._disk
    assert disk is not None
    warm.add(Submit("gone", prompt(1, 200), 200, GREEDY))
    warm.step()
    warm.abort("gone")
    drain(warm)
    taken = len(disk._reads.memory) - len(disk._reads.free)
    assert taken == 3, "what is read into them is not theirs to give"
    slow.go.set()
    assert answer(warm, prompt(1, 200)).tokens == answer(cold, prompt(1, 200)).tokens
    disk._reads.close()
    assert sorted(disk._reads.free) == [*range(len(disk._reads.memory))]


def test_few_places_are_enough(
    checkpoint: Path, tmp_path: Path, cold: EngineCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several that read wait for one another's."""
    monkeypatch.setattr(kvdisk, "PLACES", 1)
    rows = [prompt(seed, 250) for seed in range(3)]
    core = make(checkpoint, tmp_path)
    for row in rows:
        answer(core, row)
    core.close()
    core = make(checkpoint, tmp_path)
    for i, row in enumerate(rows):
        core.add(Submit(str(i), row, len(row), GREEDY))
    found = drain(core)
    assert [found[str(i)].tokens for i in range(3)] == [answer(cold, row).tokens for row in rows]
    assert core.stats.kv_disk_hit_tokens == 3 * 3 * BLOCK
    core.close()


# --- what is faster ---


def seen(computing: float, restoring: float) -> RestoreChoice:
    """A choice that has seen so many seconds a token of each."""
    now = 0.0
    choice = RestoreChoice(clock=lambda: now)
    request = Request("r", [0] * 600, 600, GREEDY)
    batch = Batch((Work(request, 0, 512, False),))
    choice.launched(batch)
    now = 512 * computing
    choice.finished(batch)
    choice.restored(512, 512 * restoring)
    return choice


@pytest.mark.parametrize(("computing", "restoring"), [(1e-5, 1e-3), (1e-3, 1e-5)])
def test_what_is_computed_sooner_is_not_read(
    warm: EngineCore, cold: EngineCore, computing: float, restoring: float
) -> None:
    assert warm._disk is not None
    warm._disk.choice = seen(computing, restoring)
    found, stats = answer(warm, prompt(1, 200)), warm.stats
    assert found.tokens == answer(cold, prompt(1, 200)).tokens
    computed = computing < restoring
    assert found.num_cached == (0 if computed else 3 * BLOCK)
    assert stats.kv_disk_computed_prefixes == computed
    assert stats.kv_disk_computed_tokens == computed * 3 * BLOCK
    assert (stats.kv_disk_read_bytes == 0) == computed
    assert (stats.kv_disk_compute_rate, stats.kv_disk_restore_rate) == pytest.approx((1 / computing, 1 / restoring))


class Partly(RestoreChoice):
    """Restores a block less than it could."""

    def end(self, begin: int, end: int) -> int:
        return end - BLOCK


def test_a_trial_is_in_the_middle_of_a_prefix(warm: EngineCore, cold: EngineCore) -> None:
    assert warm._disk is not None
    warm._disk.choice = Partly()
    found = answer(warm, prompt(1, 200))
    assert (found.tokens, found.num_cached) == (answer(cold, prompt(1, 200)).tokens, 2 * BLOCK)


def test_both_are_measured(checkpoint: Path, tmp_path: Path) -> None:
    core = make(checkpoint, tmp_path, kv_disk_restore="auto")
    answer(core, prompt(1, 600))
    assert (core.stats.kv_disk_compute_rate > 0, core.stats.kv_disk_restore_rate) == (True, 0)
    core.close()
    core = make(checkpoint, tmp_path, kv_disk_restore="auto")
    assert answer(core, prompt(1, 600)).num_cached == 9 * BLOCK, "nothing is known yet"
    assert core.stats.kv_disk_restore_rate > 0
    assert core.stats.kv_disk_compute_rate > 0, "of the 24 tokens behind its last block"
    core.close()


# --- whose they are ---


def test_no_more_is_copied_than_was_planned_with(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = BLOCK * 2 * 2 * 2 * 16 * 4  # K and V, layers, heads, their width, bytes
    monkeypatch.setattr(kvdisk, "_TURN_BYTES", block)
    monkeypatch.setattr(kvdisk, "_WRITING_BYTES", 3 * block)
    core, go = make(checkpoint, tmp_path), threading.Event()
    assert core._disk is not None
    assert core.info.copy_bytes == kvdisk.copy_bytes(block // BLOCK)
    core._disk._writer.submit(go.wait)
    for seed in range(4):
        core.add(Submit(str(seed), prompt(seed, 250), 250, GREEDY))
    drain(core, 100)
    waiting = [write for write in core._disk._writes if not write.done()]
    copied = [key for part in core._disk._copied for key in part.keys]
    assert 3 <= len(waiting) + len(copied) <= kvdisk.copy_bytes(block // BLOCK) // block
    go.set()
    drain(core)
    core.close()
    assert len(files_of(tmp_path)) == 4 * 3


def test_numbers_on_disk_that_are_not_finite_harm_nobody_for_long(
    checkpoint: Path, tmp_path: Path, cold: EngineCore
) -> None:
    tokens = prompt(1, 3 * BLOCK + 10)
    core = make(checkpoint, tmp_path)
    right = answer(core, tokens).tokens
    assert core._disk is not None
    core._disk.close()
    files, keys = core._disk._files, block_keys(core._disk._root, tokens, 3)
    block = tokens[BLOCK : 2 * BLOCK]
    arrays = files.read(keys[1], block)
    assert arrays is not None
    files.path(keys[1]).unlink()
    files.write(keys[1], block, [np.full_like(array, 0x7FC00000) for array in arrays])  # NaN, in the bits of a float32
    core = make(checkpoint, tmp_path)
    assert answer(core, tokens).tokens == right
    assert core.stats.kv_disk_hit_tokens == 3 * BLOCK, "they were read"
    drain(core)
    core.close()
    assert core.stats.kv_disk_drops["not_finite"] == 3
    core = make(checkpoint, tmp_path)
    again = answer(core, tokens)
    assert again.tokens == right
    assert core.stats.retractions == 0, "what lies there now is right"
    core.close()


def test_another_model_finds_nothing(checkpoint: Path, tmp_path: Path) -> None:
    core = make(checkpoint, tmp_path / "kv")
    answer(core, prompt(1, 200))
    core.close()
    other = make_checkpoint(tmp_path / "m", "qwen3", head_dim=16, num_hidden_layers=2, rope_theta=30000.0)
    for path, options in ((other, {}), (checkpoint, {"dtype": "float16"})):
        core = make(path, tmp_path / "kv", **options)
        assert answer(core, prompt(1, 200)).num_cached == 0
        core.close()


def test_prompt_logprobs_are_computed(warm: EngineCore) -> None:
    params = SamplingParams(temperature=0.0, max_new_tokens=2, prompt_logprobs=True)
    assert answer(warm, prompt(1, 200), params=params).num_cached == 0


def test_what_does_not_go_together_is_refused_by_name(
    checkpoint: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with pytest.raises(ConfigError, match="--kv-disk: needs the prefix cache"):
        make(checkpoint, tmp_path, disable_radix_cache=True)
    with pytest.raises(ConfigError, match=r"--kv-disk-gb: .* at least"):
        make(checkpoint, tmp_path, kv_disk_gb=0.0001)
    with pytest.raises(ConfigError, match="--kv-disk-gb: must be above 0"):
        make(checkpoint, tmp_path, kv_disk_gb=0.0)
    with pytest.raises(ConfigError, match="--kv-disk: needs pages that divide 64"):
        make(checkpoint, tmp_path, page_size=24)
    with pytest.raises(ConfigError, match=r"--kv-disk: .* quantized a second time"):
        make(checkpoint, tmp_path, kv_cache_dtype="int8")
    hybrid = make_checkpoint(tmp_path_factory.mktemp("hybrid"), "falcon_h1")
    with pytest.raises(ConfigError, match="--kv-disk: falcon_h1 keeps recurrent state"):
        make(hybrid, tmp_path, max_total_tokens=600)


# --- a process that dies ---

SERVER = """
import sys
from pathlib import Path
from tests.test_kvdisk import answer, make, prompt
core = make(Path(sys.argv[1]), Path(sys.argv[2]))
print("ready", flush=True)
for seed in range(int(sys.argv[3]), 10**9):
    answer(core, prompt(seed, 400))
"""


@pytest.mark.timeout(3600)
def test_an_engine_that_is_killed_while_it_writes(checkpoint: Path, cold: EngineCore, tmp_path: Path) -> None:
    rng = Random(3)
    for round in range(50 if SOAK else 2):
        code = [sys.executable, "-c", SERVER, str(checkpoint), str(tmp_path), str(round * 1000)]
        with subprocess.Popen(code, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1]) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == b"ready\n"
            time.sleep(0.3 + rng.random() * 0.5)
            child.send_signal(signal.SIGKILL)
        core = make(checkpoint, tmp_path)
        for seed in range(round * 1000, round * 1000 + 5):
            assert answer(core, prompt(seed, 400)).tokens == answer(cold, prompt(seed, 400)).tokens
        assert core.stats.kv_disk_drops.get("corrupt", 0) == 0
        core.close()
        assert not [*tmp_path.glob("*/*.tmp")]
