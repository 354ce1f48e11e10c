"""How many launches a layer asks of a GPU for a step of decodes, by family, with operations put together and without.

Tiny random models of each family, and ones with twice the layers, run against a GPU whose launches compute nothing; the
difference is the layers'. Launches are kernels of ours and MLX's operations, without those that only look at an array
in another way.
"""

from __future__ import annotations

import io
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import mlx.core as mx
import mlx.nn as nn

from benchmarks.host import PAGE, Case, phantom_gpu, requests_of, runner_for, unqueued, zero
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


def operations(arrays: Sequence[mx.array]) -> Counter[str]:
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


def launches(model: nn.Module, choice: Choice, vocab_size: int) -> tuple[int, Counter[str]]:
    """Launches of a step up to its logits, and which of them are kernels of ours."""
    works = requests_of(STEP, SamplingParams(temperature=0.0))
    fast: Counter[str] = Counter()
    with phantom_gpu() as phantom, mock.patch.object(mx, "async_eval", unqueued), fast_operations(fast):
        runner = runner_for(model, choice, STEP.decodes * 128 + PAGE, vocab_size, graphs=False)
        forwards = choice.backend.forwards(Batch(tuple(works)).works)
        logits, _, _ = runner._forward(forwards, range(len(works)), (), ())
        return operations([logits]).total() + phantom.names.total() + fast.total(), Counter(phantom.names)


def counted(architecture: str, layers: int) -> tuple[int, int, Choice, Counter[str]]:
    """Of a model with so many layers: launches apart and together, what was chosen, and kernels of ours."""
    config = small_config(architecture)
    times = layers // int(config["num_hidden_layers"])
    config |= {"num_hidden_layers": layers} | {k: times * config[k] for k in ("layer_types",) if config.get(k)}
    vocab = int(config.get("vocab_size", 288))
    model = build_model(config)
    model.load_weights(list(random_weights(model, 1).items()), strict=False)
    mx.eval(model.parameters())
    choice = choose_attention(model, "mlx", vocab, fuse=True)
    plain, _ = launches(model, replace(choice, fusions=NO_FUSIONS), vocab)
    fused, ours = launches(model, choice, vocab)
    return plain, fused, choice, ours


def row(architecture: str) -> str:
    """A line of the table: what twice the layers cost more."""
    layers = int(small_config(architecture)["num_hidden_layers"])
    plain, fused, choice, ours = counted(architecture, layers)
    more_plain, more_fused, _, more_ours = counted(architecture, 2 * layers)
    joined = ", ".join(sorted(" + ".join(names) for names in choice.fusions.joined)) or "none"
    kernels = ", ".join(f"{name} {n / layers:.3g}" for name, n in sorted((more_ours - ours).items()))
    each = [f"{(more - less) / layers:.1f}" for more, less in ((more_plain, plain), (more_fused, fused))]
    return f"| {architecture} | {each[0]} | {each[1]} | {joined} | {kernels} |"


def main(names: Sequence[str]) -> None:
    print("| family | apart | together | joined | our kernels, a layer |\n|---|---|---|---|---|")
    for name in names or FAMILIES:
        try:
            print(row(name), flush=True)
        except (ModelError, IndexError, ValueError, TypeError) as error:
            print(f"{name}: {error}", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
