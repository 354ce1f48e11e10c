"""The engine's core on a real model: the same tokens alone, batched, chunked, cached, retracted and overlapped."""

from __future__ import annotations

import json
import shutil
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model
from tokenizers import Tokenizer, models

from pippin import kernels
from pippin.core import EngineCore
from pippin.errors import RequestError
from pippin.messages import Submit
from pippin.runner import MlxModelRunner
from pippin.types import Finish, SamplingParams
from tests.checkpoints import make_checkpoint
from tests.compiling import play_gpu, traces_of
from tests.cores import (
    GREEDY,
    collect,
    drain,
    greedy_by_mlx_lm,
    make_core,
    prompts,
    replace_params,
    run,
    submits,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("model")
    make_checkpoint(path, "qwen3", head_dim=32)
    return path


@pytest.fixture
def core(checkpoint: Path) -> EngineCore:
    return make_core(checkpoint)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"chunked_prefill_size": 7},
    {"chunked_prefill_size": 1},
    {"disable_overlap_schedule": True},
    {"disable_radix_cache": True},
    {"page_size": 16},
    {"max_running_requests": 2},
    {"max_total_tokens": 104},
    {"max_total_tokens": 104, "page_size": 4, "chunked_prefill_size": 9, "schedule_policy": "lpm"},
    {"attention_backend": "padded"},
    {"attention_backend": "padded", "chunked_prefill_size": 7, "disable_overlap_schedule": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ",".join(f"{k}={v}" for k, v in o.items()) or "default")
def test_tokens_are_mlx_lms_whatever_the_schedule(checkpoint: Path, options: dict[str, Any]) -> None:
    small = "max_total_tokens" in options
    count = 40 if small else 12
    params = replace_params(GREEDY, max_new_tokens=count)
    rows = prompts(9)
    expected = {f"r{i}": greedy_by_mlx_lm(checkpoint, row, count) for i, row in enumerate(rows)}
    core = make_core(checkpoint, **options)
    assert run(core, submits(rows, params)) == expected
    assert run(core, submits(rows, params)) == expected, "the second time, from the cache"
    if not small and "disable_radix_cache" not in options:
        assert core.stats.cached_tokens > 0
    if small:
        assert core.stats.retractions > 0, "the pool was to be too small for all of them"
    core.flush()
    assert core.stats.slots_free == core.stats.slots_total


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``play_gpu`` says."""
    play_gpu(monkeypatch)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("options", [{}, {"page_size": 8}, {"graph_max_rows": 4}, {"disable_graph": True}], ids=str)
def test_tokens_are_the_same_where_rows_read_the_pool_by_page(checkpoint: Path, options: dict[str, Any]) -> None:
    rows = prompts(9)
    core = make_core(checkpoint, chunked_prefill_size=16, **options)
    assert run(core, submits(rows)) == {f"r{i}": greedy_by_mlx_lm(checkpoint, row, 12) for i, row in enumerate(rows)}
    runner = core._runner
    assert isinstance(runner, MlxModelRunner)
    assert (runner.graphs is not None) == ("disable_graph" not in options)
    assert runner.graphs is None or traces_of(runner) > 4


@pytest.mark.usefixtures("as_on_a_gpu")
def test_nobody_reads_in_one_launch_what_another_row_writes_there(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt's last token is shared as it is scheduled: it must be written before whoever reads it attends."""
    fused: list[set[int]] = []
    decode = kernels.paged_decode

    def seen(*args: Any, **kwargs: Any) -> mx.array:
        if kwargs["new"] is not None:
            fused.append(set(np.asarray(kernels.reference.newest_slots(args[3], args[4], 1)).tolist()))
            table, lengths = np.asarray(args[3]), np.asarray(args[4]).tolist()
            read = [{int(s) for s in line[: n - 1]} for line, n in zip(table, lengths, strict=True) if n]
            assert not fused[-1] & set().union(*read)
        return decode(*args, **kwargs)

    monkeypatch.setattr("pippin.attention.rows.paged_decode", seen)
    core = make_core(checkpoint)
    run(core, [Submit("prefix", [5, 6], 2, replace_params(GREEDY, max_new_tokens=1))])
    rows = [[5, 6, 7], [5, 6, 7, 8]]  # both have one token to compute, and the second reads the first's
    found = run(core, submits(rows))
    assert found == {f"r{i}": greedy_by_mlx_lm(checkpoint, row, 12) for i, row in enumerate(rows)}
    assert fused, "decodes store as they attend"


