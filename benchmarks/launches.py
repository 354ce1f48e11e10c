"""How many launches a layer asks of a GPU for a step of decodes, by family, with operations put together and without.

Tiny random models of each family in bfloat16, and ones with twice the layers, run against a GPU whose launches compute
nothing; the difference is the layers'. Launches are kernels of ours and MLX's operations, without those that only look
at an array in another way. ``--experts`` is how experts' weights are stored, ``--way`` which products of theirs are
taken to have won at load, ``--each`` lists the launches; ``--compiled`` counts a step that goes through a graph, where
MLX joins operations number by number.
"""

from __future__ import annotations

import argparse
import io
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import SwitchLinear

from benchmarks.host import PAGE, Case, phantom_gpu, requests_of, runner_for, unqueued, zero
from pippin import kernels
from pippin.errors import ModelError
from pippin.kernels import cpu
from pippin.models import deferred, seam
from pippin.models.deferred import settled
from pippin.models.seam import NO_FUSIONS
from pippin.probe import Choice, choose_attention
from pippin.types import Batch, SamplingParams
from tests.architectures import small_config
from tests.checkpoints import build_model, random_weights

FAMILIES = (
    "llama", "qwen2", "qwen3", "qwen3_moe", "mixtral", "gpt_oss", "phi3", "phi", "glm4", "glm4_moe",
    "gemma", "gemma3_text", "gemma4_text", "cohere2", "olmo2", "exaone4", "granite", "ernie4_5",
    "hunyuan_v1_dense", "starcoder2", "stablelm", "gpt_neox", "deepseek_v2",
)  # fmt: skip
VIEWS = {
    "Reshape", "Transpose", "Slice", "Broadcast", "ExpandDims", "Squeeze", "Unflatten", "Flatten", "Depends",
    "StopGradient", "Split", "Full", "View",
}  # fmt: skip
STEP = Case("decode", 8, 0, 100)


def operations(*arrays: mx.array) -> Counter[str]:
    """MLX's operations behind lazy arrays that are launches, by name."""
    out = io.StringIO()
    mx.export_to_dot(out, *arrays)
    names = re.findall(r'label ?="([A-Za-z]+)[^"]*", shape=rectangle', out.getvalue())
    return Counter(name for name in names if name not in VIEWS)


@contextmanager
def fast_operations(found: Counter[str]) -> Iterator[None]:
    """Counts MLX's fused operations, each of which is several on a CPU, and computes none of them."""

    def once(name: str) -> Callable[..., mx.array]:
        def stand_in(x: Any, *arguments: Any, **options: Any) -> mx.array:
            found[name] += 1
            array = settled(x)
            given = [a for a in (array, *arguments) if isinstance(a, mx.array)]
            out: mx.array = mx.depends([mx.broadcast_to(zero(array.dtype), array.shape)], given)[0]
            return out

        return stand_in

    with ExitStack() as stack:
        for name in ("rms_norm", "layer_norm", "rope"):
            stand_in = once(name)
            stack.enter_context(mock.patch.object(mx.fast, name, stand_in))
            stack.enter_context(mock.patch.object(deferred, f"_{name}", stand_in))
        stack.enter_context(mock.patch.object(cpu, "swiglu", seam._original_swiglu))  # as on a GPU
        yield


def launches(model: nn.Module, choice: Choice, vocab_size: int, options: argparse.Namespace) -> Counter[str]:
    """Launches of a step up to its logits, by name; kernels of ours begin with ``our``."""
    step = replace(STEP, decodes=options.rows)
    works = requests_of(step, SamplingParams(temperature=0.0))
    fast: Counter[str] = Counter()
    with ExitStack() as stack:
        phantom = stack.enter_context(phantom_gpu())
        stack.enter_context(fast_operations(fast))
        stack.enter_context(mock.patch.object(mx, "async_eval", unqueued))
        stack.enter_context(mock.patch.object(seam, "on_cpu", bool))  # no: a GPU has no tables of rotations
        stack.enter_context(mock.patch.object(kernels, "product_way", return_value=options.way))
        runner = runner_for(model, choice, step.decodes * 128 + PAGE, vocab_size, graphs=options.compiled)
        if options.compiled:
            assert runner.graphs is not None
            shape = runner.graphs.shape(works)
            assert shape is not None
            logits = runner.graphs.run(works, shape, runner._last_token)[0]
        else:
            forwards = choice.backend.forwards(Batch(tuple(works)).works)
            logits, _, _ = runner._forward(forwards, range(len(works)), (), ())
        ours = Counter({f"our {name}": n for name, n in phantom.names.items()})
        return operations(logits) + ours + fast


def model_of(architecture: str, layers: int, options: argparse.Namespace) -> tuple[nn.Module, Choice, int]:
    """A model with so many layers, what it is served with, and its vocabulary's size.

    What is put together is chosen in float32: random weights of few numbers can make much of 16 bits' rounding.
    """
    config = small_config(architecture)
    times = layers // int(config["num_hidden_layers"])
    config |= {"num_hidden_layers": layers} | {k: times * config[k] for k in ("layer_types",) if config.get(k)}
    vocab = int(config.get("vocab_size", 288))
    fusions = _chosen(_random(config), vocab).fusions
    model = _random(config)
    model.set_dtype(mx.bfloat16)
    nn.quantize(model, 32, 4, mode=options.experts, class_predicate=lambda _, m: isinstance(m, SwitchLinear))
    return model, replace(_chosen(model, vocab), fusions=fusions), vocab


def _random(config: dict[str, Any]) -> nn.Module:
    model = build_model(config)
    model.load_weights(list(random_weights(model, 1).items()), strict=False)
    return model


def _chosen(model: nn.Module, vocab: int) -> Choice:
    mx.eval(model.parameters())
    return choose_attention(model, "mlx", vocab, fuse=True)


def row(architecture: str, options: argparse.Namespace) -> str:
    """A line of the table: what twice the layers cost more."""
    layers = int(small_config(architecture)["num_hidden_layers"])
    less, more = (model_of(architecture, n, options) for n in (layers, 2 * layers))
    choice = replace(more[1], fusions=less[1].fusions)
    found = []
    for fusions in (NO_FUSIONS, choice.fusions):
        few = launches(less[0], replace(less[1], fusions=fusions), less[2], options)
        many = launches(more[0], replace(choice, fusions=fusions), more[2], options)
        found.append({name: (many[name] - few[name]) / layers for name in many if many[name] != few[name]})
    joined = ", ".join(sorted("+".join(names) for names in choice.fusions.joined)) or "none"
    apart, together = (f"{sum(each.values()):.3g}" for each in found)
    names = sorted(found[1].items(), key=lambda pair: (not pair[0].startswith("our"), -pair[1]))
    rest = ", ".join(f"{name} {n:.3g}" for name, n in names if options.each or name.startswith("our"))
    return f"| {architecture} | {apart} | {together} | {joined} | {rest.replace('our ', '')} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", default=FAMILIES)
    parser.add_argument("--rows", type=int, default=STEP.decodes)
    parser.add_argument("--experts", choices=("affine", "mxfp4"), default="mxfp4")
    parser.add_argument("--way", choices=("kernel", "mlx"), default="kernel")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--each", action="store_true")
    options = parser.parse_args()
    print("| family | apart | together | joined | launches, a layer |\n|---|---|---|---|---|")
    for name in options.families:
        try:
            print(row(name, options), flush=True)
        except (ModelError, IndexError, ValueError, TypeError) as error:
            print(f"{name}: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
