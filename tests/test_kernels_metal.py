"""The Metal source that MLX would compile, checked without Metal: it is C++14 that uses names which are declared.

MLX builds a function round a kernel's lines; ``metal_source`` builds the same one. What Metal has beyond C++ is
declared in ``METAL``: address spaces are empty words there, so a pointer into the wrong one is not found.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence

import mlx.core as mx
import pytest

from pippin.kernels import drawing, fused, latent, paged, routed, select
from pippin.kernels.form import Form
from pippin.kernels.launch import Launch, small_inputs
from pippin.kernels.packing import PACKINGS, PackedPool, Pool
from pippin.kernels.packing import line as line_of

METAL = """
#include <stddef.h>
#include <stdint.h>
#define device
#define constant static
#define thread
#define threadgroup
#define kernel
typedef unsigned int uint;
typedef unsigned short ushort;
typedef unsigned char uchar;
struct half { half() = default; explicit half(float); operator float() const; uint16_t b; };
struct bfloat { bfloat() = default; explicit bfloat(float); operator float() const; uint16_t b; };
struct uint3 { uint x, y, z; };
namespace metal {
namespace fast { float exp2(float); float sin(float); float cos(float); }
namespace precise { float log(float); }
float rsqrt(float);
float fmax(float, float);
float floor(float);
float fma(float, float, float);
float simd_shuffle_xor(float, ushort);
uint simd_shuffle_xor(uint, ushort);
enum class mem_flags { mem_none, mem_device, mem_threadgroup };
void threadgroup_barrier(mem_flags);
}
using namespace metal;
template <typename T, typename F> T as_type(F);
typedef half float16_t;
typedef bfloat bfloat16_t;
"""
TYPES = {
    mx.float32: "float",
    mx.float16: "float16_t",
    mx.bfloat16: "bfloat16_t",
    mx.int32: "int",
    mx.uint32: "uint",
    mx.uint8: "uchar",
}
ATTRIBUTES = {
    "thread_index_in_simdgroup": "uint",
    "thread_index_in_threadgroup": "uint",
    "simdgroup_index_in_threadgroup": "uint",
    "threadgroup_position_in_grid": "uint3",
    "threadgroups_per_grid": "uint3",
}


def metal_source(what: Launch, inputs: Sequence[mx.array]) -> str:
    """The kernel's header, then the function that ``mx.fast.metal_kernel`` makes of the rest, instantiated."""
    source, text = what.source, what.source.text("metal")
    constants = [*what.constants, ("SMALL", small_inputs(inputs))]
    kinds = [("typename" if isinstance(v, mx.Dtype) else type(v).__name__, name) for name, v in constants]
    parameters: list[str] = []
    for name, array in zip(source.inputs, inputs, strict=True):
        # `constant` at file scope needs a storage class to be C++; in a parameter it must be empty.
        parameters.append(f"const {TYPES[array.dtype]}* {name} [[buffer({len(parameters)})]]")
        if f"{name}_shape" in text:
            parameters.append(f"const int* {name}_shape [[buffer({len(parameters)})]]")
    for name, (_, dtype) in zip(source.outputs, what.outputs, strict=True):
        parameters.append(f"device {TYPES[dtype]}* {name} [[buffer({len(parameters)})]]")
    parameters += [f"{kind} {name} [[{name}]]" for name, kind in ATTRIBUTES.items() if name in text]
    values = ", ".join(TYPES[v] if isinstance(v, mx.Dtype) else str(v).lower() for _, v in constants)
    return (
        f"{METAL}{source.header('metal')}\n"
        f"template <{', '.join(f'{kind} {name}' for kind, name in kinds)}>\n"
        f"void kernel_of_ours({', '.join(parameters)}) {{\n{text}\n}}\n"
        f"template decltype(kernel_of_ours<{values}>) kernel_of_ours<{values}>;\n"
    )


