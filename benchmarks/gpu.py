"""The engine beside mlx-lm on a GPU: random weights in a real model's shape, made there, in one run.

    python -m benchmarks.gpu [--shapes 0.6b 8b] [--streams 1 8 32 128] [--cases decode prefill …] [--json results.jsonl]

Decode: so many streams of 256 tokens, 100 steps each. Prefill: 16 prompts of 512 tokens to their first tokens. Long:
one prompt of 16384. Many-long: 32 streams of 8192 tokens each. Waits: the time to the first token of 64 new tokens
behind a cached prefix of 8192, and of a short prompt that comes behind one of 32768. Deep: 8 streams of 32768 tokens
each, with K and V as ``--kv-cache-dtypes`` says. Speed does not depend on the weights, but a random router spreads its
tokens evenly. Ours and mlx-lm's take turns, or with ``--apart`` follow each other, where there is no room for both;
medians of ``--rounds``.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pippin.backend import prepare

prepare()  # both sides queue whole steps

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models.switch_layers import SwitchLinear

from pippin.config import EngineConfig
from pippin.core import EngineCore
from pippin.garbage import loaded_left_alone
from pippin.loading import build_core
from pippin.messages import Submit
from pippin.models.load import LoadedModel
from pippin.types import SamplingParams

DTYPE = mx.bfloat16

_YARN = {
    "type": "yarn",
    "rope_type": "yarn",
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 4096,
}
SHAPES: dict[str, dict[str, Any]] = {
    "0.6b": {"hidden_size": 1024, "num_hidden_layers": 28, "intermediate_size": 3072, "num_attention_heads": 16},
    "8b": {"hidden_size": 4096, "num_hidden_layers": 36, "intermediate_size": 12288, "num_attention_heads": 32},
    "30b-a3b": {
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "intermediate_size": 6144,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
    },
    "mixtral-8x7b": {
        "model_type": "mixtral",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "vocab_size": 32000,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
    },
    "gpt-oss-20b": {
        "model_type": "gpt_oss",
        "hidden_size": 2880,
        "num_hidden_layers": 24,
        "intermediate_size": 2880,
        "num_attention_heads": 64,
        "head_dim": 64,
        "vocab_size": 201088,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "rope_theta": 150000,
        "rope_scaling": _YARN | {"factor": 32.0},
        "tie_word_embeddings": False,
    },
    "deepseek-v2-lite": {
        "model_type": "deepseek_v2",
        "hidden_size": 2048,
        "num_hidden_layers": 27,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "vocab_size": 102400,
        "n_shared_experts": 2,
        "n_routed_experts": 64,
        "routed_scaling_factor": 1.0,
        "num_experts_per_tok": 6,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "kv_lora_rank": 512,
        "q_lora_rank": None,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "rope_theta": 10000,
        "rope_scaling": _YARN | {"factor": 40.0, "mscale": 0.707, "mscale_all_dim": 0.707},
        "attention_bias": False,
    },
    "tiny": {"hidden_size": 128, "num_hidden_layers": 2, "intermediate_size": 256, "num_attention_heads": 4},
}
COMMON: dict[str, Any] = {
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
    "rope_theta": 1e6,
}


def make_model(shape: str, codes: str = "", vocab_size: int | None = None) -> nn.Module:
    """A random bfloat16 model of ``SHAPES``. ``codes`` quantizes it: to so many bits in groups of 64, or its experts
    alone to mxfp4, as gpt-oss is published; ``vocab_size`` is that of ``tiny``."""
    moe = "moe_intermediate_size" in SHAPES[shape]
    settings = {"model_type": "qwen3_moe" if moe else "qwen3", **COMMON, **SHAPES[shape]}
    if shape == "tiny":
        settings |= {"vocab_size": vocab_size or 1000, "num_key_value_heads": 2, "head_dim": 64}
    module = import_module(f"mlx_lm.models.{settings['model_type']}")
    model: nn.Module = module.Model(module.ModelArgs.from_dict(settings))
    model.set_dtype(mx.float32 if shape == "tiny" else DTYPE)
    if codes == "mxfp4":
        nn.quantize(
            model, group_size=32, bits=4, mode="mxfp4", class_predicate=lambda _, m: isinstance(m, SwitchLinear)
        )
    elif codes:
        nn.quantize(model, group_size=64, bits=int(codes))
    mx.eval(model.parameters())
    return model


def weight_bytes(model: nn.Module) -> int:
    return sum(int(v.nbytes) for _, v in tree_flatten(model.parameters()))


def make_core(model: nn.Module, **options: Any) -> EngineCore:
    vocab = int(model.args.vocab_size)
    kind = str(model.args.model_type)
    dtype = next(v.dtype for name, v in tree_flatten(model.parameters()) if name.endswith("norm.weight"))
    context = options.pop("context_length", None) or 40960
    loaded = LoadedModel(model, {}, Path("random"), kind, dtype, None, (), vocab, context, weight_bytes(model))
    # Each case runs once before it is timed; the models beside this one are no other programs'.
    config = EngineConfig(skip_server_warmup=True, disable_memory_sharing=True, **options)
    return build_core(loaded, config, lambda _: None)


def prompts(count: int, length: int, vocab: int, seed: int) -> list[list[int]]:
    key = mx.random.key(seed)
    rows: list[list[int]] = mx.random.randint(3, vocab, (count, length), key=key).tolist()  # type: ignore[assignment]
    return rows


class Ours:
    """Times EngineCore."""

    name = "pippin"

    def __init__(self, core: EngineCore) -> None:
        self._core = core
        self._count = 0

    def run(self, rows: Sequence[Sequence[int]], new: int) -> tuple[float, float]:
        """Seconds to everyone's first token, and tokens a second from there on."""
        params = SamplingParams(temperature=0.0, max_new_tokens=new, ignore_eos=True)
        for row in rows:
            self._count += 1
            self._core.add(Submit(str(self._count), list(row), len(row), params))
        return _time(self._tokens(), len(rows))

    def _tokens(self) -> Iterator[str]:
        while self._core.has_work:
            step = self._core.step()
            for output in step.outputs if step else ():
                for _ in output.tokens:
                    yield output.id


