"""What every test starts from: a fast BLAS, no network, the same examples in each run.

Runs before any test imports mlx, which is what makes the first of these work.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings

from pippin.backend import preload_openblas


def share_the_machine(worker: str) -> None:
    """For one of several processes that run tests side by side, as ``pytest -n`` starts them.

    MLX's CPU backend compiles to a file that it opens as soon as that exists, complete or not: each process, and those
    that it starts, have a directory of their own for it, which the next run finds again. Kernels for the host appear
    whole, and all use the same. One thread of OpenBLAS each: as many as there are cores would wait for each other.
    """
    place, user = Path(tempfile.gettempdir()), os.getuid()
    os.environ.setdefault("PIPPIN_HOST_KERNELS", str(place / f"pippin-host-kernels-{user}"))
    folder = place / f"pippin-tests-{user}-{worker}"
    folder.mkdir(mode=0o700, exist_ok=True)
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
    os.environ["OPENBLAS_NUM_THREADS"] = "1"


if "PYTEST_XDIST_WORKER" in os.environ:
    share_the_machine(os.environ["PYTEST_XDIST_WORKER"])
preload_openblas()

# No test may reach a hub, and tokenizers must not fork threads under the engine's child process.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.pop("SGLANG_USE_MLX", None)

_slow_is_fine = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile(
    "ci", max_examples=50, deadline=None, derandomize=True, database=None, suppress_health_check=_slow_is_fine
)
settings.register_profile(
    "sweep", max_examples=2000, deadline=None, suppress_health_check=_slow_is_fine, print_blob=True
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
