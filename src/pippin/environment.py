"""What this machine has, for ``pippin env`` and bug reports."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

from pippin import __version__
from pippin.backend import NoBackendError, preload_openblas, prepare

PACKAGES = ("mlx", "mlx-lm", "transformers", "tokenizers", "fastapi", "pyzmq", "torch")


def describe() -> dict[str, str]:
    """Names to values, in the order to print. Never fails: where MLX has no backend, that is what it says."""
    return {
        "pippin": __version__,
        "python": f"{platform.python_version()} on {platform.platform()}",
        **{name: package_version(name) for name in PACKAGES},
        **device(),
    }


def package_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def device() -> dict[str, str]:
    """The device that MLX would use, its memory, and the attention backends."""
    blas = preload_openblas()
    try:
        prepare()
    except NoBackendError as error:
        return {"device": f"none: {error}"}
    import mlx.core as mx

    from pippin.attention import backends_to_try
    from pippin.memory import device_bytes, on_gpu

    info = mx.device_info()
    return {
        "device": f"{mx.default_device()}, {info.get('device_name') or info.get('architecture')}",
        "memory": f"{device_bytes() / 2**30:.1f} GiB",
        "cores": str(os.cpu_count()),
        "blas": "OpenBLAS" if blas else "of the device" if on_gpu() else "MLX's own (slow; install libopenblas0)",
        "attention backends": ", ".join(backend.name for backend in backends_to_try("mlx")),
    }