class MlxLm:
    """Times mlx-lm: ``generate_step`` for one stream, ``BatchGenerator`` for more."""

    name = "mlx-lm"

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def run(self, rows: Sequence[Sequence[int]], new: int) -> tuple[float, float]:
        """As ``Ours.run``."""
        return _time(self._single(rows[0], new) if len(rows) == 1 else self._batch(rows, new), len(rows))

    def _single(self, row: Sequence[int], new: int) -> Iterator[str]:
        for _ in generate_step(mx.array(list(row)), self._model, max_tokens=new):
            yield "0"

    def _batch(self, rows: Sequence[Sequence[int]], new: int) -> Iterator[str]:
        batch = BatchGenerator(
            self._model,
            max_tokens=new,
            prefill_batch_size=16 if len(rows[0]) <= 1024 else 2,  # more long ones at once do not fit
            completion_batch_size=max(32, len(rows)),
        )
        batch.insert([list(row) for row in rows])
        left = len(rows)
        while left:
            _, responses = batch.next()
            for response in responses:
                yield str(response.uid)
                left -= response.finish_reason is not None


def _time(tokens: Iterator[str], streams: int) -> tuple[float, float]:
    began = time.perf_counter()
    seen: set[str] = set()
    count, first, base = 0, 0.0, 0
    for id in tokens:
        count += 1
        seen.add(id)
        if len(seen) == streams and not first:
            first, base = time.perf_counter(), count
    ended = time.perf_counter()
    return first - began, (count - base) / (ended - first) if count > base else 0.0


def median_of(rounds: int, run: Callable[[int], tuple[float, float]]) -> tuple[float, float]:
    run(-1)
    found = [run(i) for i in range(rounds)]
    return statistics.median(f for f, _ in found), statistics.median(d for _, d in found)


