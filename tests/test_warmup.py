"""What is compiled at the start, of kernels' variants and of MLX's functions: all that a first load meets.

The GPU is one whose launches compute nothing, and note what would be compiled for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import pippin.loading
from benchmarks.host import Phantom, phantom_gpu
from pippin import runner
from pippin.core import EngineCore
from pippin.probe import Choice, choose_attention
from pippin.types import SamplingParams
from tests.checkpoints import make_checkpoint
from tests.compiling import Counting
from tests.test_graph import KINDS, load, make_core, serve
from tests.tokenizers_for_tests import byte_level

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 16},
    "gpt_oss": {"head_dim": 16},
    "mixtral": {},
}


@pytest.fixture(params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    tokenizer = byte_level()
    make_checkpoint(tmp_path, request.param, vocab_size=tokenizer.vocab_size + 9, **FAMILIES[request.param])
    tokenizer.hf.save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Phantom]:
    monkeypatch.setattr(runner, "Compiler", Counting)
    with phantom_gpu() as phantom:
        yield phantom


def core_of(path: Path, monkeypatch: pytest.MonkeyPatch, gpu: Phantom, **options: object) -> EngineCore:
    """An engine on that GPU, of a model that was looked at without it: there its logits mean something."""

    def choose(*args: object) -> Choice:
        with pytest.MonkeyPatch.context() as without:
            without.setattr("pippin.kernels.backend", lambda: None)
            return choose_attention(*args, fuse=True)  # type: ignore[arg-type]

    monkeypatch.setattr(pippin.loading, "choose_attention", choose)
    wanted = {"max_running_requests": 64, "max_total_tokens": 20_000, "chunked_prefill_size": 512}
    return make_core(path, **{**wanted, **options})


def test_a_first_load_compiles_nothing(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, gpu: Phantom) -> None:
    """64 streams that come together, prompts of mixed lengths, and every way to draw: no trace, no kernel's variant."""
    core = core_of(checkpoint, monkeypatch, gpu)
    known = set(gpu.variants)
    assert len(known) > 8
    serve(core, load(1, 66, [SamplingParams(max_new_tokens=9, ignore_eos=True)], longest=130, each=64))
    serve(core, load(2, 60, list(KINDS.values()), longest=200, each=30))
    assert core.stats.graph_traces == 0
    assert [(v[0].name, v[2]) for v in gpu.variants - known] == []
    names = {source.name for source, *_ in known}
    assert {"paged_decode", "paged_extend", "kv_gather", "kv_write"} <= {n.partition("_mma")[0] for n in names}
    assert mx.default_device() == mx.Device(mx.cpu)
