"""Cases of kernels that the machine chooses between: both ways run, and move what they say."""

from __future__ import annotations

from collections import Counter

import mlx.core as mx
import pytest

from pippin.bench.kernel_times import Case
from pippin.bench.product_times import FORMS, expert_cases, latent_case, layer_cases, product_cases
from pippin.kernels import paged
from pippin.kernels.host import host_launcher
from tests.test_kernels_dispatch import needs_compiler


def cases() -> list[Case]:
    launch = host_launcher()
    return [
        *product_cases(launch, mx.bfloat16, 3, 64, 128),
        *expert_cases(launch, mx.bfloat16, 9, 4, 32, 64),
        *expert_cases(launch, mx.bfloat16, 70, 4, 32, 64, by_tiles=True),
        *layer_cases(launch, mx.bfloat16, 5, 2, 4, 32, 64),
        latent_case(launch, paged.Tuning(), 1, 2, 20, mx.float32, heads=4),
    ]


@needs_compiler
@pytest.mark.parametrize("case", cases(), ids=lambda c: c.kernel)
def test_both_ways_give_the_same_shape_and_something_is_moved(case: Case) -> None:
    assert case.mlx
    mine, theirs = case.ours(0, case.start), case.mlx(0, case.start)
    assert mine.shape == theirs.shape
    assert mine.dtype == theirs.dtype
    assert case.moved > 0
    assert case.order == case.mlx_order == "apart"


def test_every_mode_that_the_kernel_takes_is_timed() -> None:
    found = Counter(case.kernel.partition(",")[0] for case in cases())
    assert found == {"rows_mma": len(FORMS), "expert_mma": 3, "grouped_mma": 2, "gated_mma": 1, "latent_decode": 1}
