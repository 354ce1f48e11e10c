"""``pippin kernels``: build them ahead of time, tune them, check them on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from pippin.backend import prepare
from pippin.errors import ConfigError

if TYPE_CHECKING:
    from pippin.kernels.build.shapes import ModelShape

kernels = typer.Typer(
    name="kernels", help="Build, tune and check the GPU kernels of this machine.", no_args_is_help=True
)


@kernels.command()
def build(
    model_path: Annotated[
        str | None, typer.Option(help="Build for this model: a local directory or hub id. The demo model if left out.")
    ] = None,
    arch: Annotated[str | None, typer.Option(help="CUDA architecture to build for, such as sm_90.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16, if not the checkpoint's.")] = None,
    page_size: Annotated[int, typer.Option(help="As `pippin serve` will be told.", min=1)] = 1,
    kv_cache_dtype: Annotated[str, typer.Option(help="As `pippin serve` will be told.")] = "auto",
    quantization: Annotated[str | None, typer.Option(help="As `pippin serve` will be told.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Only say what the build would need and lacks here.")] = False,
) -> None:
    """Compile a model's kernels into the user's cache, so that no server has to.

    On a Mac a .metallib, through Xcode's Metal compiler; elsewhere cubins, through NVRTC or nvcc.
    """
    prepare()  # before any import of MLX
    from pippin.kernels.build.build import build as build_kernels
    from pippin.kernels.build.build import missing, platform_to_build
    from pippin.kernels.build.toolchain import Machine

    machine = Machine.here()
    platform = "cuda" if arch else platform_to_build(machine)
    if check:
        lacks = missing(platform, machine)
        typer.echo("\n".join(lacks) if lacks else f"everything that a {platform} build needs is here")
        raise typer.Exit(1 if lacks else 0)
    shape = _shape(model_path, page_size, dtype, kv_cache_dtype, quantization)
    done = build_kernels(platform, [shape], machine, lambda name: typer.echo(f"  {name}"), arch)
    typer.echo(f"{done.kernels} kernels, {done.compiled} compiled in {done.seconds:.1f} s: {done.folder}")


@kernels.command()
def tune(
    quick: Annotated[bool, typer.Option("--quick", help="A few points instead of all.")] = False,
    output: Annotated[str | None, typer.Option(help="File to write instead of the one in the user's cache.")] = None,
) -> None:
    """Measure how to cut attention over long contexts on this GPU, and keep the table for later runs."""
    prepare()
    import mlx.core as mx

    from pippin.bench.tune import gpu_measure, points, save
    from pippin.bench.tune import tune as tune_kernels
    from pippin.kernels import backend, tuning

    measure = gpu_measure()
    table, chip = tuning.table(backend() or "cuda"), str(mx.device_info()["device_name"])
    for point, cut, taken, found in tune_kernels(table, points(quick), measure, chip):
        table = found
        where = f"{point.kernel} of {point.units} x {point.longest} in {point.dtype}"
        typer.echo(f"{where:<40} {cut.warps} warps, {cut.splits:>2} parts: {taken * 1e6:8.1f} µs")
    typer.echo(f"{len(table.cells)} cuts: {save(table, output)}")


@kernels.command()
def check(
    quick: Annotated[bool, typer.Option("--quick", help="Fewer shapes.")] = False,
) -> None:
    """Compare every kernel with plain MLX on many shapes, on this GPU or thread by thread on the CPU."""
    prepare()
    from pippin.bench.kernel_checks import kernel_checks

    outcomes = []
    for outcome in kernel_checks(quick):
        outcomes.append(outcome)
        said = " ".join(f"{name}={value}" for name, value in outcome.detail.items())
        typer.echo(f"{'ok  ' if outcome.ok else 'FAIL'} {outcome.check:<24} {outcome.error:9.2e}  {said}")
    failed = sum(not outcome.ok for outcome in outcomes)
    typer.echo(
        f"{len(outcomes)} checks, {failed} failed" if outcomes else "no GPU, and no g++ to play one: nothing ran"
    )
    raise typer.Exit(1 if failed or not outcomes else 0)


def _shape(
    model_path: str | None, page_size: int, dtype: str | None, kv_cache_dtype: str, quantization: str | None
) -> ModelShape:
    from pippin.config import KV_CACHE_DTYPES
    from pippin.demo import demo_model_path
    from pippin.kernels import PACKINGS
    from pippin.kernels.build.shapes import DTYPES, Codes, read_config, shape_of_config
    from pippin.models.download import find_checkpoint
    from pippin.models.quantize import BITS, GROUP_SIZE

    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"must be one of {', '.join(DTYPES)}, not {dtype!r}", "--dtype")
    if kv_cache_dtype not in KV_CACHE_DTYPES:
        raise ConfigError(f"must be one of {', '.join(KV_CACHE_DTYPES)}, not {kv_cache_dtype!r}", "--kv-cache-dtype")
    if quantization not in (None, *BITS):
        raise ConfigError(f"must be one of {', '.join(BITS)}, not {quantization!r}", "--quantization")
    packing = next((p for p in PACKINGS if kv_cache_dtype.startswith(p)), None)
    codes = Codes(GROUP_SIZE, BITS[quantization]) if quantization else None
    folder = find_checkpoint(model_path, None, ["config.json"]) if model_path else demo_model_path()
    return shape_of_config(read_config(folder), page_size, DTYPES[dtype] if dtype else None, packing, codes)
