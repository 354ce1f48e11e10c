"""Compares each kernel with ``reference`` on small inputs, once for a machine, since nobody has tried them all.

The reference runs on the CPU: in float32 a GPU may multiply with 10 bits of mantissa, and MLX would compile kernels
of its own for it, which takes longer than ours.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import platform as system
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import mlx.core as mx

from pippin.folders import cache_folder
from pippin.kernels import drawing, fused, latent, paged, reference, select
from pippin.kernels.build import store
from pippin.kernels.build.prebuilt import BuiltCuda, Recorded
from pippin.kernels.checking import Check, KernelName, close
from pippin.kernels.drawing import Filters
from pippin.kernels.expert_checks import EXPERT_CHECKS
from pippin.kernels.form import Form
from pippin.kernels.launch import Launch, Launcher, dialect_digest
from pippin.kernels.packing import PackedPool, Packing, Pool, packed, storage
from pippin.kernels.product_checks import PRODUCT_CHECKS, TILES_CHECKS

log = logging.getLogger(__name__)

Slots = Packing | Literal["latents"]
"""What lies in slots, where that is not heads of full numbers."""
Kind = Slots | Literal["products", "tiles", "experts", "limits", "draws"]
"""What has checks and a verdict of its own, so that only those pay for it who use it."""

_PAGE, _SCALE = 4, 0.125


@dataclass(frozen=True, slots=True)
class Sample:
    """A small ragged batch: 3 sequences of up to 150 tokens, the middle one empty, in shuffled pages of 4 slots."""

    k_pool: Pool
    v_pool: Pool
    table: mx.array
    lengths: mx.array
    q: mx.array
    k: mx.array
    v: mx.array


def sample(dtype: mx.Dtype, kind: Slots | None = None) -> Sample:
    """The same batch each time; 8 heads over 2 KV heads of 64, in full slots or in those of ``kind``.

    Latents are 512 wide, and turned keys 64.
    """
    keys = mx.random.split(mx.random.key(7), 6)
    lengths, pages = (150, 0, 37), 40
    heads, dim = (1, 512) if kind == "latents" else (2, 64)

    def normal(i: int, *shape: int) -> mx.array:
        return mx.random.normal(shape, key=keys[i]).astype(dtype)

    def pool(i: int, dim: int) -> Pool:
        numbers = normal(i, (3 * pages + 1) * _PAGE, heads, dim)
        return numbers if kind is None or kind == "latents" else packed(numbers, kind)

    table = mx.random.permutation(3 * pages, key=keys[5]).reshape(3, pages).astype(mx.int32) + 1
    made = Sample(
        k_pool=pool(0, dim),
        v_pool=pool(1, 64),
        table=table,
        lengths=mx.array(lengths, dtype=mx.int32),
        q=normal(2, 3, 8, dim),
        k=normal(3, 3, heads, dim),
        v=normal(4, 3, heads, 64),
    )
    mx.eval(storage(made.k_pool), storage(made.v_pool), made.table, made.lengths, made.q, made.k, made.v)
    return made


def copied(pool: Pool) -> Pool:
    """The same numbers in a buffer of their own."""
    return mx.array(pool) if isinstance(pool, mx.array) else replace(pool, lines=mx.array(pool.lines))


def check_kv_write(launch: Launcher, dtype: mx.Dtype, tuning: paged.Tuning, kind: Slots | None = None) -> bool:
    """The rows land in their slots, and nothing else changes."""
    s = sample(dtype, kind)
    slots = reference.newest_slots(s.table, s.lengths, _PAGE)
    want_k, want_v = copied(s.k_pool), copied(s.v_pool)
    reference.kv_write(want_k, want_v, s.k, s.v, slots)
    mx.eval(storage(want_k), storage(want_v), slots)
    mx.eval(paged.kv_write(launch, s.k_pool, s.v_pool, s.k, s.v, slots))
    return _equal_pools(s, want_k, want_v)


def check_kv_gather(launch: Launcher, dtype: mx.Dtype, tuning: paged.Tuning, kind: Slots | None = None) -> bool:
    """K and V come out heads first, exactly as they are; or as near as a scale can be multiplied."""
    s = sample(dtype, kind)
    got = paged.kv_gather(launch, s.k_pool, s.v_pool, s.table, _PAGE)
    want = reference.kv_gather(s.k_pool, s.v_pool, s.table, page_size=_PAGE)
    quantized = isinstance(s.k_pool, PackedPool)
    same = close if quantized else lambda a, b: bool(mx.array_equal(a, b).item())
    return all(same(a, b) for a, b in zip(got, want, strict=True))


def check_paged_decode(launch: Launcher, dtype: mx.Dtype, tuning: paged.Tuning, kind: Slots | None = None) -> bool:
    """In one launch, and split in four with a window, sinks and a soft cap."""
    s, sinks = sample(dtype, kind), mx.arange(8).astype(dtype) / 4
    plain = Form(_PAGE, _SCALE)
    rich = Form(_PAGE, _SCALE, window=100, softcap=2.0)
    whole = paged.paged_decode(launch, s.q, s.k_pool, s.v_pool, s.table, s.lengths, plain, tuning)
    split = paged.paged_decode(
        launch, s.q, s.k_pool, s.v_pool, s.table, s.lengths, rich, replace(tuning, splits=4), sinks=sinks
    )
    return close(whole, _decode(s, plain)) and close(split, _decode(s, rich, sinks))


def check_paged_decode_write(launch: Launcher, dtype: mx.Dtype, tuning: paged.Tuning) -> bool:
    """Attends to the new K and V, and stores them; in one launch, and split."""
    whole, split = (_writes_and_attends(launch, dtype, replace(tuning, splits=splits)) for splits in (1, 2))
    return whole and split


def _writes_and_attends(launch: Launcher, dtype: mx.Dtype, tuning: paged.Tuning) -> bool:
    s, form = sample(dtype), Form(_PAGE, _SCALE)
    want_k, want_v = copied(s.k_pool), copied(s.v_pool)
    reference.kv_write(want_k, want_v, s.k, s.v, reference.newest_slots(s.table, s.lengths, _PAGE))
    mx.eval(storage(want_k), storage(want_v))
    got = paged.paged_decode(launch, s.q, s.k_pool, s.v_pool, s.table, s.lengths, form, tuning, new=(s.k, s.v))
    mx.eval(got)
    want = reference.paged_decode(s.q, want_k, want_v, s.table, s.lengths, form)
    # Padding rows have no slot of their own here; the kernel leaves scratch alone, the reference writes it.
    return close(got, want) and _equal_pools(s, want_k, want_v, skip=_PAGE)


def check_paged_extend(launch: Launcher, dtype: mx.Dtype, tuning: paged.Tuning, kind: Slots | None = None) -> bool:
    """Five rows of one sequence and three of another, together; in one launch, and split."""
    s, form = sample(dtype, kind), Form(_PAGE, _SCALE, window=100)
    q = mx.concatenate([s.q, s.q, s.q[:2]])
    lengths = mx.array([146, 147, 148, 149, 150, 35, 36, 37], dtype=mx.int32)
    table = mx.stack([s.table[0], s.table[2]])
    tiles = mx.array(paged.tile_rows((5, 3), paged.rows_per_tile(4, dtype, tuning), pad_to=4))
    want = reference.paged_extend(q, s.k_pool, s.v_pool, table, lengths, tiles, form)
    tunings = (replace(tuning, splits=splits, unroll=2) for splits in (1, 2))
    found = [paged.paged_extend(launch, q, s.k_pool, s.v_pool, table, lengths, tiles, form, cut) for cut in tunings]
    return all(close(got, want) for got in found)


def check_rope_kv_write(launch: Launcher, dtype: mx.Dtype, tuning: paged.Tuning, kind: Slots | None = None) -> bool:
    """16 heads of q, 2 of k and v of 64, behind 16 numbers that are none of theirs.

    Half of each head rotated, for few rows; 24 numbers of it, for many, whose heads a block takes in turn.
    """
    heads = fused.Heads(16, 2, 64, 64, q_at=16, k_at=1040, v_at=1168)
    keys = mx.random.split(mx.random.key(11), 2)
    y = mx.random.normal((3, 1296), key=keys[0]).astype(dtype)
    norms = fused.Norm(mx.random.normal((64,), key=keys[1]).astype(dtype), 1e-5), None
    positions = mx.array([3, 0, 70], dtype=mx.int32)
    q, k, v = reference.heads_of(y, heads)
    normed = reference.rms_norm(q, *norms[0])
    samples, got, want = [], [], []
    for dims, many_rows in ((32, 4), (24, 3)):
        s, rope = sample(dtype, kind), fused.Rope(dims, False, 1e4, 1.0, length=1.5)
        slots = reference.newest_slots(s.table, s.lengths, _PAGE)
        turned = (reference.rope(x, positions, dims, rope.frequencies, length=1.5) for x in (normed, k))
        want_q, want_pools = next(turned), (copied(s.k_pool), copied(s.v_pool))
        reference.kv_write(*want_pools, next(turned), v, slots)
        mx.eval(y, slots, want_q, *map(storage, want_pools))
        pools = s.k_pool, s.v_pool
        got.append(fused.rope_kv_write(launch, y, *pools, heads, rope, positions, slots, norms, None, many_rows)[0])
        want.append(want_q)
        samples.append((s, want_pools))
    mx.eval(got)
    return all(map(close, got, want)) and all(_turned_pools(s, *pools, kind) for s, pools in samples)


def _turned_pools(s: Sample, k_pool: Pool, v_pool: Pool, kind: Slots | None) -> bool:
    """K may be off by a sine's last bit, V may not."""
    if kind is not None:
        return _equal_pools(s, k_pool, v_pool)
    same = bool(mx.array_equal(storage(s.v_pool), storage(v_pool)).item())
    return same and close(storage(s.k_pool), storage(k_pool))


