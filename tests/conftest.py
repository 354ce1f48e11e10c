"""What every test starts from: a fast BLAS, no network, the same examples in each run.

Runs before any test imports mlx, which is what makes the first of these work.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

from pippin.backend import preload_openblas

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