CASES = ("decode", "prefill", "long", "many-long", "waits", "deep")
LONG = {"long", "many-long", "waits"}


def measure(
    shape: str,
    codes: str,
    *,
    streams: Sequence[int],
    rounds: int,
    names: Sequence[str],
    graph_rows: int,
    cases: Sequence[str],
    kv_dtypes: Sequence[str] = (),
) -> Iterator[dict[str, Any]]:
    # A model of its own for each: ours is hooked, and its quantized layers would serve mlx-lm faster too.
    sides: list[Ours | MlxLm] = [MlxLm(make_model(shape, codes))] if MlxLm.name in names else []
    what = {"shape": shape, "bits": codes or 16}
    core, model = None, None
    if Ours.name in names:
        model = make_model(shape, codes)
        if "deep" in cases:
            yield from (what | {"side": "pippin"} | row for row in deep(model, kv_dtypes, rounds))
        if {*cases} != {"deep"}:
            core = make_core_for(model, streams, graph_rows, cases)
            sides.append(Ours(core))
    vocab = int(model.args.vocab_size) if model is not None else int(SHAPES[shape].get("vocab_size", 1000))
    with loaded_left_alone():  # as in the engine's own process
        for count in streams if "decode" in cases else ():
            for side in sides:
                mx.reset_peak_memory()
                _, rate = median_of(rounds, lambda i, s=side, c=count: s.run(prompts(c, 256, vocab, 7 + i), 101))  # type: ignore[misc]
                peak = mx.get_peak_memory() / 1e9
                yield what | {"side": side.name, "streams": count, "decode": rate, "peak_gb": peak}
        for side in sides if "prefill" in cases else ():
            seconds, _ = median_of(rounds, lambda i, s=side: s.run(prompts(16, 512, vocab, 90 + i), 2))  # type: ignore[misc]
            yield what | {"side": side.name, "prefill": 16 * 512 / seconds}
        for side in sides if "long" in cases else ():
            seconds, _ = median_of(rounds, lambda i, s=side: s.run(prompts(1, 16384, vocab, 50 + i), 2))  # type: ignore[misc]
            yield what | {"side": side.name, "prompt_16k": 16384 / seconds}
        for side in sides if "many-long" in cases else ():
            _, rate = side.run(prompts(32, 8192, vocab, 60), 65)
            yield what | {"side": side.name, "streams": 32, "context": 8192, "decode": rate}
    if "waits" in cases and core is not None and model is not None:
        core = build_core_again(core, model)
        with loaded_left_alone():
            yield what | {"side": "pippin"} | waits(core, vocab, rounds)


def deep(model: nn.Module, kv_dtypes: Sequence[str], rounds: int) -> Iterator[dict[str, Any]]:
    """Decodes over 8 contexts of 32k, with K and V in each of these dtypes, one after the other."""
    for kind in kv_dtypes:
        core = make_core(
            model,
            max_total_tokens=8 * 33024,
            max_running_requests=8,
            chunked_prefill_size=8192,
            disable_radix_cache=True,
            kv_cache_dtype=kind,
        )
        rows = prompts(8, 32768, int(model.args.vocab_size), 80)
        side = Ours(core)
        _, rate = median_of(rounds, lambda _, s=side, r=rows: s.run(r, 101))  # type: ignore[misc]
        yield {"streams": 8, "context": 32768, "kv": kind, "decode": rate, "pool_gb": core.info.pool_bytes / 1e9}
        core._runner.reset()
        del core
        mx.clear_cache()


def make_core_for(model: nn.Module, streams: Sequence[int], graph_rows: int, cases: Sequence[str]) -> EngineCore:
    slots = max(streams) * 400 + 16 * 512 + 64
    if {"long", "waits"} & {*cases}:
        slots = max(slots, 4 * 33500)
    if "many-long" in cases:
        slots = max(slots, 33 * 8500)
    return make_core(
        model,
        max_total_tokens=slots,
        max_running_requests=max(32, *streams),
        context_length=None if LONG & {*cases} else 1024,
        chunked_prefill_size=16384 if "long" in cases else 8192,
        disable_radix_cache=True,
        disable_graph=not graph_rows,
        graph_max_rows=graph_rows or 1,
    )