def check_add_rms_norm(launch: Launcher, dtype: mx.Dtype, tuning: paged.Tuning) -> bool:
    """Rows of 1056 numbers: no multiple of what a block takes at once."""
    keys = mx.random.split(mx.random.key(12), 3)
    x, r = (mx.random.normal((3, 1056), key=k).astype(dtype) for k in keys[:2])
    norm = fused.Norm((1 + 0.1 * mx.random.normal((1056,), key=keys[2])).astype(dtype), 1e-5)
    got, want = fused.add_rms_norm(launch, x, r, norm), reference.add_rms_norm(x, r, *norm)
    return all(close(a, b) for a, b in zip(got, want, strict=True))


def check_swiglu(launch: Launcher, dtype: mx.Dtype, tuning: paged.Tuning) -> bool:
    """Rows of 1056 numbers, and numbers whose sigmoid is 0 or 1; with gelu too."""
    y = 4 * mx.random.normal((3, 2112), key=mx.random.key(13))
    y = mx.where(mx.arange(2112) < 4, mx.array([-100.0, 100.0, 1e4, -1e4] * 528), y).astype(dtype)
    pairs = (fused.swiglu(launch, y), reference.swiglu(y)), (fused.geglu(launch, y), reference.geglu(y))
    return all(close(got / 16, want / 16) for got, want in pairs)


