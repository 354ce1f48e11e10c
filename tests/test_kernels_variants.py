"""Which kernels are built: all that a model's steps launch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from pippin.errors import ModelError
from pippin.kernels import PACKINGS, Packing, fused, latent, paged, products, routed, select, tuning
from pippin.kernels.build.shapes import Codes, Experts, ModelShape, read_config, shape_of_config
from pippin.kernels.build.source import cuda_source
from pippin.kernels.build.variants import variants
from pippin.kernels.form import Form
from pippin.kernels.launch import Launch
from pippin.kernels.packing import PackedPool, line
from tests.kernel_builds import (
    MATRIX,
    SMALL,
    cache,
)

__all__ = ["cache"]


def test_a_models_variants_are_all_that_its_steps_launch() -> None:
    """Every launch of a model's decode, in any batch, at any length, is among them."""
    found = variants(SMALL, tuning.table("cuda").every_cut(mx.bfloat16))
    names = {cuda_source(what, inputs).name for what, inputs in found}
    q, pool = mx.zeros((5, 8, 64), dtype=mx.bfloat16), mx.zeros((9, 2, 64), dtype=mx.bfloat16)
    seen: set[str] = set()

    def launch(what: Launch, inputs: Sequence[mx.array]) -> list[mx.array]:
        seen.add(cuda_source(what, inputs).name)
        return [mx.zeros(shape, dtype=dtype) for shape, dtype in what.outputs]

    for units in (1, 3, 17, 300):
        for longest in (1, 700, 9000, 100_000):
            for new in (None, (pool[:5], pool[:5])):
                cut = tuning.choose("cuda", "decode", mx.bfloat16, units, 8, 2, longest)
                table = mx.zeros((5, 3), dtype=mx.int32)
                form = Form(1, 64**-0.5)
                paged.paged_decode(launch, q, pool, pool, table, mx.zeros(5, dtype=mx.int32), form, cut, new=new)
    assert len(seen) >= 6
    assert seen <= names
    assert len(names) < 40


