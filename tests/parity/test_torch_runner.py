"""TorchModelRunner and MlxModelRunner draw the same tokens through the same scheduler, however work is cut."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from pippin.config import EngineConfig
from pippin.core import EngineCore
from pippin.errors import ConfigError, ModelError
from pippin.loading import load_core
from pippin.messages import Output, Submit
from pippin.torch.runner import TorchModelRunner
from pippin.types import Grammar, SamplingParams
from tests.checkpoints import FAMILIES, make_checkpoint
from tests.parity.reference import build_reference

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "chunks": {"chunked_prefill_size": 7},
    "single tokens": {"chunked_prefill_size": 1},
    "pages": {"page_size": 8, "chunked_prefill_size": 20},
    "no cache": {"disable_radix_cache": True},
    "few rows": {"max_running_requests": 2},
    "few slots": {"max_total_tokens": 104, "chunked_prefill_size": 30},
}


SCHEMA = json.dumps({"type": "object", "properties": {"side": {"enum": ["left", "right"]}}, "required": ["side"]})


def core_of(path: Path | str | None, device: str, **options: Any) -> EngineCore:
    options = {"max_total_tokens": 2000, "dtype": "float32", **options}
    return load_core(EngineConfig(model_path=None if path is None else str(path), device=device, **options))


def submits(vocab: int, count: int = 8, longest: int = 60) -> list[Submit]:
    """Prompts of all lengths, some of which begin alike; greedy and sampled with filters, penalties and logprobs."""
    source = random.Random(11)
    stem = [source.randrange(3, vocab) for _ in range(24)]
    ways = [
        SamplingParams(temperature=0.0, max_new_tokens=40, ignore_eos=True),
        SamplingParams(temperature=1.0, seed=5, max_new_tokens=40, ignore_eos=True),
        SamplingParams(temperature=0.8, top_p=0.9, top_k=40, seed=6, max_new_tokens=40, ignore_eos=True),
        SamplingParams(
            temperature=0.0, repetition_penalty=1.3, max_new_tokens=40, ignore_eos=True, logprobs=True, top_logprobs=2
        ),
    ]
    found = []
    for i in range(count):
        own = [source.randrange(3, vocab) for _ in range(source.randrange(1, longest - 24))]
        prompt = stem + own if i % 2 else own
        found.append(Submit(f"r{i}", prompt, len(prompt), ways[i % len(ways)]))
    return found


def run(core: EngineCore, asked: Sequence[Submit], reason: str = "length") -> dict[str, list[Output]]:
    found: dict[str, list[Output]] = {s.id: [] for s in asked}
    for submit in asked:
        core.add(submit)
    for _ in range(3000):
        if not core.has_work:
            break
        step = core.step()
        for output in step.outputs if step else ():
            found[output.id].append(output)
    reasons = {outputs[-1].finish and outputs[-1].finish.reason for outputs in found.values()}
    assert reasons == ({"stop", "length"} if reason == "any" else {reason})
    return found


def tokens(found: dict[str, list[Output]]) -> dict[str, list[int]]:
    return {id: [t for o in outputs for t in o.tokens] for id, outputs in found.items()}


@pytest.fixture(scope="module")
def expected() -> dict[str, list[int]]:
    return tokens(run(core_of(None, "cpu"), submits(4000)))


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_the_demo_models_tokens_are_mlxs(expected: dict[str, list[int]], options: dict[str, Any]) -> None:
    core = core_of(None, "torch:cpu", **options)
    assert isinstance(core._runner, TorchModelRunner)
    asked = submits(4000)
    assert tokens(run(core, asked)) == expected
    assert tokens(run(core, asked)) == expected, "the second time, from the cache"
    stats = core.stats
    assert (stats.cached_tokens == 0) == ("disable_radix_cache" in options)
    assert (stats.retractions > 0) == (options.get("max_total_tokens") == 104)
    core.flush()
    assert core.stats.slots_free == core.stats.slots_total


# transformers unpacks a gpt-oss's mxfp4 with accelerate only, and mlx-lm reads no other form of one.
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gpt_oss"])
def test_a_familys_tokens_are_mlxs(family: str, tmp_path: Path) -> None:
    path = build_reference(tmp_path, family).path
    asked = submits(288, count=4)
    ours, torchs = (run(core_of(path, d, chunked_prefill_size=16), asked) for d in ("cpu", "torch:cpu"))
    assert tokens(torchs) == tokens(ours)


def test_log_probabilities_are_mlxs() -> None:
    params = SamplingParams(
        temperature=0.0, max_new_tokens=6, ignore_eos=True, logprobs=True, top_logprobs=3, prompt_logprobs=True
    )
    asked = [Submit(s.id, s.tokens, s.num_prompt, params) for s in submits(4000, count=4)]
    ours, torchs = (run(core_of(None, d, chunked_prefill_size=11), asked) for d in ("cpu", "torch:cpu"))
    for id, outputs in ours.items():
        for name in ("logprobs", "prompt_logprobs"):
            mine, its = ([p for o in side for p in getattr(o, name)] for side in (outputs, torchs[id]))
            assert [p.token for p in its] == [p.token for p in mine]
            assert [p.logprob for p in its[1:]] == pytest.approx([p.logprob for p in mine[1:]], abs=1e-4)
            assert [[t for t, _ in p.top] for p in its] == [[t for t, _ in p.top] for p in mine]


def test_answers_with_a_grammar_are_mlxs() -> None:
    """Draws wait for their masks, forced tokens skip steps; requests without a grammar run beside."""
    asked = []
    for i, s in enumerate(submits(4000)):
        grammar = Grammar("json_schema", SCHEMA) if i % 3 else None
        asked.append(Submit(s.id, s.tokens, s.num_prompt, msgspec.structs.replace(s.params, grammar=grammar)))
    ours, torchs = (run(core_of(None, d, chunked_prefill_size=16), asked, "any") for d in ("cpu", "torch:cpu"))
    assert tokens(torchs) == tokens(ours)


def test_what_is_said_of_it() -> None:
    info = core_of(None, "torch:cpu").info
    ours = core_of(None, "cpu").info
    assert (info.device, info.dtype, info.attention_backend) == ("torch:cpu", "float32", "transformers (sdpa)")
    for name in ("model_path", "tokenizer_path", "model_type", "vocab_size", "context_length", "eos_token_ids"):
        assert getattr(info, name) == getattr(ours, name)
    assert info.pool_bytes == (info.max_total_tokens + 1) * (ours.pool_bytes // (ours.max_total_tokens + 1))
    assert info.weight_bytes == ours.weight_bytes


def test_a_step_that_fails_leaves_an_engine_that_works(
    expected: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    core = core_of(None, "torch:cpu")
    asked = submits(4000)
    with monkeypatch.context() as broken:
        broken.setattr("pippin.torch.runner.lay_out", lambda *_: 1 / 0)
        core.add(asked[0])
        found = [output for step in iter(core.step, None) for output in step.outputs]  # again, alone, and then no more
        assert found[-1].finish is not None
        assert found[-1].finish.reason == "error"
    assert tokens(run(core, asked)) == expected


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"quantization": "mlx_q4"}, "--quantization"),
        ({"attention_backend": "padded"}, "--attention-backend"),
        ({"max_total_tokens": 10**12}, "--max-total-tokens"),
    ],
)
def test_options_that_torch_has_no_use_for_are_refused(options: dict[str, Any], flag: str) -> None:
    with pytest.raises(ConfigError, match=flag):
        core_of(None, "torch:cpu", **options)


@pytest.mark.parametrize("device", ["torch:cuda", "torch:mps"])
def test_a_device_that_is_not_there_is_refused(device: str) -> None:
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        pytest.skip("this machine has it")
    with pytest.raises(ConfigError, match=r"PyTorch sees no (CUDA|MPS) here"):
        core_of(None, device)


def test_a_checkpoint_in_mlxs_quantization_is_refused(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "qwen3", quantization={"group_size": 64, "bits": 4})
    with pytest.raises(ModelError, match="quantized for MLX"):
        core_of(path, "torch:cpu")