CHECKS: dict[KernelName, Check] = {
    "kv_write": check_kv_write,
    "kv_gather": check_kv_gather,
    "paged_decode": check_paged_decode,
    "paged_decode_write": check_paged_decode_write,
    "paged_extend": check_paged_extend,
    "rope_kv_write": check_rope_kv_write,
    "add_rms_norm": check_add_rms_norm,
    "swiglu": check_swiglu,
}


def check_latent_decode(launch: Launcher, dtype: mx.Dtype, tuning: paged.Tuning, kind: Slots = "latents") -> bool:
    """Nine heads over latents, in one launch and split in three."""
    s, form = sample(dtype, kind), Form(_PAGE, _SCALE / 4)
    keys = mx.random.split(mx.random.key(15), 2)
    q, turned = ((mx.random.normal((3, 9, d), key=k) / 8).astype(dtype) for d, k in zip((512, 64), keys, strict=True))
    want = reference.latent_decode(q, turned, s.k_pool, s.v_pool, s.table, s.lengths, form)
    mx.eval(q, turned, want)
    cut = latent.cut_of(tuning, 3, 9, 150, 1)
    found = [
        latent.latent_decode(launch, q, turned, s.k_pool, s.v_pool, s.table, s.lengths, form, replace(cut, splits=n))
        for n in (1, 3)
    ]
    return all(close(got, want) for got in found)