@pytest.mark.usefixtures("as_on_a_gpu")
def test_graphs_sample_as_single_steps_do(checkpoint: Path) -> None:
    rows = prompts(5)
    kinds = [
        SamplingParams(temperature=0.9, top_p=0.9, max_new_tokens=10, ignore_eos=True, seed=7),
        SamplingParams(temperature=0.7, top_k=9, repetition_penalty=1.4, max_new_tokens=10, ignore_eos=True, seed=8),
        SamplingParams(temperature=1.2, min_p=0.1, min_new_tokens=9, max_new_tokens=10, stop_token_ids=(5,), seed=9),
        SamplingParams(temperature=0.0, logprobs=True, top_logprobs=3, max_new_tokens=10, ignore_eos=True),
        SamplingParams(temperature=1.0, frequency_penalty=0.5, logit_bias={7: 3.0}, max_new_tokens=10, seed=10),
    ]
    asked = [Submit(f"r{i}", row, len(row), kind) for i, (row, kind) in enumerate(zip(rows, kinds, strict=True))]
    found = collect(make_core(checkpoint), asked)
    single = collect(make_core(checkpoint, disable_graph=True), asked)
    assert found.keys() == single.keys()
    for id, outputs in found.items():
        assert [t for o in outputs for t in o.tokens] == [t for o in single[id] for t in o.tokens]
        mine, theirs = ([p for o in x for p in o.logprobs] for x in (outputs, single[id]))
        assert [(p.token, [t for t, _ in p.top]) for p in mine] == [(p.token, [t for t, _ in p.top]) for p in theirs]


def test_sampled_tokens_do_not_depend_on_company_or_schedule(checkpoint: Path) -> None:
    rows = prompts(6)
    params = SamplingParams(temperature=0.9, top_p=0.9, top_k=40, max_new_tokens=10, ignore_eos=True, seed=7)
    alone: dict[str, list[int]] = {}
    for submit in submits(rows, params):
        alone |= run(make_core(checkpoint), [submit])
    assert run(make_core(checkpoint, chunked_prefill_size=5), submits(rows, params)) == alone
    assert run(make_core(checkpoint, max_total_tokens=80), submits(rows, params)) == alone
    assert len({tuple(tokens) for tokens in alone.values()}) > 1


def test_a_resumed_stream_goes_on_as_it_would_have(core: EngineCore, checkpoint: Path) -> None:
    params = SamplingParams(temperature=1.0, max_new_tokens=12, ignore_eos=True, seed=3, repetition_penalty=1.3)
    (row,) = prompts(1)
    whole = run(core, [Submit("a", row, len(row), params)])["a"]
    rest = run(make_core(checkpoint), [Submit("b", row + whole[:5], len(row), params)])["b"]
    assert whole[5:] == rest


def test_requests_that_come_and_go_do_not_disturb_others_nor_stop_the_overlap(checkpoint: Path) -> None:
    rows = prompts(12)
    expected = {f"r{i}": greedy_by_mlx_lm(checkpoint, row, 12) for i, row in enumerate(rows)}
    core = make_core(checkpoint, max_running_requests=4)
    found: dict[str, list[int]] = {f"r{i}": [] for i in range(12)}
    waiting = submits(rows)
    steps = 0
    while core.has_work or waiting:
        if waiting and steps % 2 == 0:
            core.add(waiting.pop(0))
        if steps == 9:
            core.abort("r2")
        step = core.step()
        steps += 1
        for output in step.outputs if step else ():
            found[output.id] += output.tokens
    aborted = found.pop("r2")
    assert aborted == expected.pop("r2")[: len(aborted)]
    assert found == expected
    stats = core.stats
    assert stats.overlapped_steps >= stats.steps - 2, "someone was running all the time"


def test_follow_up_turns_reread_only_what_is_new(core: EngineCore) -> None:
    history, known = prompts(1)[0], 0
    for turn in range(5):
        outputs = collect(core, [Submit(f"t{turn}", history, len(history), GREEDY)])[f"t{turn}"]
        if turn:
            assert outputs[-1].num_cached == known - 1, "all but the answer's last token, which nothing was drawn from"
        history = history + [t for o in outputs for t in o.tokens]
        known = len(history)
        history = history + prompts(1, seed=turn)[0]


def test_a_shared_prefix_is_computed_once_even_by_those_who_come_together(core: EngineCore) -> None:
    prefix = prompts(1, 300, seed=1)[0]
    rows = [[*prefix, 10 + i, 20 + i] for i in range(16)]
    run(core, submits(rows))
    assert core.stats.prefill_tokens <= len(prefix) + 2 * 16


@pytest.mark.parametrize("backend", ["rows", "padded"])
def test_who_needs_one_token_beyond_a_prefix_of_the_same_step_reads_it_after_it_is_written(
    checkpoint: Path, backend: str
) -> None:
    """A step of several forwards must not run the short work before the long one that computes its prefix."""
    whole = prompts(1, 60, seed=1)[0]
    rows = [whole, [*whole[:20], 9], [*whole[:30], 8]]
    expected = {f"r{i}": greedy_by_mlx_lm(checkpoint, row, 12) for i, row in enumerate(rows)}
    assert run(make_core(checkpoint, attention_backend=backend), submits(rows)) == expected


