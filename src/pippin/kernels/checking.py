"""What checks of kernels share: their names, and how near a result must be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import mlx.core as mx

from pippin.kernels import paged
from pippin.kernels.launch import Launcher

KernelName = Literal[
    "kv_write",
    "kv_gather",
    "paged_decode",
    "paged_decode_write",
    "paged_extend",
    "rope_kv_write",
    "add_rms_norm",
    "swiglu",
    "product",
    "product_8",
    "product_mxfp4",
    "product_mxfp8",
    "product_nvfp4",
    "gated",
    "gated_8",
    "gated_mxfp4",
    "gated_mxfp8",
    "gated_nvfp4",
    "tiles",
    "tiles_8",
    "tiles_mxfp4",
    "tiles_mxfp8",
    "tiles_nvfp4",
    "route",
    "expert_gate",
    "weighed_sum",
    "add_weighed_rms_norm",
    "sort_pairs",
    "latent_decode",
    "boundary",
    "draw",
    "top_logprobs",
]

Check = Callable[[Launcher, mx.Dtype, paged.Tuning], bool]

# Of results about 1 in size: both sides round once, and matrix products round the weights too.
TOLERANCE = {mx.float32: 1e-4, mx.float16: 4e-3, mx.bfloat16: 2e-2}


def close(got: mx.array, want: mx.array) -> bool:
    difference = mx.abs(got.astype(mx.float32) - want.astype(mx.float32))
    return bool(mx.all(difference <= TOLERANCE[want.dtype]).item())
