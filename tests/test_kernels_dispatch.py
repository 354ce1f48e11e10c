"""Which code runs where: plain MLX without a GPU, kernels on one, and plain MLX again for a kernel that is wrong there.

The GPU is played by the host launcher, which runs the same launches thread by thread.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pippin import kernels
from pippin.kernels import checks, contest, paged, reference
from pippin.kernels.checking import KernelName
from pippin.kernels.host import compiler, host_launcher
from pippin.kernels.launch import Launch, Launcher
from pippin.kernels.product_checks import PRODUCT_CHECKS, TILES_CHECKS

needs_compiler = pytest.mark.skipif(compiler() is None, reason="kernels run on the host only where g++ is installed")


class Gpu:
    """Runs launches on the host, notes their names, and spoils the results of the kernels named."""

    def __init__(self, wrong: Sequence[str] = (), raises: Sequence[str] = ()) -> None:
        self.launched: list[str] = []
        self._wrong = wrong
        self._raises = raises

    def __call__(self, what: Launch, inputs: Sequence[mx.array]) -> list[mx.array]:
        name = what.source.name
        self.launched.append(name)
        if name in self._raises:
            raise RuntimeError("no such instruction on this chip")
        results = host_launcher()(what, inputs)
        if name not in self._wrong:
            return results
        if name == "kv_write":
            inputs[2][5] = 1
        return [r + 1 for r in results]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Gpu]:
    yield from played(monkeypatch, tmp_path, Gpu())


def played(monkeypatch: pytest.MonkeyPatch, folder: Path, launcher: Gpu) -> Iterator[Gpu]:
    """Makes ``launcher`` the machine's GPU, with an empty cache of verdicts."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.setattr(kernels, "backend", lambda: "cuda")
    monkeypatch.setattr(kernels, "gpu_launcher", lambda platform, stream=None: launcher)
    monkeypatch.setattr(kernels, "prefer_built", lambda platform, jit, stream=None: jit)
    monkeypatch.setattr(contest, "SECONDS", 0.0)  # thread by thread, time means nothing
    kernels.forget()
    yield launcher
    kernels.forget()


def batch() -> checks.Sample:
    return checks.sample(mx.float32)


def attend(s: checks.Sample, new: bool = False) -> mx.array:
    form = kernels.Form(4, 0.2, window=70)
    return kernels.paged_decode(s.q, s.k_pool, s.v_pool, s.table, s.lengths, form, new=(s.k, s.v) if new else None)


def extend(s: checks.Sample) -> mx.array:
    lengths = mx.array([36, 37, 150], dtype=mx.int32)
    tiles = mx.array(kernels.tile_rows((2, 1), kernels.rows_per_tile(8, 2, mx.float32), pad_to=3))
    table = mx.stack([s.table[2], s.table[0]])
    return kernels.paged_extend(s.q, s.k_pool, s.v_pool, table, lengths, tiles, kernels.Form(4, 0.2))


def everything() -> dict[str, mx.array]:
    """Each public operation once, on the same data."""
    s = batch()
    slots = reference.newest_slots(s.table, s.lengths, 4)
    token = kernels.kv_write(s.k_pool, s.v_pool, s.k, s.v, slots)
    mx.eval(token, s.k_pool, s.v_pool)
    keys, values = kernels.kv_gather(s.k_pool, s.v_pool, s.table, page_size=4, after=token)
    found = {
        "written": mx.array(kernels.storage(s.k_pool)),
        "attended": attend(s),
        "extended": extend(s),
        "keys": keys,
        "values": values,
    }
    s = batch()
    found["attended-new"] = attend(s, new=True)
    mx.eval(found["attended-new"])
    found["written-new"] = kernels.storage(s.v_pool)[4:]
    mx.eval(found)
    return found


def assert_same(mine: dict[str, mx.array], theirs: dict[str, mx.array]) -> None:
    for name, array in theirs.items():
        assert mx.allclose(mine[name], array, rtol=1e-5, atol=1e-5), name