def check_boundary(launch: Launcher, dtype: mx.Dtype, tuning: paged.Tuning) -> bool:
    """What is kept must be the same to the last token."""
    cases = _limited_rows()
    mx.eval([a for bits, mass, limits, _ in cases for a in (bits, mass, *limits) if a is not None])
    found = [select.tokens_up_to(case[0], *select.boundary(launch, *case)) for case in cases]
    wanted = [reference.kept(*case) for case in cases]
    same = [mx.array_equal(mine, theirs) for mine, theirs in zip(found, wanted, strict=True)]
    return bool(mx.all(mx.stack(same)).item())


def _limited_rows() -> list[tuple[mx.array, mx.array | None, select.Limits, bool]]:
    """Bits, mass, limits and whether the highest bit counts: rows that begin anywhere and hold more than a block does.

    Distances that differ, that are often and mostly equal; and numbers in a row. Limits of no, one, some, all but one
    and all tokens, and of more mass than there is.
    """
    rows, n = 8, 2501
    keys = mx.random.split(mx.random.key(16), 3)
    row, ids = mx.arange(rows)[:, None], mx.arange(n)
    distance = 4 * mx.abs(mx.random.normal((rows, n), key=keys[0]))
    distance = mx.where(row % 2 == 0, distance, mx.round(distance))
    distance = mx.where(row == 1, mx.round(distance / 4) * 4, distance)
    distance = mx.where(row == 3, mx.where(ids < 1001, 20.0, 1.5), distance - distance.min(axis=-1, keepdims=True))
    weights = mx.exp(-distance)
    mass = (weights * (2**31 / weights.sum(axis=-1, keepdims=True)) + 0.5).astype(mx.uint32)
    tokens = mx.array([40, 1200, 1, 1500, 2**31 - 1, n - 1, 0, 2100], mx.int32)
    target = mx.array([0.9, 0.95, 1e-9, 1.2, math.inf, 0.999, 0.3, math.inf]) * 2**31
    bits, by_count = distance.view(mx.uint32), select.Limits(tokens, None)
    shuffled = mx.stack([mx.random.permutation(n, key=key) for key in mx.random.split(keys[1], rows)]).astype(mx.uint32)
    odd = mx.where(ids < 3, mx.array(2**32 - 1, mx.uint32), mx.array(2**31 - 1, mx.uint32))  # no tokens, and the last
    shuffled = mx.where((row == 5) & (ids < 4), odd, shuffled)
    turned = mx.random.randint(-(2**15), 2**15, (rows, n), key=keys[2]) * 2**16
    return [
        (bits, None, by_count, False),
        (bits, mass, select.Limits(None, target), False),
        (bits, mass, select.Limits(tokens, target), False),
        (shuffled, None, by_count, False),
        (turned.view(mx.uint32), None, by_count, True),
    ]


def check_draw(launch: Launcher, dtype: mx.Dtype, tuning: paged.Tuning) -> bool:
    """Every row must draw the same token, with all filters and with none; and say if its logits are numbers."""
    cases = drawn_rows(dtype)
    mx.eval([a for logits, _, filters in cases for a in (logits, *filters) if a is not None])
    found = [drawing.draw(launch, *case) for case in cases]
    right = [mx.array_equal(tokens, reference.draw(*case)) for case, (tokens, _) in zip(cases, found, strict=True)]
    numbers = mx.array([[math.nan], [math.inf], [-math.inf], [0.0]]).astype(dtype)
    odd = mx.where(mx.arange(4512) % 90 == 89, numbers, cases[0][0][:4])
    _, finite = drawing.draw(launch, odd, 4500, Filters())
    right += [mx.array_equal(finite, mx.array([False, False, True, True])), *(mx.all(f) for _, f in found)]
    return bool(mx.all(mx.stack(right)).item())