@pytest.mark.parametrize("backend", ["rows", "padded"])
def test_who_goes_on_from_anothers_last_prompt_token_reads_it_after_it_is_written(
    checkpoint: Path, backend: str
) -> None:
    """Prompts that run ahead of their last tokens must not, where a prompt of the step stands on such a token."""
    whole = prompts(1, 120, seed=2)[0]
    found = collect(
        make_core(checkpoint, attention_backend=backend),
        submits([whole[:2], whole], replace_params(GREEDY, logprobs=True, max_new_tokens=1)),
    )
    model, _ = load_model(checkpoint)
    model.set_dtype(mx.float32)
    for id, row in ("r0", whole[:2]), ("r1", whole):
        logits = model(mx.array([row]))[0, -1]
        told = found[id][0].logprobs[0]
        assert told.logprob == pytest.approx((logits - mx.logsumexp(logits))[told.token].item(), abs=1e-5)


def test_prompt_and_output_logprobs_are_the_models(core: EngineCore, checkpoint: Path) -> None:
    params = replace_params(GREEDY, logprobs=True, top_logprobs=3, prompt_logprobs=True)
    rows = prompts(3, 40)
    run(core, submits(rows))  # a cached prefix must not hide prompt logprobs
    found = collect(core, submits(rows, params, "p"))
    model, _ = load_model(checkpoint)
    model.set_dtype(mx.float32)
    for i, row in enumerate(rows):
        outputs = found[f"p{i}"]
        reported = [p for o in outputs for p in o.prompt_logprobs] + [p for o in outputs for p in o.logprobs]
        tokens = row + [t for o in outputs for t in o.tokens]
        logits = model(mx.array([tokens]))[0].astype(mx.float32)
        exact = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        assert [p.token for p in reported] == tokens
        assert reported[0].logprob is None
        for at, p in enumerate(reported[1:]):
            assert p.logprob == pytest.approx(exact[at, p.token].item(), abs=2e-4)
            assert len(p.top) == 3
            assert p.top[0][1] == pytest.approx(exact[at].max().item(), abs=2e-4)