def test_importing_needs_neither_torch_nor_cuda() -> None:
    script = (
        "import sys, pippin.kernels as k; print(k.backend());"
        "assert not {'torch', 'cuda', 'cupy', 'triton', 'nvidia', 'pycuda'} & {m.split('.')[0] for m in sys.modules}"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(mx.default_device() != mx.Device(mx.cpu), reason="this machine has a GPU")
def test_without_a_gpu_nothing_is_verified_and_plain_mlx_runs() -> None:
    s = batch()
    assert kernels.backend() is None
    assert kernels.verify() == {}
    assert not kernels.writes_in_place(s.k_pool, s.v_pool)
    want = reference.paged_decode(s.q, s.k_pool, s.v_pool, s.table, s.lengths, kernels.Form(4, 0.2, window=70))
    assert mx.array_equal(attend(s), want)


def test_plain_mlx_writes_without_copying_the_pool() -> None:
    k_pool, v_pool = mx.zeros((1 << 15, 2, 64)), mx.zeros((1 << 15, 2, 64))
    rows, slots = mx.ones((3, 2, 64)), mx.array([5, 9, 11], dtype=mx.int32)
    mx.eval(k_pool, v_pool, rows, slots)
    mx.reset_peak_memory()
    before = mx.get_peak_memory() or mx.get_active_memory()
    for _ in range(5):
        kernels.kv_write(k_pool, v_pool, rows, rows, slots)
        mx.eval(k_pool, v_pool)
    assert mx.get_peak_memory() - before < k_pool.nbytes // 2
    assert mx.array_equal(k_pool[slots], rows)


@needs_compiler
def test_on_a_gpu_kernels_run_and_agree_with_plain_mlx(gpu: Gpu) -> None:
    mine = everything()
    assert set(gpu.launched) >= {"kv_write", "kv_gather", "paged_decode", "paged_decode_fused"}
    assert any(name.startswith("paged_extend") for name in gpu.launched)
    assert kernels.writes_in_place(batch().k_pool, batch().v_pool)
    kernels.forget()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "backend", lambda: None)
        assert_same(mine, everything())


@needs_compiler
def test_kernels_write_into_the_arrays_given(gpu: Gpu) -> None:
    s = batch()
    other = kernels.storage(s.k_pool)[:]
    mx.eval(other)
    slots = mx.array([3, 7, 8], dtype=mx.int32)
    mx.eval(kernels.kv_write(s.k_pool, s.v_pool, s.k, s.v, slots))
    assert mx.array_equal(s.k_pool[slots], s.k)


@needs_compiler
def test_pools_that_kernels_do_not_take_go_to_plain_mlx(gpu: Gpu) -> None:
    """576 wide, as DeepSeek's latents are, and integers."""
    for pool in (mx.zeros((9, 1, 576)), mx.zeros((9, 1, 20)), mx.zeros((9, 1, 64), dtype=mx.int32)):
        assert not kernels.writes_in_place(pool, pool)
    wide = mx.zeros((9, 1, 576))
    kernels.kv_write(wide, wide, mx.ones((1, 1, 576)), mx.ones((1, 1, 576)), mx.array([2]))
    assert "kv_write" not in gpu.launched


@needs_compiler
@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (("kv_write",), {"kv_write"}),
        (("kv_gather",), {"kv_gather"}),
        (("paged_decode",), {"paged_decode"}),
        (("paged_reduce",), {"paged_decode", "paged_decode_write", "paged_extend"}),
        (("paged_decode_fused_split",), {"paged_decode_write"}),
        (("paged_extend_split",), {"paged_extend"}),
        (("paged_decode_fused",), {"paged_decode_write"}),
        (("paged_extend", "paged_extend_split"), {"paged_extend"}),
    ],
)
@pytest.mark.parametrize("how", ["wrong", "raises"])
def test_a_kernel_that_fails_is_named_and_replaced(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    wrong: tuple[str, ...],
    named: set[str],
    how: str,
) -> None:
    want = everything()
    launcher = Gpu(wrong=wrong) if how == "wrong" else Gpu(raises=wrong)
    for gpu in played(monkeypatch, tmp_path, launcher):
        with caplog.at_level(logging.WARNING, "pippin.kernels"):
            verdicts = kernels.verify(mx.float32)
        assert {name for name, ok in verdicts.items() if not ok} == named
        warned = [r.getMessage() for r in caplog.records if "is not right" in r.getMessage()]
        assert len(warned) == len(named)
        assert all(any(name in line for line in warned) for name in named)
        gpu.launched.clear()
        assert_same(everything(), want)
        assert not set(wrong) & set(gpu.launched)


@needs_compiler
@pytest.mark.parametrize("reader", ["paged_decode", "kv_gather"])
def test_nothing_is_written_in_place_where_a_reader_is_wrong(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, reader: str
) -> None:
    """MLX's own reads do not know of such writes, and could run before them."""
    for gpu in played(monkeypatch, tmp_path, Gpu(wrong=(reader,))):
        kernels.verify(mx.float32)
        gpu.launched.clear()
        s = batch()
        assert not kernels.writes_in_place(s.k_pool, s.v_pool)
        kernels.kv_write(s.k_pool, s.v_pool, s.k, s.v, mx.array([3, 7, 8], dtype=mx.int32))
        attend(s, new=True)
        assert not {"kv_write", "paged_decode_fused", "paged_decode_fused_split"} & set(gpu.launched)


@needs_compiler
def test_the_verdict_is_kept(gpu: Gpu, tmp_path: Path) -> None:
    first = kernels.verify(mx.float32)
    assert first
    assert all(first.values())
    assert gpu.launched
    gpu.launched.clear()
    kernels.forget()
    assert kernels.verify(mx.float32) == first
    assert gpu.launched == []