def drawn_rows(dtype: mx.Dtype) -> list[tuple[mx.array, int, Filters]]:
    """Logits, how many exist, and filters: rows that are flat enough for one token more or less to show.

    Of those that differ, of which some are equal, and all; masks that refuse most and all, and that leave an odd
    vocabulary's middle and a few others.
    """
    rows, n, width = 32, 4501, 4512
    keys = mx.random.split(mx.random.key(18), 4)
    row, id = mx.arange(rows)[:, None], mx.arange(width)
    logits = 3 * mx.random.normal((rows, width), key=keys[0])
    logits = mx.where(row % 4 == 0, mx.round(logits / 2) * 2, mx.where(row % 4 == 1, -0.0, logits))
    logits = mx.where((row % 8 == 6) & (id % 2000 == 250), 40.0, logits)
    logits = mx.where(id < n, logits, 50.0).astype(dtype)
    seeds, *words = (
        mx.random.randint(-(2**31), 2**31 - 1, (rows, count), key=key).astype(mx.uint32)
        for key, count in zip(keys[1:], (2, 141, 141), strict=True)
    )
    every, word = mx.array(2**32 - 1, mx.uint32), mx.arange(141)
    few = mx.where(word == 2250 // 32, mx.array(1 << 2250 % 32, mx.uint32), mx.where(word % 60 == 17, 1 << 18, 0))
    allowed = mx.where(row % 3 == 0, words[0] & words[1], mx.where(row == 5, 0, every)).astype(mx.uint32)
    temperature = mx.array([1.0, 6.0, 0.0, 9.0, 3.0, 1.0, 1.0, 2.0] * 4)
    endless = 2**31 - 1
    all_filters = Filters(
        temperature,
        seeds,
        mx.array([2, 3, 1, endless, 3, 5, 4000, endless, 40, 2, 700, 1, endless, endless, 4, 2] * 2, mx.int32),
        mx.array([math.inf, 0.5, 0.02, 0.9, math.inf, 1e-9, 0.6, 0.97] * 4),
        mx.array([-math.inf, -math.inf, -math.inf, -1.0] * 8),
        allowed,
    )
    return [
        (logits, n, all_filters),
        (logits, n - 1, Filters(5 * temperature, seeds)),
        (logits, n, Filters(mx.full(rows, 50.0), seeds, allowed=mx.broadcast_to(few.astype(mx.uint32), (rows, 141)))),
    ]


def check_top_logprobs(launch: Launcher, dtype: mx.Dtype, tuning: paged.Tuning) -> bool:
    """The same ids in the same order, among equals too."""
    logits, n, _ = drawn_rows(dtype)[0]
    logits = mx.concatenate([logits, mx.round(logits[:9] / 6) * 6])
    tokens = mx.arange(logits.shape[0], dtype=mx.int32) * 101
    mx.eval(logits, tokens)
    found = [drawing.top_logprobs(launch, logits, n, tokens, count) for count in (5, 32)]
    wanted = [reference.top_logprobs(logits, n, tokens, count) for count in (5, 32)]
    same = [bool(mx.array_equal(mine[1], theirs[1]).item()) for mine, theirs in zip(found, wanted, strict=True)]
    near = [mx.abs(a - b).max() < 1e-4 for f, w in zip(found, wanted, strict=True) for a, b in zip(f, w, strict=True)]
    return all(same) and bool(mx.all(mx.stack(near)).item())


KindCheck = Callable[[Launcher, mx.Dtype, paged.Tuning, Slots], bool]

# What runs on quantized pools: nothing stores there as it attends.
PACKED_CHECKS: dict[KernelName, KindCheck] = {
    "kv_write": check_kv_write,
    "kv_gather": check_kv_gather,
    "paged_decode": check_paged_decode,
    "paged_extend": check_paged_extend,
    "rope_kv_write": check_rope_kv_write,
}

LATENT_CHECKS: dict[KernelName, KindCheck] = {
    "kv_write": check_kv_write,
    "kv_gather": check_kv_gather,
    "latent_decode": check_latent_decode,
}


def checks_for(kind: Kind | None) -> dict[KernelName, Check]:
    """Those of a kind, or of full pools and what every model launches."""
    if kind is None:
        return CHECKS
    if kind == "products":
        return PRODUCT_CHECKS
    if kind == "tiles":
        return TILES_CHECKS
    if kind == "experts":
        return EXPERT_CHECKS
    if kind == "limits":
        return {"boundary": check_boundary}
    if kind == "draws":
        return {"draw": check_draw, "top_logprobs": check_top_logprobs}
    chosen = LATENT_CHECKS if kind == "latents" else PACKED_CHECKS
    return {name: _of_kind(check, kind) for name, check in chosen.items()}


def _of_kind(check: KindCheck, kind: Slots) -> Check:
    @wraps(check)
    def run(launch: Launcher, dtype: mx.Dtype, tuning: paged.Tuning) -> bool:
        return check(launch, dtype, tuning, kind)

    return run


def check_all(
    launch: Launcher, dtype: mx.Dtype, tuning: paged.Tuning, kind: Kind | None = None
) -> dict[KernelName, bool]:
    """Each kernel's verdict for pools of ``dtype``; one that raises (it may not compile there) has failed.

    ``launch`` must say itself where it runs.
    """
    with mx.stream(mx.cpu):
        return {name: _passes(name, check, launch, dtype, tuning) for name, check in checks_for(kind).items()}


def recorded(dtype: mx.Dtype, tuning: paged.Tuning, kind: Kind | None = None) -> list[Recorded]:
    """Every launch of the checks, with its inputs; nothing of ours runs. A check must launch all before it compares."""
    found: list[Recorded] = []

    def record(what: Launch, inputs: Sequence[mx.array]) -> list[mx.array]:
        found.append((what, list(inputs)))
        return [mx.zeros(shape, dtype=kind) for shape, kind in what.outputs]

    check_all(record, dtype, tuning, kind)
    return found


def verdicts(
    platform: str, launch: Launcher, dtype: mx.Dtype, tuning: paged.Tuning, kind: Kind | None = None
) -> dict[KernelName, bool]:
    """``check_all``, kept in the user's cache for this machine and these sources.

    Kernels that are not compiled yet are, all together, before the first check. If one that we compiled is wrong,
    MLX's JIT compiles them all from then on, and those are checked.
    """
    name = "-".join([str(dtype).rpartition(".")[2], *([kind] if kind else [])])
    path = cache_folder() / f"kernels-{name}-{fingerprint(platform)}.json"
    known = _read(path, checks_for(kind))
    if known is not None:
        return known
    if isinstance(launch, BuiltCuda):
        launch.prepare(recorded(dtype, tuning, kind))
    found = check_all(launch, dtype, tuning, kind)
    key, wrong = store.Key.here(platform), [name for name, ok in found.items() if not ok]
    why = f"compiled by us, {', '.join(wrong)} went wrong here"
    if wrong and isinstance(launch, BuiltCuda) and launch.refused is None:
        launch.refuse(why)
        store.refuse(key, why)
        found = check_all(launch, dtype, tuning, kind)
    elif wrong and store.in_use(key):  # MLX has a .metallib's functions for good: the next process does without
        store.refuse(key, why)
        return found
    try:
        store.write(path, json.dumps(found).encode())
    except OSError as error:
        log.info("kernel verdicts are not kept: %s", error)
    return found


def fingerprint(platform: str) -> str:
    """Of the chip, the system, MLX, the kernels' sources and what was built ahead: a verdict holds for these alone."""
    built = store.in_use(store.Key.here(platform)) if platform == "metal" else ""
    facts = (platform, store.chip(), system.platform(), version("mlx"), dialect_digest(platform), built)
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]