def test_the_tokenizers_end_ends_an_answer_too_and_ids_that_it_skips_are_still_drawn(
    checkpoint: Path, tmp_path: Path
) -> None:
    """config.json may name another end, or none, and a vocabulary may have holes: its size is no highest id."""
    row = prompts(1)[0]
    whole = greedy_by_mlx_lm(checkpoint, row, 12)
    end = max(whole)
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    known = {f"t{i}": i for i in {*whole, *row}}
    vocabulary = models.WordLevel({**{t: i for t, i in known.items() if i != end}, "<end>": end}, unk_token="t0")
    Tokenizer(vocabulary).save(str(tmp_path / "tokenizer.json"))
    for eos in ("<end>", {"content": "<end>"}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
        core = make_core(tmp_path)
        assert core.info.eos_token_ids == [2, end]
        found = collect(core, [Submit("a", row, len(row), replace_params(GREEDY, ignore_eos=False))])["a"]
        assert [t for o in found for t in o.tokens] == whole[: whole.index(end) + 1]
        assert found[-1].finish == Finish("stop", end)


@pytest.mark.parametrize("overlap", [True, False])
def test_stop_tokens_end_a_request_and_its_slots_come_back(checkpoint: Path, overlap: bool) -> None:
    core = make_core(checkpoint, disable_overlap_schedule=not overlap)
    row = prompts(1)[0]
    whole = run(core, [Submit("a", row, len(row), GREEDY)])["a"]
    stop = whole[4]
    params = replace_params(GREEDY, stop_token_ids=(stop,))
    outputs = collect(core, [Submit("b", row, len(row), params)])["b"]
    finish = outputs[-1].finish
    assert finish is not None
    assert (finish.reason, finish.matched) == ("stop", stop)
    assert [t for o in outputs for t in o.tokens] == whole[: whole.index(stop) + 1]
    later = replace_params(params, min_new_tokens=9)
    assert len(run(core, [Submit("c", row, len(row), later)])["c"]) >= 9


@pytest.mark.parametrize(
    ("tokens", "message"),
    [([], "empty"), ([5, 999], "token id 999 is not in the vocabulary"), ([-1], "-1"), ([5] * 300, "context length")],
)
def test_prompts_that_cannot_be_served_are_refused_by_name(core: EngineCore, tokens: list[int], message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        core.add(Submit("x", tokens, len(tokens), GREEDY))
    assert caught.value.field == "prompt"
    assert not core.has_work


def test_peak_memory_over_200_overlapped_steps_is_less_than_a_pool_array_above_its_start(checkpoint: Path) -> None:
    core = make_core(checkpoint, max_total_tokens=60_000, max_running_requests=4)
    runner = core._runner
    assert isinstance(runner, MlxModelRunner)
    array_bytes = min(a.nbytes for a in runner.pool.arrays)
    params = replace_params(GREEDY, max_new_tokens=200)
    for submit in submits([[7, 8, 9]] * 4, params):
        core.add(submit)
    for _ in range(5):
        core.step()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    for _ in drain(core):
        pass
    assert core.stats.overlapped_steps > 190
    assert mx.get_peak_memory() - before < array_bytes


def test_the_cache_can_be_emptied_once_the_last_answer_is_out_though_a_step_is_in_flight(core: EngineCore) -> None:
    row = prompts(1)[0]
    whole = run(core, [Submit("a", row, len(row), GREEDY)])["a"]
    stop = whole[3]
    core.add(Submit("b", row, len(row), replace_params(GREEDY, stop_token_ids=(stop,))))
    with pytest.raises(RequestError, match="while requests run"):
        core.flush()
    next(output for output in drain(core) if output.finish)
    assert core.has_work, "the next step was queued before the stop token was read"
    core.flush()
    assert core.stats.slots_free == core.stats.slots_total
    list(drain(core))
    assert run(core, [Submit("c", row, len(row), GREEDY)])["c"] == whole


Row = Callable[[int], list[int]]


@pytest.mark.parametrize("new_tokens", [1, 3])
def test_distinct_requests_leave_memory_flat(checkpoint: Path, new_tokens: int) -> None:
    core = make_core(checkpoint)
    params = replace_params(GREEDY, max_new_tokens=new_tokens)

    def batch(at: int) -> None:
        rows = [[3 + (at * 8 + i) % 250, 3 + (at * 8 + i) // 250, *range(20, 50)] for i in range(8)]
        run(core, submits(rows, params))

    for at in range(4):
        batch(at)
    before = mx.get_active_memory()
    for at in range(4, 24):
        batch(at)
    assert mx.get_active_memory() <= before * 1.01 + 4096


# --- faults that SGLang's MLX loop had ---


def test_it_starts_with_every_optional_part_absent(checkpoint: Path) -> None:
    """SGLang's loop failed at start-up whenever a part that it took for granted was not there."""
    absent = {"disable_radix_cache": True, "disable_overlap_schedule": True, "disable_graph": True}
    for parts in ({}, *({name: True} for name in absent), absent):
        core = make_core(checkpoint, **parts)
        assert run(core, submits([[5, 6, 7]]))["r0"] == greedy_by_mlx_lm(checkpoint, [5, 6, 7], 12)


@pytest.mark.parametrize("overlap", [True, False])
def test_the_relay_of_tokens_exists_in_both_modes(checkpoint: Path, overlap: bool) -> None:
    """The newest token of each row is on the device after every step, whether or not the host reads it first."""
    core = make_core(checkpoint, disable_overlap_schedule=not overlap)
    runner = core._runner
    assert isinstance(runner, MlxModelRunner)
    rows = prompts(3)
    for submit in submits(rows):
        core.add(submit)
    expected = [greedy_by_mlx_lm(checkpoint, row, 12) for row in rows]
    for at in range(10):
        core.step()
        relayed: list[int] = np.asarray(runner._last_token)[1:4].tolist()
        assert sorted(relayed) == sorted(e[at] for e in expected)


def test_a_prefills_inputs_are_materialized_before_launch(checkpoint: Path) -> None:
    """What the host does with a request after its step is queued does not reach that step."""
    core = make_core(checkpoint)
    row = prompts(1)[0]
    core.add(Submit("r", row, len(row), GREEDY))
    core.step()
    flight = core._in_flight
    assert flight is not None
    (work,) = flight.batch.works
    kept = list(work.request.tokens)
    work.request.tokens[:] = [9] * len(kept)
    slots, work.request.slots = work.request.slots, array("i", [1]) * len(work.request.slots)
    (result,) = flight.read()
    assert result.token == greedy_by_mlx_lm(checkpoint, row, 1)[0]
    work.request.tokens[:] = kept
    work.request.slots = slots
    core.abort("r")


def test_finishing_and_joining_do_not_stop_the_overlap(checkpoint: Path) -> None:
    """Every step but the first is built before the one before is read, while others come, go and wait."""
    core = make_core(checkpoint, max_running_requests=2)
    for i, row in enumerate(prompts(6)):
        core.add(Submit(f"r{i}", row, len(row), replace_params(GREEDY, max_new_tokens=3 + 2 * i)))
    for _ in drain(core):
        pass
    assert core.stats.num_waiting == 0
    assert core.stats.overlapped_steps >= core.stats.steps - 2
