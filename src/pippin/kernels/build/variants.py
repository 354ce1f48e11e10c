"""Which kernels a model will launch: every variant for its heads, dims and dtype, and for each way to cut a launch."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from pippin.errors import ModelError
from pippin.kernels import fused, paged
from pippin.kernels.build.prebuilt import Recorded
from pippin.kernels.form import Form
from pippin.kernels.launch import Launch, Launcher

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What the kernels of a model are compiled for; a window of None is one that sees all.

    ``hidden`` and ``intermediate`` are widths of its rows, ``rotated`` the dims of a head that turn; 0 if not known.
    """

    heads: int
    kv_heads: int
    dim: int
    value_dim: int
    dtype: mx.Dtype = mx.bfloat16
    page_size: int = 1
    windows: tuple[int | None, ...] = (None,)
    softcap: float | None = None
    sinks: bool = False
    hidden: int = 0
    intermediate: int = 0
    rotated: int = 0


def shape_of_config(config: dict[str, Any], page_size: int = 1, dtype: mx.Dtype | None = None) -> ModelShape:
    """From a checkpoint's config.json. Raises ModelError where it names no heads."""
    text = config.get("text_config") or config
    try:
        heads = int(text["num_attention_heads"])
        dim = int(text.get("head_dim") or text["hidden_size"] // heads)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"config.json does not say how many heads the model has, and how wide ({error!r})") from None
    window = text.get("sliding_window") if text.get("use_sliding_window", True) else None
    local = {None, int(window)} if window else {None}
    named = str(text.get("dtype") or text.get("torch_dtype") or config.get("torch_dtype") or "bfloat16")
    return ModelShape(
        heads,
        int(text.get("num_key_value_heads") or heads),
        dim,
        int(text.get("v_head_dim") or dim),
        dtype or DTYPES.get(named, mx.bfloat16),
        page_size,
        tuple(sorted(local, key=lambda w: w or 0)),
        text.get("attn_logit_softcapping"),
        text.get("model_type") == "gpt_oss",
        int(text.get("hidden_size") or 0),
        int(text.get("intermediate_size") or 0),
        int(dim * float(text.get("partial_rotary_factor") or 1.0)),
    )


def read_config(folder: Path) -> dict[str, Any]:
    """A checkpoint's config.json. Raises ModelError."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / 'config.json'} can't be read: {error}") from error
    return found if isinstance(found, dict) else {}


def variants(shape: ModelShape, tunings: Sequence[paged.Tuning]) -> list[Recorded]:
    """One launch of each kernel that the model needs, with inputs of the right dtypes; ``tunings`` are the cuts in use.

    Empty where the kernels don't take such pools.
    """
    found: dict[object, Recorded] = {}

    def record(what: Launch, inputs: Sequence[mx.array]) -> list[mx.array]:
        key = (what.source, what.constants, tuple(a.dtype for a in inputs), tuple(a.size < 8 for a in inputs))
        found.setdefault(key, (what, list(inputs)))
        return [mx.zeros(size, dtype=dtype) for size, dtype in what.outputs]

    k_pool, v_pool = (mx.zeros((2, shape.kv_heads, d), dtype=shape.dtype) for d in (shape.dim, shape.value_dim))
    if not paged.supported(k_pool, v_pool):
        return []
    # Metal compiles one source for inputs of under 8 elements and another for more: both batch sizes occur.
    for rows in (1, 8):
        _record_all(record, shape, tunings, k_pool, v_pool, rows)
        _record_fused(record, shape, k_pool, v_pool, rows)
    return list(found.values())


def _record_all(
    record: Launcher,
    shape: ModelShape,
    tunings: Sequence[paged.Tuning],
    k_pool: mx.array,
    v_pool: mx.array,
    rows: int,
) -> None:
    q = mx.zeros((rows, shape.heads, shape.dim), dtype=shape.dtype)
    k, v = (mx.zeros((rows, *pool.shape[1:]), dtype=shape.dtype) for pool in (k_pool, v_pool))
    lengths, table = mx.zeros(rows, dtype=mx.int32), mx.zeros((rows, 8), dtype=mx.int32)
    tiles = mx.zeros((rows, 3), dtype=mx.int32)
    sinks = mx.zeros(shape.heads, dtype=shape.dtype) if shape.sinks else None
    paged.kv_write(record, k_pool, v_pool, k, v, lengths)
    paged.kv_gather(record, k_pool, v_pool, table, shape.page_size)
    for form, cut in itertools.product(_forms(shape), tunings):
        paged.paged_decode(record, q, k_pool, v_pool, table, lengths, form, cut, sinks)
        paged.paged_decode(record, q, k_pool, v_pool, table, lengths, form, cut, sinks, new=(k, v))
        several = replace(cut, unroll=2)
        paged.paged_extend(record, q, k_pool, v_pool, table, lengths, tiles, form, several, sinks)


def _record_fused(record: Launcher, shape: ModelShape, k_pool: mx.array, v_pool: mx.array, rows: int) -> None:
    """What layers with joined projections launch; models with norms of q and k and without them."""
    norm = fused.Norm(mx.zeros(shape.hidden, dtype=shape.dtype), 1e-6)
    if shape.hidden and fused.takes_rows(shape.hidden, shape.dtype):
        x = mx.zeros((rows, shape.hidden), dtype=shape.dtype)
        fused.add_rms_norm(record, x, x, norm)
    if shape.intermediate and fused.takes_rows(shape.intermediate, shape.dtype):
        fused.swiglu(record, mx.zeros((rows, 2 * shape.intermediate), dtype=shape.dtype))
    if shape.rotated:
        k_at, v_at = shape.heads * shape.dim, (shape.heads + shape.kv_heads) * shape.dim
        heads = fused.Heads(shape.heads, shape.kv_heads, shape.dim, shape.value_dim, 0, k_at, v_at)
        y = mx.zeros((rows, v_at + shape.kv_heads * shape.value_dim), dtype=shape.dtype)
        rope, where = fused.Rope(shape.rotated, False, 1e4, 1.0), mx.zeros(rows, dtype=mx.int32)
        each = fused.Norm(mx.zeros(shape.dim, dtype=shape.dtype), 1e-6)
        for norms in ((None, None), (each, each)):
            fused.rope_kv_write(record, y, k_pool, v_pool, heads, rope, where, where, norms, None)


def _forms(shape: ModelShape) -> list[Form]:
    return [Form(shape.page_size, shape.dim**-0.5, window, shape.softcap) for window in shape.windows]
