"""``pippin kernels``: build them ahead of time, tune them, check them on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from pippin.backend import prepare
from pippin.errors import ConfigError

if TYPE_CHECKING:
    from pippin.kernels.build.variants import ModelShape

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
    shape = _shape(model_path, page_size, dtype)
    done = build_kernels(platform, [shape], machine, lambda name: typer.echo(f"  {name}"), arch)
    typer.echo(f"{done.kernels} kernels, {done.compiled} compiled in {done.seconds:.1f} s: {done.folder}")


def _shape(model_path: str | None, page_size: int, dtype: str | None) -> ModelShape:
    from pippin.demo import demo_model_path
    from pippin.kernels.build.variants import DTYPES, read_config, shape_of_config
    from pippin.models.download import find_checkpoint

    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"must be one of {', '.join(DTYPES)}, not {dtype!r}", "--dtype")
    folder = find_checkpoint(model_path, None, ["config.json"]) if model_path else demo_model_path()
    return shape_of_config(read_config(folder), page_size, DTYPES[dtype] if dtype else None)