def launches() -> dict[str, tuple[Launch, list[mx.array]]]:
    """One launch of every kernel and variant, for a model of 8 heads over 2 KV heads in each dtype."""
    found: dict[str, tuple[Launch, list[mx.array]]] = {}

    def record(what: Launch, inputs: Sequence[mx.array]) -> list[mx.array]:
        dtype = dict(what.constants).get("T", what.outputs[0][1])
        kind = dict(what.constants).get("KIND", "")
        found[f"{what.source.name}{kind}-{str(dtype).split('.')[-1]}"] = (what, list(inputs))
        return [mx.zeros(shape, dtype=dtype) for shape, dtype in what.outputs]

    def record_pools(dtype: mx.Dtype, pool: Pool) -> None:
        q, k = mx.zeros((3, 8, 128), dtype=dtype), mx.zeros((3, 2, 128), dtype=dtype)
        table, lengths = mx.zeros((3, 4), dtype=mx.int32), mx.zeros(3, dtype=mx.int32)
        form = Form(1, 0.1, window=5, softcap=2.0)
        paged.kv_write(record, pool, pool, k, k, lengths)
        paged.kv_gather(record, pool, pool, table, 1)
        for splits in (1, 2):
            tuning = paged.Tuning(splits, unroll=2, heads=4)
            rest = (pool, pool, table, lengths)
            paged.paged_decode(record, q, *rest, form, tuning, sinks=q[0, :, 0])
            if isinstance(pool, mx.array):
                paged.paged_decode(record, q, *rest, form, tuning, new=(k, k))
            paged.paged_extend(record, q, *rest, mx.zeros((1, 3), dtype=mx.int32), form, tuning)
        norm, heads = fused.Norm(q[0, 0], 1e-6), fused.Heads(8, 2, 128, 128, 0, 1024, 1280)
        y, rope = mx.zeros((3, 1536), dtype=dtype), fused.Rope(128, False, 1e4, 1.0)
        fused.rope_kv_write(record, y, pool, pool, heads, rope, lengths, lengths, (norm, norm), None)
        fused.add_rms_norm(record, y, y, fused.Norm(y[0], 1e-6))
        fused.swiglu(record, y)
        for bias in (None, y):
            where, shares = mx.zeros(6, dtype=mx.int32), y[:, :2]
            places = None if bias is None else routed.sort_pairs(record, where, 2).places
            pairs = routed.Pairs(mx.zeros((6, 1536), dtype=dtype), where, bias, places)
            routed.expert_gate(record, pairs, pairs, routed.Gate(bias is not None, 1.702, 7.0))
            routed.weighed_sum(record, pairs, shares, bias)
            routed.add_weighed_rms_norm(record, y, pairs, shares, fused.Norm(y[0], 1e-6))
        for choice in (routed.Choice(4, later=True, soft=True), routed.Choice(2, before=True, divided=True)):
            routed.route(record, y[:, :100], y[:, :100], choice)

    for dtype in (mx.float32, mx.float16, mx.bfloat16):
        record_pools(dtype, mx.zeros((9, 2, 128), dtype=dtype))
        latents, keys = (mx.zeros((9, 1, d), dtype=dtype) for d in (512, 64))
        q, turned = (mx.zeros((3, 16, d), dtype=dtype) for d in (512, 64))
        where = mx.zeros((3, 4), dtype=mx.int32), mx.zeros(3, dtype=mx.int32)
        for splits in (1, 2):
            part = latent.Cut(8, 2, 1, splits)
            latent.latent_decode(record, q, turned, latents, keys, *where, Form(1, 0.1), part)
        drawing.draw(record, mx.zeros((3, 320), dtype=dtype), 300, drawing.Filters())
        hot = drawing.Filters(mx.zeros(3), mx.zeros((3, 2), dtype=mx.uint32))
        drawing.draw(record, mx.zeros((3, 320), dtype=dtype), 300, hot)
        drawing.top_logprobs(record, mx.zeros((3, 320), dtype=dtype), 300, mx.zeros(3, dtype=mx.int32), 5)
    bits, tokens, mass = mx.zeros((3, 8), mx.uint32), mx.zeros(3, mx.int32), mx.zeros(3)
    select.boundary(record, bits, bits, select.Limits(tokens, mass))
    for packing in PACKINGS:
        record_pools(mx.bfloat16, PackedPool.zeros(9, line_of(packing, 2, 128), mx.bfloat16))
    return found


LAUNCHES = launches()


