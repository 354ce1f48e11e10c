"""What kernels are timed on for which the machine itself chooses between ways (``kernels.contest``): ours and MLX's."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import mlx.core as mx
from mlx_lm.models.activations import swiglu_oai

from pippin.bench.kernel_checks import launcher
from pippin.bench.kernel_times import Case, Step
from pippin.kernels import grouped, latent, paged, products, tuning
from pippin.kernels.launch import Launcher
from pippin.kernels.products import Gated, Weights
from pippin.kernels.routed import Gate

FORMS = (("affine", 4, 64), ("affine", 8, 64), ("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16))


def contested_cases(quick: bool) -> Iterator[Case]:
    """All of them, on the shapes of real models; products only where the dialect has matrix products."""
    launch, platform = launcher()
    assert launch is not None
    table = tuning.table(platform)
    if table.base.matrix:
        for rows in (8,) if quick else (1, 8, 32, 128):
            yield from product_cases(launch, mx.bfloat16, rows)
        for pairs in (64,) if quick else (8, 64, 512):
            yield from expert_cases(launch, mx.bfloat16, pairs)
        for pairs in (512,) if quick else (4096, 32768):
            yield from expert_cases(launch, mx.bfloat16, pairs, by_tiles=True)
        for tokens in (32,) if quick else (1, 4, 16, 32, 128):
            yield from layer_cases(launch, mx.bfloat16, tokens)
    for rows, context in latent.SAMPLES:
        yield latent_case(launch, table.base, table.cores, rows, context, mx.bfloat16)


def product_cases(launch: Launcher, dtype: mx.Dtype, rows: int, n: int = 12288, k: int = 4096) -> Iterator[Case]:
    """Few rows by a quantized matrix, of each mode that the kernel takes."""
    whole = mx.random.normal((n, k)).astype(dtype) / k**0.5
    for mode, bits, group in FORMS:
        packed, scales, *rest = mx.quantize(whole, group, bits, mode)
        weights = Weights(packed, scales, rest[0] if rest else None, bits, group, mode)
        mx.eval(packed, scales, rest)
        moved = sum(a.nbytes for a in (packed, scales, *rest)) + 2 * rows * (n + k)
        yield _case(f"rows_mma, {bits}-bit {mode}", f"{rows} rows by {n} x {k}", moved, launch, weights, dtype, rows)


def expert_cases(
    launch: Launcher,
    dtype: mx.Dtype,
    pairs: int,
    experts: int = 128,
    n: int = 768,
    k: int = 2048,
    by_tiles: bool = False,
) -> Iterator[Case]:
    """Pairs of a row and its expert, by 16-bit and by mxfp4 weights; many of them by tiles, made each time."""
    whole = mx.random.normal((experts, n, k)).astype(dtype) / k**0.5
    mx.eval(whole)
    for name, weights in (("16-bit", Weights(whole)), ("mxfp4", _in_mxfp4(whole, dtype))):
        shape = f"{pairs} pairs by {experts} of {n} x {k}"
        moved = weights.w.nbytes * min(experts, pairs) // experts + 2 * pairs * (n + k)
        if by_tiles:
            ways = grouped.ways(launch, weights, dtype, pairs) | products.ways(launch, weights, dtype, pairs)
            ours, theirs = _step(ways["tiles"]), _step(ways["mlx"])
            yield Case(f"grouped_mma, {name}", shape, moved, mx.zeros(1), ours, theirs, "apart", "apart")
        else:
            yield _case(f"expert_mma, {name}", shape, moved, launch, weights, dtype, pairs)


def layer_cases(
    launch: Launcher, dtype: mx.Dtype, tokens: int, each: int = 4, experts: int = 32, n: int = 2880, k: int = 2880
) -> Iterator[Case]:
    """gpt-oss' gates with what they gate, biases and activation; and its experts' last product, beside MLX's."""
    pairs, form = tokens * each, Gate(True, 1.702, 7.0)
    gate, up, down = (_in_mxfp4(mx.random.normal((experts, *shape)), dtype) for shape in ((n, k), (n, k), (k, n)))
    biases = mx.zeros((experts, n), dtype), mx.zeros((experts, n), dtype)
    indices = mx.sort(mx.arange(pairs, dtype=mx.int32) % experts)
    x, inner = mx.zeros((tokens, k), dtype), mx.zeros((pairs, n), dtype)
    mx.eval(biases, indices, x, inner)
    rows = x[products.row_of_pair(pairs, each)]

    def apart() -> mx.array:
        u, g = (
            products.by_mlx_routed(rows, w, indices) + bias[indices]
            for w, bias in zip((up, gate), reversed(biases), strict=True)
        )
        out: mx.array = swiglu_oai(g, u)
        return out

    shape, bytes_of = f"{tokens} rows, {each} each of {experts}, {n} x {k}", min(experts, pairs) / experts
    gated = Gated(gate, up, biases, form)
    ways = {
        "gated_mma, mxfp4": (lambda: products.gated_product(launch, x, gated, indices, each), apart, 2),
        "expert_mma, mxfp4": (
            lambda: products.product(launch, inner, down, indices),
            lambda: products.by_mlx_routed(inner, down, indices),
            1,
        ),
    }
    for name, (ours, theirs, matrices) in ways.items():
        moved = int(matrices * bytes_of * (down.w.nbytes + n * k * experts // 32)) + 2 * pairs * (n + k)
        yield Case(name, shape, moved, mx.zeros(1), _step(ours), _step(theirs), "apart", "apart")


def _in_mxfp4(whole: mx.array, dtype: mx.Dtype) -> Weights:
    packed, scales, *_ = mx.quantize((whole / whole.shape[-1] ** 0.5).astype(dtype), 32, 4, "mxfp4")
    mx.eval(packed, scales)
    return Weights(packed, scales, None, 4, 32, "mxfp4")


def latent_case(
    launch: Launcher, tuning: paged.Tuning, cores: int, rows: int, context: int, dtype: mx.Dtype, heads: int = 128
) -> Case:
    """DeepSeek-V3's attention of a decode, beside products of gathered latents."""
    cut = latent.cut_of(tuning, rows, heads, context, cores)
    ways = latent.ways(launch, (heads, 512, 64), (dtype, dtype), rows, context, cut)
    moved = rows * context * 576 * dtype.size
    name = f"{rows} rows of {context}, {heads} heads"
    return Case(
        "latent_decode", name, moved, mx.zeros(1), _step(ways["kernel"]), _step(ways["gathered"]), "apart", "apart"
    )


def _case(kernel: str, shape: str, moved: int, launch: Launcher, weights: Weights, dtype: mx.Dtype, rows: int) -> Case:
    ways = products.ways(launch, weights, dtype, rows)
    ours, theirs = _step(ways["kernel"]), _step(ways["mlx"])
    return Case(kernel, shape, moved, mx.zeros(1), ours, theirs, "apart", "apart")


def _step(way: Callable[[], mx.array]) -> Step:
    return lambda _, x: way()