def _read(path: Path, checks: dict[KernelName, Check]) -> dict[KernelName, bool] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    whole = isinstance(found, dict) and found.keys() == checks.keys()
    return {name: found[name] is True for name in checks} if whole else None


def _passes(name: str, check: Check, launch: Launcher, dtype: mx.Dtype, tuning: paged.Tuning) -> bool:
    try:
        return check(launch, dtype, tuning)
    except (RuntimeError, ValueError, TypeError) as error:
        log.warning("%s: %s", name, error)
        return False


def _decode(s: Sample, form: Form, sinks: mx.array | None = None) -> mx.array:
    return reference.paged_decode(s.q, s.k_pool, s.v_pool, s.table, s.lengths, form, sinks=sinks)


def _equal_pools(s: Sample, k_pool: Pool, v_pool: Pool, skip: int = 1) -> bool:
    return same_numbers(s.k_pool, k_pool, skip) and same_numbers(s.v_pool, v_pool, skip)


def same_numbers(got: Pool, want: Pool, skip: int = 1) -> bool:
    """Whether two pools agree from slot ``skip`` on.

    Quantized ones do if hardly any number has a code beside the other's: the last bit of a scale, or of a sine, may be
    another.
    """
    if isinstance(got, mx.array) and isinstance(want, mx.array):
        return bool(mx.all(got[skip:] == want[skip:]).item())
    slots = mx.arange(skip, want.shape[0])
    mine, theirs = (pool[slots].astype(mx.float32) for pool in (got, want))
    difference = mx.abs(mine - theirs)
    few = mx.mean((difference > 0.01).astype(mx.float32)) < 0.01
    return bool((few & mx.all(difference < 1.0)).item())