@needs_compiler
@pytest.mark.parametrize(
    "damage", ["{", "[]", json.dumps({"kv_write": True}), json.dumps(dict.fromkeys(checks.CHECKS, 1))]
)
def test_a_damaged_verdict_is_made_anew_or_means_no(gpu: Gpu, tmp_path: Path, damage: str) -> None:
    kernels.verify(mx.float32)
    (path,) = tmp_path.rglob("kernels-*.json")
    path.write_text(damage)
    kernels.forget()
    gpu.launched.clear()
    again = kernels.verify(mx.float32)
    if gpu.launched:
        assert all(again.values())
    else:
        assert not any(again.values())


@needs_compiler
def test_a_verdict_holds_for_these_sources_and_this_mlx_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    now = checks.fingerprint("cuda")
    assert now == checks.fingerprint("cuda") != checks.fingerprint("metal")
    monkeypatch.setattr(checks, "version", lambda package: "99.0")
    newer = checks.fingerprint("cuda")
    monkeypatch.setattr(checks, "dialect_digest", lambda dialect: "other sources")
    assert len({now, newer, checks.fingerprint("cuda")}) == 3


@needs_compiler
def test_a_cache_that_cannot_be_written_is_no_fault(gpu: Gpu, tmp_path: Path) -> None:
    (tmp_path / "pippin").write_text("a file where the folder should be")
    assert all(kernels.verify(mx.float32).values())


@needs_compiler
@pytest.mark.parametrize(
    ("check", "line", "planted"),
    [
        ("kv_write", "slots[block_x])", "slots[block_x]) + 1"),
        ("kv_gather", "+ t % PAGE", ""),
        ("paged_decode", "sub >= old) s[u]", "sub > old) s[u]"),
        ("paged_decode", "length - WINDOW)", "length - WINDOW - 9)"),
        ("paged_decode", "float sum = SINKS ? exp2_of(sink - best) : 0.0f", "float sum = 0.0f"),
        ("paged_decode_write", "if (writes && part + n * LANES < KEY)", "if (false)"),
        ("paged_decode_write", "if (sub != 0) s[0] = NOTHING;", "s[0] = NOTHING;"),
        ("paged_extend", "lengths[first_row + r] : 0", "stop : 0"),
    ],
)
def test_each_check_finds_its_fault(check: KernelName, line: str, planted: str) -> None:
    def edited(text: str) -> str:
        return text.replace(line, planted)

    fault: Launcher = host_launcher(edit=edited)
    for dtype, tuning in ((mx.float32, paged.Tuning()), (mx.bfloat16, paged.Tuning(unroll=2, heads=4))):
        assert checks.CHECKS[check](host_launcher(), dtype, tuning)
        assert not checks.CHECKS[check](fault, dtype, tuning)


@needs_compiler
@pytest.mark.parametrize("check", [*checks.CHECKS, *PRODUCT_CHECKS, *TILES_CHECKS])
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_matrix_products_pass_each_check(check: KernelName, dtype: mx.Dtype) -> None:
    assert {**checks.CHECKS, **PRODUCT_CHECKS, **TILES_CHECKS}[check](host_launcher(), dtype, paged.Tuning(matrix=True))


@needs_compiler
def test_16_bit_pools_go_through_matrix_products_and_have_a_verdict_of_their_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for _ in played(monkeypatch, tmp_path, Gpu(wrong=("paged_extend_mma",))):
        assert all(kernels.verify(mx.float32).values())
        assert [name for name, ok in kernels.verify(mx.bfloat16).items() if not ok] == ["paged_extend"]


@given(blocks=st.integers(1, 10_000), longest=st.integers(1, 1 << 20), cores=st.integers(8, 200), matrix=st.booleans())
def test_splits_are_few_and_none_is_small(blocks: int, longest: int, cores: int, matrix: bool) -> None:
    cut = paged.choose_cut(paged.Tuning(matrix=matrix), blocks, longest, cores)
    assert cut.splits & (cut.splits - 1) == 0
    assert 1 <= cut.splits <= paged.MOST_SPLITS
    assert cut.warps in (4, 8)
    assert cut.splits == 1 or longest >= paged.LEAST_SPLIT * cut.splits // 2
    if cut.splits < paged.MOST_SPLITS:
        assert longest <= paged.LONGEST_SPLIT * cut.splits
    if blocks >= 2 * cores:
        assert cut.warps == 4
        assert cut.splits == 1 or longest > paged.LONGEST_SPLIT


@given(counts=st.lists(st.integers(0, 30), max_size=8), most=st.sampled_from([4, 8]), extra=st.integers(0, 5))
def test_tiles_cover_each_row_once(counts: list[int], most: int, extra: int) -> None:
    needed = sum(-(-count // most) for count in counts)
    tiles = kernels.tile_rows(counts, most, needed + extra)
    assert tiles.shape == (needed + extra, 3)
    assert tiles.dtype == np.int32
    assert (tiles[:, 1] <= most).all()
    rows = [(first + i, sequence) for first, count, sequence in tiles.tolist() for i in range(count)]
    owners = [sequence for sequence, count in enumerate(counts) for _ in range(count)]
    assert sorted(rows) == list(enumerate(owners))
    if rows:
        assert reference.owners(mx.array(tiles), len(rows)).tolist() == owners
