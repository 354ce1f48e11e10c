"""What MLX would compile for a launch on Metal, told by MLX itself: it prints the function it makes, with its name.

``python -m pippin.kernels.build.metal_sources FILE`` is a process of its own, since MLX writes to the process's
standard output. FILE holds launches as ``dump`` writes them.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from pippin.kernels.build.prebuilt import Recorded
from pippin.kernels.launch import Launch, Source, small_inputs

_DTYPES = {str(d): d for d in (mx.float32, mx.float16, mx.bfloat16, mx.int32, mx.uint32, mx.uint8)}
_PRINTED = re.compile(r"Generated source code for `(\w+)`:\n```\n(.*?)\n```\n", re.S)


def dump(launches: Sequence[Recorded]) -> str:
    """Launches as JSON, with the shapes and dtypes of their inputs."""
    return json.dumps([_plain(what, inputs) for what, inputs in launches])


def load(text: str) -> list[Recorded]:
    """The inverse of ``dump``; inputs are zeros."""
    return [_launch(one) for one in json.loads(text)]


def parse(output: str) -> dict[str, str]:
    """Function names to sources, from what MLX printed."""
    return dict(_PRINTED.findall(output))


def speak(launches: Sequence[Recorded]) -> None:
    """Has MLX print every launch's source. Nothing is evaluated. Raises ValueError where MLX has no Metal."""
    for what, inputs in launches:
        source, (x, y) = what.source, what.blocks
        kernel = mx.fast.metal_kernel(
            name=source.unique_name("metal"),
            input_names=list(source.inputs),
            output_names=list(source.outputs),
            header=source.header("metal"),
            source=source.text("metal"),
        )
        kernel(  # type: ignore[operator]
            inputs=list(inputs),
            template=[*what.constants, ("SMALL", small_inputs(inputs))],
            grid=(x * what.threads, y, 1),
            threadgroup=(what.threads, 1, 1),
            output_shapes=[shape for shape, _ in what.outputs],
            output_dtypes=[dtype for _, dtype in what.outputs],
            verbose=True,
        )


def _plain(what: Launch, inputs: Sequence[mx.array]) -> dict[str, Any]:
    source = what.source
    return {
        "source": [source.name, source.body, source.inputs, source.outputs, source.macros, source.headers],
        "constants": [[name, str(v) if isinstance(v, mx.Dtype) else v] for name, v in what.constants],
        "blocks": what.blocks,
        "threads": what.threads,
        "outputs": [[shape, str(dtype)] for shape, dtype in what.outputs],
        "inputs": [[a.shape, str(a.dtype)] for a in inputs],
    }


def _launch(one: dict[str, Any]) -> Recorded:
    name, body, inputs, outputs, macros, headers = one["source"]
    what = Launch(
        Source(name, body, tuple(inputs), tuple(outputs), tuple(macros), tuple(headers)),
        tuple((n, _DTYPES[v] if isinstance(v, str) else v) for n, v in one["constants"]),
        (one["blocks"][0], one["blocks"][1]),
        one["threads"],
        tuple((tuple(shape), _DTYPES[dtype]) for shape, dtype in one["outputs"]),
    )
    return what, [mx.zeros(tuple(shape), dtype=_DTYPES[dtype]) for shape, dtype in one["inputs"]]


if __name__ == "__main__":
    speak(load(Path(sys.argv[1]).read_text(encoding="utf-8")))