class Seen:
    """Notes the names of what is launched."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.kinds: set[str] = set()

    def __call__(self, what: Launch, inputs: Sequence[mx.array]) -> list[mx.array]:
        self.names.add(cuda_source(what, inputs).name)
        self.kinds.add(what.source.name)
        return [mx.zeros(shape, dtype=dtype) for shape, dtype in what.outputs]


def built(shape: ModelShape, dtype: mx.Dtype = mx.bfloat16) -> tuple[set[str], set[str]]:
    """(names of the functions, names of the kernels)."""
    found = variants(shape, tuning.table("cuda").every_cut(dtype))
    return {cuda_source(*one).name for one in found}, {what.source.name for what, _ in found}


@pytest.mark.parametrize("packing", PACKINGS)
def test_quantized_slots_have_all_variants_that_their_steps_launch(packing: Packing) -> None:
    names, kinds = built(replace(SMALL, packing=packing))
    assert not any("fused" in kind for kind in kinds), "nothing stores there as it attends"
    launch, rows = Seen(), 5
    pools = [PackedPool.zeros(9, line(packing, 2, 64), mx.bfloat16) for _ in range(2)]
    q, k = (mx.zeros((rows, heads, 64), dtype=mx.bfloat16) for heads in (8, 2))
    table, lengths = mx.zeros((rows, 3), dtype=mx.int32), mx.zeros(rows, dtype=mx.int32)
    form, tiles = Form(1, 64**-0.5), mx.zeros((rows, 3), dtype=mx.int32)
    paged.kv_write(launch, pools[0], pools[1], k, k, lengths)
    paged.kv_gather(launch, pools[0], pools[1], table, 1)
    for units, longest in ((1, 1), (1, 9000), (300, 9000)):
        decode = tuning.choose("cuda", "decode", mx.bfloat16, units, 8, 2, longest)
        paged.paged_decode(launch, q, pools[0], pools[1], table, lengths, form, decode)
        extend = replace(tuning.choose("cuda", "extend", mx.bfloat16, units, 8, 2, longest), unroll=2)
        paged.paged_extend(launch, q, pools[0], pools[1], table, lengths, tiles, form, extend)
    assert launch.names <= names
    assert len(launch.names) >= 6


MODES: dict[str, Codes] = {
    "affine-4": Codes(64, 4),
    "affine-8": Codes(32, 8),
    "mxfp4": Codes(32, 4, "mxfp4"),
    "nvfp4": Codes(16, 4, "nvfp4"),
}


def weights(codes: Codes | None, n: int, k: int, experts: int = 0) -> products.Weights:
    lead = (experts, n) if experts else (n,)
    if codes is None:
        return products.Weights(mx.zeros((*lead, k), dtype=mx.bfloat16))
    packed, scales, *rest = mx.quantize(mx.zeros((*lead, k), mx.bfloat16), codes.group, codes.bits, codes.mode)
    return products.Weights(packed, scales, rest[0] if rest else None, codes.bits, codes.group, codes.mode)


@pytest.mark.parametrize("mode", MODES)
def test_a_quantized_models_products_are_among_them(mode: str) -> None:
    codes = MODES[mode]
    names, _ = built(replace(SMALL, hidden=128, intermediate=192, vocab=320, codes=codes))
    launch = Seen()
    for n, k in ((512 + 256, 128), (128, 512), (2 * 192, 128), (128, 192), (320, 128)):
        if k % codes.group == 0:
            for rows in (1, 2, 17, 33, 256):
                products.product(launch, mx.zeros((rows, k), mx.bfloat16), weights(codes, n, k))
    assert len(launch.names) >= 8
    assert launch.names <= names


@pytest.mark.parametrize("codes", [None, *MODES.values()], ids=str)
def test_products_of_experts_are_among_them(codes: Codes | None) -> None:
    names, kinds = built(replace(SMALL, hidden=128, codes=codes, experts=Experts(16, 4, 64)))
    assert "expert_mma" in kinds
    launch = Seen()
    for tokens in (1, 2, 4, 64, 512):
        pairs = tokens * 4
        for n, k, per in ((64, 128, 4), (128, 64, 1)):
            x, indices = mx.zeros((pairs // per, k), mx.bfloat16), mx.zeros(pairs, mx.int32)
            products.product(launch, x, weights(codes, n, k, 16), indices, per)
        gate, x = weights(codes, 64, 128, 16), mx.zeros((tokens, 128), mx.bfloat16)
        gated = products.Gated(gate, gate, None, routed.Gate())
        products.gated_product(launch, x, gated, mx.zeros(pairs, mx.int32), 4)
    assert len(launch.names) >= 9
    assert launch.names <= names


@pytest.mark.parametrize(("count", "each"), [(60, 4), (128, 8), (16, 1), (64, 6), (160, 6), (512, 10)])
def test_so_they_are_for_every_number_of_tokens(count: int, each: int) -> None:
    names, _ = built(replace(SMALL, hidden=128, codes=None, experts=Experts(count, each, 64)))
    launch, gate = Seen(), weights(None, 64, 128, count)
    gated = products.Gated(gate, gate, None, routed.Gate())
    for tokens in range(1, products.MOST_PAIRS // each + 1):
        x, indices = mx.zeros((tokens, 128), mx.bfloat16), mx.zeros(tokens * each, mx.int32)
        products.gated_product(launch, x, gated, indices, each)
    assert len(launch.names) >= 6
    assert launch.names <= names


@pytest.mark.parametrize("platform", ["cuda", "metal"])
def test_what_goes_on_round_experts_is_among_them(platform: str) -> None:
    """Of gpt-oss, whose experts have biases, and of Qwen3."""
    launch = Seen()
    for sinks, choice in (
        (True, routed.Choice(4, later=True, soft=True)),
        (False, routed.Choice(4, later=True, before=True, divided=True)),
    ):
        shape = replace(SMALL, hidden=128, experts=Experts(16, 4, 64), sinks=sinks)
        found = variants(shape, tuning.table(platform).every_cut(mx.bfloat16))
        launch.names.clear()
        logits, shares = mx.zeros((5, 16), mx.bfloat16), mx.zeros((5, 4), mx.bfloat16)
        routed.route(launch, logits, logits, choice)
        bias = mx.zeros((16, 64), mx.bfloat16) if sinks else None
        rows = routed.Pairs(mx.zeros((20, 64), mx.bfloat16), mx.zeros(20, mx.int32), bias)
        routed.expert_gate(launch, rows, rows, routed.Gate(sinks, 1.702, 7.0))
        bias = mx.zeros((16, 128), mx.bfloat16) if sinks else None
        rows = routed.Pairs(mx.zeros((20, 128), mx.bfloat16), mx.zeros(20, mx.int32), bias)
        x = mx.zeros((5, 128), mx.bfloat16)
        routed.weighed_sum(launch, rows, shares, x)
        routed.add_weighed_rms_norm(launch, x, rows, shares, fused.Norm(x[0], 1e-6))
        routed.weighed_sum(launch, replace(rows, places=routed.sort_pairs(launch, rows.indices, 4).places), shares)
        assert len(launch.names) == 6
        assert launch.names <= {cuda_source(*one).name for one in found}


def test_products_are_built_only_where_they_are_launched() -> None:
    shape = replace(SMALL, hidden=128, intermediate=192, codes=MODES["affine-4"], experts=Experts(16, 4, 64))
    metal = {what.source.name for what, _ in variants(shape, [paged.Tuning(heads=4, unroll=2)])}
    assert not metal & {"rows_mma", "expert_mma", "gated_mma"}
    assert metal >= {"route", "expert_gate"}
    assert not built(replace(SMALL, hidden=128, codes=Codes(64, 6)))[1] & {"rows_mma"}, "MLX's own"


@pytest.mark.parametrize("platform", ["cuda", "metal"])
def test_latents_have_kernels_of_their_own(platform: str) -> None:
    table = tuning.table(platform)
    shape = ModelShape(16, 16, 192, 128, latents=(512, 64), rotated=64)
    found = variants(shape, table.every_cut(mx.bfloat16))
    names = {cuda_source(*one).name for one in found}
    kinds = {"kv_write", "kv_gather", "latent_decode", "latent_decode_split", "paged_reduce"}
    assert {what.source.name for what, _ in found} == kinds
    launch = Seen()
    pools = [mx.zeros((3, 1, d), mx.bfloat16) for d in (512, 64)]
    for rows, longest in ((1, 5), (1, 9000), (40, 9000)):
        q, turned = (mx.zeros((rows, 16, d), mx.bfloat16) for d in (512, 64))
        cut = latent.cut_of(table.base, rows, 16, longest, table.cores)
        where = mx.zeros((rows, 2), mx.int32), mx.zeros(rows, mx.int32)
        latent.latent_decode(launch, q, turned, pools[0], pools[1], *where, Form(1, 1.0), cut)
    assert launch.names <= names


def test_limits_of_all_kinds_are_among_them() -> None:
    names, _ = built(replace(SMALL, vocab=320))
    launch, bits = Seen(), mx.zeros((5, 317), mx.uint32)
    tokens, mass = mx.zeros((5, 1), mx.int32), mx.zeros((5, 1))
    for limits in (select.Limits(tokens, None), select.Limits(None, mass), select.Limits(tokens, mass)):
        select.boundary(launch, bits, None if limits.mass is None else bits, limits)
    select.boundary(launch, bits, None, select.Limits(tokens, None), signed=True)
    assert len(launch.names) == 4
    assert launch.names <= names


def test_pools_that_no_kernel_takes_have_no_variants() -> None:
    assert variants(replace(SMALL, dim=576), [MATRIX]) == []


@pytest.mark.parametrize(
    ("config", "want"),
    [
        ({"num_attention_heads": 32, "hidden_size": 4096}, ModelShape(32, 32, 128, 128)),
        (
            {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "torch_dtype": "float16"},
            ModelShape(8, 2, 64, 64, mx.float16),
        ),
        (
            {"text_config": {"num_attention_heads": 4, "head_dim": 256, "sliding_window": 512, "dtype": "bfloat16"}},
            ModelShape(4, 4, 256, 256, windows=(None, 512)),
        ),
        (
            {"num_attention_heads": 4, "head_dim": 64, "sliding_window": 9, "use_sliding_window": False},
            ModelShape(4, 4, 64, 64),
        ),
        (
            {"num_attention_heads": 8, "head_dim": 64, "model_type": "gpt_oss", "attn_logit_softcapping": 50.0},
            ModelShape(8, 8, 64, 64, softcap=50.0, sinks=True),
        ),
    ],
)
def test_shape_of_config(config: dict[str, Any], want: ModelShape) -> None:
    got = shape_of_config(config)
    assert replace(got, hidden=0, rotated=0) == want
    assert (got.hidden, got.rotated) == (config.get("hidden_size", 0), want.dim)


@pytest.mark.parametrize("config", [{}, {"num_attention_heads": "many"}, {"num_attention_heads": 4}])
def test_a_config_without_heads_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="how many heads"):
        shape_of_config(config)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json can't be read"):
        read_config(tmp_path)


def test_a_config_says_how_weights_and_latents_are_stored() -> None:
    common = {"num_attention_heads": 8, "hidden_size": 512, "vocab_size": 99, "num_key_value_heads": 8}
    mla = {"kv_lora_rank": 256, "qk_rope_head_dim": 32, "qk_nope_head_dim": 64, "v_head_dim": 48}
    moe = {"n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
    got = shape_of_config({**common, **mla, **moe, "quantization": {"group_size": 32, "bits": 4, "mode": "mxfp4"}})
    assert (got.latents, got.codes, got.experts) == ((256, 32), Codes(32, 4, "mxfp4"), Experts(6, 2, 96))
    assert (got.dim, got.value_dim, got.rotated, got.vocab) == (96, 48, 32, 99)
    older = shape_of_config({**common, **mla, "model_type": "deepseek_v2", "quantization": "odd"}, packing="int8")
    assert (older.latents, older.codes, older.experts, older.packing) == (None, None, None, "int8")
    assert (older.kv_heads, older.dim, older.value_dim) == (8, 96, 48)
    loading = shape_of_config({**common, "quantization": {"bits": 8}}, codes=Codes(64, 4))
    assert loading.codes == Codes(64, 4)
    assert shape_of_config({**common, "quantization": {"bits": 8}}).codes == Codes(64, 8)
