"""MLX's native half on this machine: says what to install where there is none, and puts a fast BLAS in front of it.

``prepare`` comes before the first import of ``mlx.core``: a BLAS that is loaded later is not used.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from pippin.errors import EngineError

OPENBLAS = "libopenblas.so.0"


class NoBackendError(EngineError, ImportError):
    """MLX can't be imported here; the message says what would help."""


def prepare() -> None:
    """Makes ``import mlx.core`` work, and fast. Raises NoBackendError where it can't."""
    preload_openblas()
    fill_buffers()
    find_temporary_files()
    try:
        import mlx.core  # noqa: F401
    except ImportError as error:
        raise NoBackendError(advice(platform.system(), platform.machine(), str(error))) from error


def preload_openblas() -> bool:
    """Puts OpenBLAS in front of the reference BLAS of MLX's Linux CPU build; False where that isn't to be had.

    Float32 matrix products are 10 to 20 times faster with it. It does nothing for other dtypes, or for a GPU.
    """
    if sys.platform != "linux" or "mlx.core" in sys.modules:
        return False
    try:
        ctypes.CDLL(OPENBLAS, mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    return True


def fill_buffers() -> None:
    """Lets MLX's CUDA backend queue more of a step at once: by default a buffer ends after few megabytes of weights.

    Queuing a step then waits for most of it to run, and the token of the step before is read that much later: an 8B
    model's step of one stream took 4.9 ms in place of 4.7 on an H200. Not without a limit: what a prompt's layers
    compute is held until its buffer ends, 121 GB in place of 54 there. Metal's buffers are left as they are.
    """
    if sys.platform == "linux" and "mlx.core" not in sys.modules:
        os.environ.setdefault("MLX_MAX_MB_PER_BUFFER", "4096")


def find_temporary_files() -> None:
    """MLX's CPU backend compiles where TMPDIR says, and fails where that is no directory. Raises NoBackendError."""
    try:
        found = tempfile.gettempdir()
    except FileNotFoundError as error:
        raise NoBackendError("no directory for temporary files can be written: name one with TMPDIR") from error
    if not Path(os.environ.get("TMPDIR", found)).is_dir():
        os.environ["TMPDIR"] = found


def import_mlx_lm(least: int = 2048) -> None:
    """The first import of mlx-lm, which lowers the process's limits of open files, the hard one too, for good.

    A server needs a file for each socket, so the limits stay as they are; only a soft limit under ``least`` (macOS
    starts with 256) is raised as far as it may be, since checkpoints of many shards need the files as well.
    """
    change = resource.setrlimit
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit = lambda *_: None
    try:
        import mlx_lm.utils  # noqa: F401
    finally:
        resource.setrlimit = change
    wanted = least if hard == resource.RLIM_INFINITY else min(least, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        change(resource.RLIMIT_NOFILE, (wanted, hard))


def leave_torch_out() -> None:
    """Keeps transformers from importing torch where that is installed; for processes that are ours alone.

    It asks once, when it is first imported, whether torch is there, and would then import it for nothing, which takes
    seconds and 200 MB. Who imports torch by name still can. Does nothing if either is imported already.
    """
    if "torch" in sys.modules or "transformers" in sys.modules or find_spec("torch") is None:
        return
    sys.modules["torch"] = None  # type: ignore[assignment]  # importing it raises
    try:
        import transformers  # noqa: F401
    finally:
        del sys.modules["torch"]


def leave_thread() -> None:
    """Ends MLX's streams of the calling thread, which can't use MLX after that. Not for the main thread.

    Streams that outlive their thread make the process abort when it ends, now and then (seen with MLX 0.32.4).
    """
    if "mlx.core" not in sys.modules:
        return
    import mlx.core as mx

    mx.synchronize()
    mx.clear_streams()


def advice(system: str, machine: str, error: str) -> str:
    """What to do where MLX can't be imported; ``system`` and ``machine`` as ``platform`` names them."""
    match system, machine:
        case "Darwin", "x86_64":
            return (
                "Intel Macs can't run Pippin: MLX needs Apple silicon (M1 or newer). If this Mac has it, "
                "this Python runs under Rosetta: use an arm64 one."
            )
        case "Darwin", _:
            return f"MLX can't be imported ({error}): it needs macOS 14 or newer; try `pip install --upgrade mlx`."
        case "Linux", "x86_64" | "aarch64":
            return (
                f"MLX has no backend here ({error}): `pip install 'mlx[cpu]'`, or `mlx[cuda13]` or "
                "`mlx[cuda12]` for an NVIDIA GPU (`nvidia-smi` shows the driver's CUDA version)."
            )
    return f"MLX has no build for {system} on {machine}: use Apple silicon, or Linux on x86_64 or aarch64."
