"""LoRA: an adapter's tokens are those of the model it was merged into, whoever else is in the batch."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model

from pippin.config import EngineConfig
from pippin.core import EngineCore
from pippin.errors import ConfigError, RequestError
from pippin.estimate import as_text, estimate
from pippin.messages import LoadAdapter, Submit, UnloadAdapter
from pippin.models.deferred import Fusions
from pippin.models.seam import Adapted, Seam
from pippin.probe import choose_attention
from pippin.types import Pooling, SamplingParams
from tests import cores
from tests.checkpoints import make_checkpoint
from tests.cores import drain, make_core, prompts

GREEDY = SamplingParams(temperature=0.0, max_new_tokens=10, ignore_eos=True)
LAYERS = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
SCALE = 1.5

Deltas = dict[str, tuple[mx.array, mx.array]]


def draw(path: Path, seed: int, layers: Sequence[str] = LAYERS, rank: int = 4) -> Deltas:
    """For each layer that ends in one of ``layers``: a [in, rank] and b [rank, out], large enough to change answers."""
    weights: Any = mx.load(str(path / "model.safetensors"))
    found: Deltas = {}
    for name, value in weights.items():
        if any(name.endswith(f"{layer}.weight") for layer in layers):
            keys = mx.random.key(seed + len(found)), mx.random.key(1000 + seed + len(found))
            a = mx.random.normal((value.shape[1], rank), key=keys[0]) / value.shape[1] ** 0.5
            found[name.removesuffix(".weight")] = a, mx.random.normal((rank, value.shape[0]), key=keys[1])
    assert found
    return found


def as_mlx(path: Path, deltas: Deltas) -> Path:
    path.mkdir()
    settings = {"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": {"rank": 4, "scale": SCALE}}
    (path / "adapter_config.json").write_text(json.dumps(settings))
    arrays = {f"{n}.lora_a": a for n, (a, _) in deltas.items()} | {f"{n}.lora_b": b for n, (_, b) in deltas.items()}
    mx.save_safetensors(str(path / "adapters.safetensors"), arrays)
    return path


def as_peft(path: Path, deltas: Deltas, **more: Any) -> Path:
    path.mkdir()
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 4 * SCALE, "bias": "none"} | more
    (path / "adapter_config.json").write_text(json.dumps(settings))
    arrays = {f"base_model.model.{n}.lora_A.weight": a.T for n, (a, _) in deltas.items()}
    arrays |= {f"base_model.model.{n}.lora_B.weight": b.T for n, (_, b) in deltas.items()}
    mx.save_safetensors(str(path / "adapter_model.safetensors"), arrays)
    return path


def merged(path: Path, into: Path, deltas: Deltas) -> Path:
    into.mkdir()
    (into / "config.json").write_text((path / "config.json").read_text())
    weights: Any = mx.load(str(path / "model.safetensors"))
    for name, (a, b) in deltas.items():
        weights[f"{name}.weight"] = weights[f"{name}.weight"] + SCALE * (a @ b).T
    mx.save_safetensors(str(into / "model.safetensors"), weights, metadata={"format": "mlx"})
    return into


def submits(rows: Sequence[Sequence[int]], adapter: str | None = None, name: str = "r") -> list[Submit]:
    params = SamplingParams(temperature=0.0, max_new_tokens=10, ignore_eos=True, lora_path=adapter)
    return cores.submits(rows, params, name)


def run(core: EngineCore, asked: Sequence[Submit]) -> dict[str, list[int]]:
    """What each request answered, those that were there before too."""
    found: dict[str, list[int]] = {s.id: [] for s in asked}
    for submit in asked:
        core.add(submit)
    for output in drain(core):
        found.setdefault(output.id, []).extend(output.tokens)
        assert output.finish is None or output.finish.reason == "length", output.finish
    return found


class Case:
    """A model, two adapters in either form, and what each should answer to the same prompts."""

    def __init__(self, root: Path, family: str = "qwen3", layers: Sequence[str] = LAYERS) -> None:
        self.path = make_checkpoint(root / "base", family, head_dim=32)
        deltas = {"one": draw(self.path, 1, layers), "two": draw(self.path, 2, layers)}
        self.adapters = {"one": as_peft(root / "one", deltas["one"]), "two": as_mlx(root / "two", deltas["two"])}
        self.rows = prompts(5, 40, 4)
        self.want: dict[str | None, list[list[int]]] = {
            None: list(run(make_core(self.path), submits(self.rows)).values())
        }
        for name, delta in deltas.items():
            whole = merged(self.path, root / f"merged-{name}", delta)
            self.want[name] = list(run(make_core(whole), submits(self.rows)).values())
        assert self.want[None] != self.want["one"] != self.want["two"]

    @property
    def lora_paths(self) -> list[str]:
        return [f"{name}={path}" for name, path in self.adapters.items()]

    def mixed(self) -> list[Submit]:
        asked = [s for name in self.want for s in submits(self.rows, name, f"{name}-")]
        return random.Random(2).sample(asked, len(asked))

    def check(self, found: dict[str, list[int]]) -> None:
        for name, answers in self.want.items():
            assert [found[f"{name}-{i}"] for i in range(len(self.rows))] == answers, name


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("lora"))


OPTIONS: list[dict[str, Any]] = [
    {},
    {"chunked_prefill_size": 7},
    {"disable_overlap_schedule": True},
    {"disable_radix_cache": True},
    {"page_size": 16, "schedule_policy": "lpm"},
    {"max_total_tokens": 112, "chunked_prefill_size": 9},
    {"attention_backend": "padded", "chunked_prefill_size": 16},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ",".join(f"{k}={v}" for k, v in o.items()) or "default")
def test_a_mixed_batch_answers_as_the_merged_models_do(case: Case, options: dict[str, Any]) -> None:
    core = make_core(case.path, lora_paths=case.lora_paths, **options)
    assert core.info.lora_paths == {name: str(path) for name, path in case.adapters.items()}
    case.check(run(core, case.mixed()))
    before = core.stats.cached_tokens
    case.check(run(core, case.mixed()))  # from the cache, where each adapter has its own
    if not options.get("disable_radix_cache") and "max_total_tokens" not in options:
        assert core.stats.cached_tokens > before
    core.flush()
    assert core.stats.slots_free == core.stats.slots_total


@pytest.mark.parametrize("options", [{}, {"chunked_prefill_size": 7}], ids=["default", "chunks"])
def test_joined_projections_know_of_adapters(
    case: Case, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU puts together, with steps that have adapters in them and steps that have none."""
    monkeypatch.setattr("pippin.loading.choose_attention", partial(choose_attention, fuse=True))
    core = make_core(case.path, lora_paths=case.lora_paths, **options)
    seen: list[tuple[Fusions, bool]] = []

    def counting(
        selected: mx.array | None, fusions: Fusions, pooled: mx.array | None, adapted: Adapted | None, *more: Any
    ) -> Seam:
        seen.append((fusions, adapted is not None))
        return Seam(selected, fusions, pooled, adapted, *more)

    monkeypatch.setattr("pippin.runner.Seam", counting)
    joined = frozenset({("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")})
    case.check(run(core, case.mixed()))
    assert list(run(core, submits(case.rows)).values()) == case.want[None]
    assert set(seen) == {(Fusions(residual=True, joined=joined), adapted) for adapted in (True, False)}


