"""Compiled steps: their inputs, what is compiled and when, and that tokens are those of steps built anew."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any

import mlx.core as mx
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pippin.config import EngineConfig
from pippin.core import EngineCore
from pippin.graph import StepGraphs
from pippin.graph_inputs import StepShape, StepTable, extend_sizes, padded_length, padded_lengths
from pippin.loading import load_core
from pippin.messages import Output, Submit
from pippin.models.lora import Adapter
from pippin.runner import MlxModelRunner
from pippin.sampler_graphs import SamplerGraphs
from pippin.types import Grammar, Request, SamplingParams, Work
from tests.checkpoints import make_checkpoint
from tests.compiling import Counting, play_gpu, traces_of
from tests.tokenizers_for_tests import byte_level

GREEDY = SamplingParams(temperature=0.0, max_new_tokens=12, ignore_eos=True)
HOT = SamplingParams(temperature=0.8, seed=3, max_new_tokens=12, ignore_eos=True)
KINDS = {
    "greedy": GREEDY,
    "random": HOT,
    "top-p": msgspec.structs.replace(HOT, top_p=0.9),
    "top-k": msgspec.structs.replace(HOT, top_k=7),
    "both": msgspec.structs.replace(HOT, top_k=20, top_p=0.8),
    "min-p": msgspec.structs.replace(HOT, min_p=0.05),
    "penalties": msgspec.structs.replace(HOT, repetition_penalty=1.3, frequency_penalty=0.2),
    "greedy penalties": msgspec.structs.replace(GREEDY, presence_penalty=0.7, min_new_tokens=4),
    "bias": msgspec.structs.replace(GREEDY, logit_bias={7: 2.0, 9: -3.0}),
    "logprobs": msgspec.structs.replace(HOT, logprobs=True),
    "top logprobs": msgspec.structs.replace(GREEDY, logprobs=True, top_logprobs=5),
    "grammar": SamplingParams(temperature=0.0, max_new_tokens=12, grammar=Grammar("regex", "[a-f]{9}")),
    "hot grammar": msgspec.structs.replace(HOT, grammar=Grammar("regex", "[^a]{20,}"), ignore_eos=False),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("model")
    tokenizer = byte_level()
    make_checkpoint(path, "qwen3", head_dim=16, num_hidden_layers=2, vocab_size=tokenizer.vocab_size + 9)
    tokenizer.hf.save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    play_gpu(monkeypatch)


def make_core(path: Path, **options: Any) -> EngineCore:
    wanted = {"max_total_tokens": 4000, "context_length": 250, **options}
    return load_core(EngineConfig(model_path=str(path), **wanted))


def runner_of(core: EngineCore) -> MlxModelRunner:
    assert isinstance(core._runner, MlxModelRunner)
    return core._runner


def serve(core: EngineCore, arrivals: list[list[Submit]]) -> dict[str, list[Output]]:
    """Adds each list of requests, lets two steps pass, and goes on until all are done."""
    found: dict[str, list[Output]] = {s.id: [] for some in arrivals for s in some}
    arrivals = list(arrivals)
    for _ in range(3000):
        if not core.has_work and not arrivals:
            return found
        for submit in arrivals.pop(0) if arrivals else []:
            core.add(submit)
        for _ in range(2):
            done = core.step()
            for output in done.outputs if done else []:
                found[output.id].append(output)
    raise AssertionError("it never ends")


def load(seed: int, count: int, params: list[SamplingParams], longest: int = 90, each: int = 3) -> list[list[Submit]]:
    """Requests of mixed lengths, half of which go on from another's prompt, a few at a time."""
    source = np.random.default_rng(seed)
    rows: list[list[int]] = []
    for i in range(count):
        row = source.integers(3, 250, source.integers(1, longest)).tolist()
        rows.append(rows[i // 2][:40] + row if i % 2 else row)
    submits = [Submit(f"s{seed}-{i}", row, len(row), params[i % len(params)]) for i, row in enumerate(rows)]
    return [submits[i : i + each] for i in range(0, count, each)]


def shapes_seen(monkeypatch: pytest.MonkeyPatch) -> list[StepShape]:
    """What steps of all engines made from now on are padded to, if they go through graphs."""
    seen: list[StepShape] = []
    run = StepGraphs.run

    def noted(self: StepGraphs, works: Any, shape: StepShape, last_token: Any) -> Any:
        seen.append(shape)
        return run(self, works, shape, last_token)

    monkeypatch.setattr(StepGraphs, "run", noted)
    return seen


def tokens_of(found: dict[str, list[Output]]) -> dict[str, list[int]]:
    return {id: [t for o in outputs for t in o.tokens] for id, outputs in found.items()}


@pytest.mark.parametrize("page", [1, 16])
@pytest.mark.parametrize("kind", ["greedy", "mixed"])
def test_tokens_are_those_of_steps_built_anew(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, page: int, kind: str
) -> None:
    """Decodes, short prompts behind cached ones, chunks and all of them in one step: float32, each token the same."""
    params = [GREEDY] if kind == "greedy" else list(KINDS.values())
    options = {"page_size": page, "chunked_prefill_size": 48, "max_running_requests": 9}
    arrivals = load(3, 20, params)
    through = make_core(checkpoint, **options)
    steps = shapes_seen(monkeypatch)
    found, anew = serve(through, arrivals), serve(make_core(checkpoint, disable_graph=True, **options), arrivals)
    assert tokens_of(found) == tokens_of(anew)
    logprobs = [[p for outputs in x.values() for o in outputs for p in o.logprobs] for x in (found, anew)]
    assert [(p.token, [t for t, _ in p.top]) for p in logprobs[0]] == [
        (p.token, [t for t, _ in p.top]) for p in logprobs[1]
    ]
    assert [p.logprob for p in logprobs[0]] == pytest.approx([p.logprob for p in logprobs[1]], abs=1e-4)
    kinds = {(bool(s.tiles), s.works > 4) for s in steps}
    assert kinds == {(False, False), (False, True), (True, False), (True, True)}, "all kinds of steps came up"


def test_nothing_is_compiled_once_the_start_has(checkpoint: Path) -> None:
    """Up to 64 rows, prompts of any length, every way to draw, alone and mixed: not one trace more."""
    core = make_core(
        checkpoint, max_running_requests=64, max_total_tokens=12_000, chunked_prefill_size=128, graph_max_tokens=64
    )
    kinds = [msgspec.structs.replace(params, max_new_tokens=5) for params in KINDS.values()]
    serve(core, load(1, 70, kinds[:1], longest=200, each=66))
    serve(core, load(2, 40, kinds, longest=120, each=9))
    for i, params in enumerate(kinds):
        serve(core, load(10 + i, 2, [params]))
    assert core.stats.graph_traces == 0
    serve(core, load(4, 1, [msgspec.structs.replace(GREEDY, logprobs=True, top_logprobs=40)]))
    assert core.stats.graph_traces > 0, "what was not compiled at the start counts"


def test_start_compiles_a_bounded_number_of_functions(checkpoint: Path) -> None:
    """Of shapes a few dozen, and the ways to draw add to them and don't multiply."""
    core = make_core(checkpoint, max_running_requests=256, max_total_tokens=1000, skip_server_warmup=True)
    assert traces_of(core._runner) == 0
    graphs = runner_of(core).graphs
    assert graphs is not None
    assert graphs.extends(40_960) == [], "not known before a layer has attended"
    serve(core, load(1, 2, [GREEDY]))
    assert (len(graphs.decodes(40_960)), len(graphs.extends(40_960))) == (7 * 9, 4 * 8)
    compiler = Counting()
    SamplerGraphs(300, compiler).warm(mx.zeros((4, 309)), mx.zeros(9, mx.int32))
    assert compiler.traces == 3 + 2 + 2 * 5 + 2


def test_steps_that_want_more_than_draws_are_built_anew(checkpoint: Path) -> None:
    core = make_core(checkpoint)
    graphs = runner_of(core).graphs
    assert graphs is not None
    request = Request("a", [5] * 30, 30, GREEDY, row=1)
    request.slots = array("i", range(1, 41))
    long = Request("b", [5] * 300, 300, GREEDY, row=2)
    assert graphs.shape([Work(request, 10, 30, True)]) == StepShape(32, 4, graphs.extends(250)[1][0].tiles)
    assert graphs.shape([Work(request, 10, 30, True, logprobs_from=11)]) is None
    assert graphs.shape([Work(request, 10, 30, False, pools_from=11)]) is None
    assert graphs.shape([Work(long, 0, 257, True)]) is None
    request.adapter = Adapter("a", "a#1", {})
    assert graphs.shape([Work(request, 10, 30, True)]) is None
    assert graphs.shape([Work(request, 30, 31, True)]) is None


# --- the inputs of compiled steps ---


@st.composite
def histories(draw: st.DrawFn) -> list[list[tuple[int, int, int]]]:
    """Steps of works, each (request, start, end): requests go on, wait, come back with other slots, and are others."""
    at = {i: draw(st.integers(0, 30)) for i in range(4)}
    steps = []
    for _ in range(draw(st.integers(1, 12))):
        here = draw(st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True))
        step = []
        for i in here:
            count = draw(st.sampled_from([1, 1, 1, 1, 2, 7]))
            step.append((i, at[i], at[i] + count))
            at[i] += count
        steps.append(step)
    return steps


@given(history=histories(), page=st.sampled_from([1, 4, 16]), changes=st.lists(st.integers(0, 3), max_size=3))
def test_a_table_that_changes_by_what_is_new_is_the_one_made_anew(
    history: list[list[tuple[int, int, int]]], page: int, changes: list[int]
) -> None:
    random = np.random.default_rng(len(history))

    def request(row: int) -> Request:
        made = Request(str(row), [7] * 400, 10, GREEDY, row=row + 1)
        pages = random.permutation(300)[: 400 // page] + 1
        made.slots = array("i", [int(p) * page + i for p in pages for i in range(page)])
        return made

    requests = {i: request(i) for i in range(4)}
    table = StepTable(page)
    for at, step in enumerate(history):
        if at < len(changes):  # a row's request ends, and another one has the row
            requests[changes[at]] = request(changes[at])
        works = [Work(requests[i], start, end, True) for i, start, end in step]
        if all(w.decodes for w in works):
            shape = StepShape(8, 8)
            assert np.array_equal(table.decodes(works, shape), StepTable(page).decodes(works, shape))
        else:
            shape = StepShape(32, 8, 40)
            assert np.array_equal(table.extends(works, shape, 2), StepTable(page).extends(works, shape, 2))


def test_a_request_that_was_away_for_a_step_is_laid_out_anew() -> None:
    """It may have been retracted, and have other slots now."""
    request = Request("a", [7] * 40, 10, GREEDY, row=2)
    request.slots = array("i", range(100, 150))
    table, shape = StepTable(1), StepShape(2, 2)
    table.decodes([Work(request, 20, 21, True)], shape)
    table.forget()
    request.slots[3] = 9
    got = table.decodes([Work(request, 21, 22, True)], shape)
    assert got[5 * 2 :].reshape(2, -1)[0, 3] == 9


def test_compiled_lengths_are_few_and_cover_every_context() -> None:
    assert padded_lengths(40_960) == [256, 512, 1024, 2048, 4096, 16384, 65536]
    assert padded_lengths(40_960, extended=True) == [1024, 4096, 16384, 65536]
    assert padded_lengths(1) == [256]
    for extended in (False, True):
        for tokens in range(1, 70_000, 37):
            least = 1024 if extended else 256
            assert tokens <= padded_length(tokens, extended) <= max(least, 4 * tokens)
            assert padded_length(tokens, extended) in padded_lengths(70_000, extended)


def test_sizes_of_other_steps_are_few_and_cover_what_they_say() -> None:
    assert extend_sizes(0, 64) == []
    assert extend_sizes(64, 3) == [(16, 3), (32, 3), (64, 3)]
    assert extend_sizes(256, 40) == [(16, 4), (32, 4), (64, 4), (64, 64), (128, 4), (128, 64), (256, 4), (256, 64)]