def build_core_again(core: EngineCore, model: nn.Module) -> EngineCore:
    """The same with a prefix cache, in the memory of the one given."""
    slots, page = core.info.max_total_tokens, core.info.page_size
    core._runner.reset()
    del core
    mx.clear_cache()
    return make_core(
        model, max_total_tokens=min(slots, 70000) // page * page, max_running_requests=32, chunked_prefill_size=2048
    )


def waits(core: EngineCore, vocab: int, rounds: int) -> dict[str, float]:
    """Seconds to first tokens: behind a cached prefix, and of a short prompt behind a long one and that one's own."""
    prefix = prompts(1, 8192, vocab, 1)[0]
    first_tokens(core, {"warm": prefix}, 0)
    cached = [
        first_tokens(core, {f"c{i}": prefix + prompts(1, 64, vocab, 100 + i)[0]}, 0)[f"c{i}"] for i in range(rounds + 1)
    ]
    short, long = [], []
    for i in range(rounds + 1):
        long_prompt, short_prompt = prompts(1, 32768, vocab, 200 + i)[0], prompts(1, 64, vocab, 300 + i)[0]
        found = first_tokens(core, {"long": long_prompt, "short": short_prompt}, 1)
        short.append(found["short"])
        long.append(found["long"])
    return {
        "ttft_behind_8k_cached": statistics.median(cached[1:]),
        "ttft_short_behind_32k": statistics.median(short[1:]),
        "ttft_32k": statistics.median(long[1:]),
    }


def first_tokens(core: EngineCore, rows: dict[str, list[int]], steps_between: int) -> dict[str, float]:
    """Seconds from each one's arrival to its first token; each arrives so many steps after the one before."""
    params = SamplingParams(temperature=0.0, max_new_tokens=2, ignore_eos=True)
    came: dict[str, float] = {}
    found: dict[str, float] = {}
    waiting = list(rows.items())
    while waiting or core.has_work:
        if waiting:
            name, row = waiting.pop(0)
            came[name] = time.perf_counter()
            core.add(Submit(name, list(row), len(row), params))
        for _ in range(steps_between if waiting else 1):
            step = core.step()
            for output in step.outputs if step else ():
                if output.tokens and output.id not in found:
                    found[output.id] = time.perf_counter() - came[output.id]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=["0.6b", "8b"], help="SHAPES, `:4` for 4 bits, `:mxfp4` experts")
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 8, 32, 128])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sides", nargs="+", choices=["pippin", "mlx-lm"], default=["mlx-lm", "pippin"])
    parser.add_argument("--graph-rows", type=int, default=256, help="0: no graphs")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["decode", "prefill"])
    parser.add_argument("--kv-cache-dtypes", nargs="+", default=["auto", "int8"], help="of the case `deep`")
    parser.add_argument("--apart", action="store_true", help="one side after the other, each with all of the memory")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    facts = {"mlx": version("mlx"), "mlx_lm": version("mlx-lm"), "device": mx.device_info().get("device_name")}
    print(json.dumps(facts), flush=True)
    turns = [[side] for side in options.sides] if options.apart else [options.sides]
    for name, names in itertools.product(options.shapes, turns):
        shape, _, codes = name.partition(":")
        for row in measure(
            shape,
            codes,
            streams=options.streams,
            rounds=options.rounds,
            names=names,
            graph_rows=options.graph_rows,
            cases=options.cases,
            kv_dtypes=options.kv_cache_dtypes,
        ):
            print(" ".join(f"{k}={v:.5g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)
            if options.json:
                with options.json.open("a") as file:
                    file.write(json.dumps(facts | row) + "\n")
        gc.collect()
        mx.clear_cache()


if __name__ == "__main__":
    main()