def test_adapters_have_their_memory_in_the_plan(case: Case) -> None:
    sizes = [sum(p.stat().st_size for p in path.glob("*.safetensors")) for path in case.adapters.values()]
    core = make_core(case.path, lora_paths=case.lora_paths)
    assert sum(sizes) - 8192 < core.info.adapter_bytes < sum(sizes)
    config = EngineConfig(model_path=str(case.path), max_total_tokens=2000, lora_paths=case.lora_paths)
    found = estimate(config)
    assert found.plan.adapter_bytes == core.info.adapter_bytes
    alone = estimate(replace(config, lora_paths=None)).plan
    assert found.plan.total_bytes == alone.total_bytes + core.info.adapter_bytes
    assert "adapters" in as_text(found, 100)
    share = (alone.total_bytes + core.info.adapter_bytes // 2) / alone.device_bytes
    assert plan_slots(replace(config, lora_paths=None, mem_fraction_static=share)) == 2000
    with pytest.raises(ConfigError, match="LoRA adapters"):
        plan_slots(replace(config, mem_fraction_static=share))


def plan_slots(config: EngineConfig) -> int:
    return estimate(config).plan.slots


def test_an_adapter_that_comes_later_needs_room(case: Case) -> None:
    core = make_core(case.path)
    adapters = core._adapters
    assert adapters is not None
    assert adapters.room is not None
    assert adapters.room > 0
    adapters.room = 1 << 20
    load = LoadAdapter("c", "one", str(case.adapters["one"]))
    assert core.change_adapters(load).error == ""
    assert adapters.room == (1 << 20) - adapters.find("one").num_bytes
    core.change_adapters(UnloadAdapter("d", "one"))
    assert adapters.room == 1 << 20
    adapters.room = 1000
    changed = core.change_adapters(load)
    assert (changed.adapters, changed.field) == ({}, "lora_path")
    assert "left beside what was planned" in changed.error


@pytest.mark.parametrize("family", ["gemma2", "qwen3_next", "mixtral"])
def test_other_backends(tmp_path: Path, family: str) -> None:
    case = Case(tmp_path, family, ("self_attn.q_proj", "self_attn.o_proj"))
    core = make_core(case.path, lora_paths=case.lora_paths, chunked_prefill_size=16)
    case.check(run(core, case.mixed()))


def test_adapters_share_no_prefix_with_each_other_or_the_model(case: Case) -> None:
    core = make_core(case.path, lora_paths=case.lora_paths)
    row = list(range(3, 60))
    for name in (None, "one", "two"):
        before = core.stats.cached_tokens
        run(core, submits([row], name))
        assert core.stats.cached_tokens == before
        run(core, submits([row], name))
        assert core.stats.cached_tokens == before + len(row) - 1


def test_adapters_come_and_go_while_others_run(case: Case) -> None:
    core = make_core(case.path)
    with pytest.raises(RequestError, match="no LoRA adapter 'one'"):
        core.add(submits(case.rows, "one")[0])
    changed = core.change_adapters(LoadAdapter("c", "one", str(case.adapters["one"])))
    assert (changed.id, changed.error, changed.adapters) == ("c", "", {"one": str(case.adapters["one"])})
    for submit in submits(case.rows, "one", "one-"):
        core.add(submit)
    core.step()
    assert core.change_adapters(UnloadAdapter("d", "one")).adapters == {}
    assert core.change_adapters(LoadAdapter("e", "one", str(case.adapters["two"]))).error == ""
    found = run(core, [*submits(case.rows, "one", "two-"), *submits(case.rows, None, "None-")])
    assert [found[f"two-{i}"] for i in range(len(case.rows))] == case.want["two"], "not the prefixes of the old one"
    assert [found[f"None-{i}"] for i in range(len(case.rows))] == case.want[None]


def test_an_adapter_that_is_unloaded_serves_those_who_have_it(case: Case) -> None:
    core = make_core(case.path, lora_paths=case.lora_paths)
    asked = submits(case.rows, "one", "one-")
    for submit in asked:
        core.add(submit)
    found: dict[str, list[int]] = {s.id: [] for s in asked}
    for turn in range(200):
        if turn == 2:
            core.change_adapters(UnloadAdapter("d", "one"))
        step = core.step() if core.has_work else None
        for output in step.outputs if step else ():
            found[output.id] += output.tokens
    assert [found[s.id] for s in asked] == case.want["one"]


def test_tokens_are_mlx_lms_with_its_own_adapter(case: Case) -> None:
    model, _ = load_model(case.path)
    settings = json.loads((case.adapters["two"] / "adapter_config.json").read_text())
    settings["num_layers"] = len(model.layers)
    settings["lora_parameters"] |= {"dropout": 0.0, "keys": list(LAYERS)}
    (case.adapters["two"] / "adapter_config.json").write_text(json.dumps(settings))
    model = load_adapters(model, str(case.adapters["two"]))
    model.set_dtype(mx.float32)
    for row, want in zip(case.rows, case.want["two"], strict=True):
        assert [int(token) for token, _ in generate_step(mx.array(row), model, max_tokens=10)] == want


def test_vectors_of_an_adapter(case: Case) -> None:
    core = make_core(case.path, lora_paths=case.lora_paths)
    found = []
    for name in (None, "one"):
        submit = submits([case.rows[0]], name)[0]
        core.add(Submit(submit.id, submit.tokens, submit.num_prompt, submit.params, 0, Pooling("last")))
        while core.has_work:
            step = core.step()
            found += [np.frombuffer(o.pooled, "<f4") for o in (step.outputs if step else ()) if o.pooled]
    assert float(np.abs(found[0] - found[1]).max()) > 0.1


def test_rank_and_alpha_by_layer(tmp_path: Path) -> None:
    """PEFT's rank_pattern and alpha_pattern, and rank-stabilised scaling."""
    path = make_checkpoint(tmp_path / "base", "qwen3", head_dim=32)
    deltas = draw(path, 1, ("self_attn.q_proj", "self_attn.v_proj"))
    pattern = {"alpha_pattern": {"q_proj": 12.0}, "lora_alpha": 6.0, "use_rslora": True}
    adapter = as_peft(tmp_path / "one", deltas, **pattern)
    scaled = {n: (a, b * ((6.0 if "q_proj" in n else 3.0) / SCALE)) for n, (a, b) in deltas.items()}  # alpha / sqrt(4)
    want = list(run(make_core(merged(path, tmp_path / "merged", scaled)), submits(prompts(5, 40, 4))).values())
    core = make_core(path, lora_paths=[f"one={adapter}"])
    assert list(run(core, submits(prompts(5, 40, 4), "one")).values()) == want


@pytest.mark.parametrize(
    ("settings", "rename", "said"),
    [
        ({"peft_type": "LOHA"}, "", "LOHA"),
        ({"use_dora": True}, "", "use_dora"),
        ({}, "model.layers.7.self_attn.q_proj", "no linear layer"),
        ({}, "lm_head", "lm_head"),
        ({}, "model.layers.0.mlp.down_proj", "and the model's"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, settings: dict[str, Any], rename: str, said: str) -> None:
    path = make_checkpoint(tmp_path / "base", "qwen3", head_dim=32)
    deltas = draw(path, 1, ("layers.0.self_attn.q_proj",))
    if rename == "lm_head":
        deltas = draw(path, 1, ("lm_head",))
    elif rename:
        deltas = {rename: next(iter(deltas.values()))}
    adapter = as_peft(tmp_path / "one", deltas, **settings)
    with pytest.raises(ConfigError, match=said):
        make_core(path, lora_paths=[f"one={adapter}"])
    core = make_core(path)
    changed = core.change_adapters(LoadAdapter("c", "one", str(adapter)))
    assert said in changed.error
    assert changed.adapters == {}


def test_a_directory_without_an_adapter_is_refused(case: Case) -> None:
    with pytest.raises(ConfigError, match="holds no LoRA adapter"):
        make_core(case.path, lora_paths=[f"one={case.path}"])
    core = make_core(case.path, lora_paths=case.lora_paths)
    assert "loaded already" in core.change_adapters(LoadAdapter("c", "one", "anywhere")).error
    assert core.change_adapters(UnloadAdapter("c", "three")).status == 404