def test_every_variant_is_here() -> None:
    kernels = {name.split("-")[0] for name in LAUNCHES}
    suffixes = ("", "_split")
    decodes = {f"paged_decode{fused}{split}" for split in suffixes for fused in ("", "_fused")}
    rows = {"rope_kv_write", "add_rms_norm", "swiglu"}
    rows |= {"expert_gate", "weighed_sum", "add_weighed_rms_norm", "route", "sort_pairs"}
    over_pools = {
        "kv_write",
        "kv_gather",
        "rope_kv_write",
        *(f"{n}{s}" for n in ("paged_decode", "paged_extend") for s in suffixes),
    }
    assert kernels == {
        "kv_write",
        "kv_gather",
        "paged_reduce",
        "boundary",
        *(f"draw{part}" for part in ("", "_survey", "_part", "_pick")),
        "top_logprobs",
        *rows,
        *decodes,
        *(f"latent_decode{s}" for s in suffixes),
        *(f"paged_extend{s}" for s in suffixes),
        *(f"{name}_packed{kind}" for name in over_pools for kind in (4, 8, 43)),
    }


def complaints(source: str) -> str:
    """What g++ has against it as C++14; empty for nothing."""
    command = ["g++", "-std=c++14", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-x", "c++", "-"]
    lenient = ["-Wno-attributes", "-Wno-unused", "-Wno-unknown-pragmas", "-Wno-sign-compare", "-Wno-unused-parameter"]
    done = subprocess.run([*command, *lenient], input=source, text=True, capture_output=True, check=False)
    return done.stderr


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="checking the Metal source needs g++")


@needs_compiler
@pytest.mark.parametrize("name", LAUNCHES)
def test_metal_source_is_cpp14_of_declared_names(name: str) -> None:
    assert complaints(metal_source(*LAUNCHES[name])) == ""


@needs_compiler
@pytest.mark.parametrize(
    ("line", "planted"),
    [
        ("larger(0, length - WINDOW)", "max(0, length - WINDOW)"),
        ("const int length = lengths[row];", "const auto [length, other] = lengths_of(row);"),
        ("BARRIER();", "__syncthreads();"),
    ],
)
def test_what_metal_has_not_is_found(line: str, planted: str) -> None:
    source = metal_source(*LAUNCHES["paged_decode-float16"])
    assert line in source
    assert complaints(source.replace(line, planted)) != ""


@pytest.mark.parametrize("name", LAUNCHES)
def test_metal_source_keeps_to_what_metal_has(name: str) -> None:
    """No double, no standard library, globals in constant memory, and every thread index by the name MLX looks for."""
    what, _ = LAUNCHES[name]
    header, text = what.source.header("metal"), what.source.text("metal")
    assert not re.search(r"\bdouble\b|\bstd::|\bnew\b|\bthrow\b|\bgoto\b|\bauto\b|\[&\]|\[=\]", header + text)
    for line in header.splitlines():
        assert not re.match(r"(static |const |constexpr )+\w+ \w+ =", line), f"a global outside of constant: {line}"
    used = set(re.findall(r"\b\w+_(?:in|per)_(?:simdgroup|threadgroup|grid)\b", text))
    assert used
    assert used <= ATTRIBUTES.keys()
    assert not any(attribute in header for attribute in ATTRIBUTES)


@pytest.mark.parametrize("name", LAUNCHES)
def test_bodies_name_no_address_space_but_through_the_dialect(name: str) -> None:
    """A pointer in a body says DEVICE or THREAD, or is one of MLX's own parameters."""
    what, _ = LAUNCHES[name]
    body = what.source.text("metal").split("using namespace pippin;")[1]
    for pointer in re.findall(r"[^;{}()]*\w[>\w]\s*\*\s*\w+ =", body):
        assert "DEVICE" in pointer, pointer
    for cast in re.findall(r"\(([^()]*\*)\)", body):
        assert "DEVICE" in cast, cast


def test_a_kernels_name_changes_with_its_source_and_with_metals_address_spaces() -> None:
    what, inputs = LAUNCHES["paged_decode-float16"]
    assert what.source.unique_name("metal") != what.source.unique_name("cuda")
    assert small_inputs(inputs) & 1 << what.source.inputs.index("lengths")
    assert small_inputs([mx.zeros(8), mx.zeros(7), mx.zeros((2, 4))]) == 0b010
