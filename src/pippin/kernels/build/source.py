"""The whole CUDA source of a launch, as ``mx.fast.precompiled_cuda_kernel`` wants it: one function with a plain C name.

MLX's JIT puts headers of its own in front of each kernel, and compiling those takes most of its second. Here there is
what the bodies use, and nothing else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import mlx.core as mx

from pippin.kernels.launch import Constants, Launch, Source

TYPES = {
    mx.float32: "float",
    mx.float16: "__half",
    mx.bfloat16: "__nv_bfloat16",
    mx.int32: "int",
    mx.uint32: "unsigned",
    mx.uint8: "unsigned char",
}
_INCLUDES = "#include <cuda_fp16.h>\n#include <cuda_bf16.h>\n"


@dataclass(frozen=True, slots=True)
class CudaSource:
    """``name`` is the function's, and differs whenever ``text`` does; ``shapes`` are the inputs whose shapes it takes.

    Its parameters are the inputs, the outputs, then each of those shapes' sizes as an int.
    """

    name: str
    text: str
    shapes: tuple[int, ...]


def cuda_source(what: Launch, inputs: Sequence[mx.array]) -> CudaSource:
    """What to compile for a launch over ``inputs``, of which dtypes and numbers of dimensions matter.

    Raises KeyError for a dtype that no kernel takes.
    """
    outputs = tuple(dtype for _, dtype in what.outputs)
    dtypes, ranks = tuple(a.dtype for a in inputs), tuple(a.ndim for a in inputs)
    return _cuda_source(what.source, what.constants, dtypes, ranks, outputs, what.threads)


@lru_cache(maxsize=1024)
def _cuda_source(
    source: Source,
    constants: Constants,
    inputs: tuple[mx.Dtype, ...],
    ranks: tuple[int, ...],
    outputs: tuple[mx.Dtype, ...],
    threads: int,
) -> CudaSource:
    body = source.text("cuda")
    shapes = tuple(i for i, name in enumerate(source.inputs) if f"{name}_shape" in body)
    parameters = [f"const {TYPES[dtype]}* {name}" for name, dtype in zip(source.inputs, inputs, strict=True)]
    parameters += [f"{TYPES[dtype]}* {name}" for name, dtype in zip(source.outputs, outputs, strict=True)]
    lines = [_constant(name, value) for name, value in constants]
    for i in shapes:
        sizes = [f"{source.inputs[i]}_shape_{axis}" for axis in range(ranks[i])]
        parameters += [f"int {size}" for size in sizes]
        lines.append(f"const int {source.inputs[i]}_shape[] = {{{', '.join(sizes)}}};")
    head = f"{_INCLUDES}{source.header('cuda')}\n"
    rest = f"({', '.join(parameters)}) {{\n" + "".join(f"  {line}\n" for line in lines) + body + "}\n"
    bounds = f"__launch_bounds__({threads}, {source.resident}) " if source.resident else ""
    name = f"pippin_{source.name}_{hashlib.sha256((head + bounds + rest).encode()).hexdigest()[:16]}"
    return CudaSource(name, f'{head}extern "C" __global__ void {bounds}{name}{rest}', shapes)


def _constant(name: str, value: int | bool | mx.Dtype) -> str:
    if isinstance(value, mx.Dtype):
        return f"using {name} = {TYPES[value]};"
    return f"constexpr {type(value).__name__} {name} = {str(value).lower()};"
