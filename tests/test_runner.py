"""The runner: works of any cut become the model's own logits, before the host has read what they stand on."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pippin.attention.padded import Padded
from pippin.cache.disk import BLOCK
from pippin.cache.pool import KVPool
from pippin.config import EngineConfig
from pippin.flight import check_slots
from pippin.loading import load_core
from pippin.probe import choose_attention
from pippin.runner import MlxModelRunner
from pippin.types import Batch, Request, RowResult, SamplingParams, Work
from tests.checkpoints import build_model, family_config, make_checkpoint, random_weights

VOCAB = 288
GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)
BACKENDS = ("rows", "padded")
Rig = Callable[..., MlxModelRunner]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    made = build_model(family_config("qwen3", head_dim=16, num_hidden_layers=2))
    made.load_weights(list(random_weights(made, 0).items()))
    mx.eval(made.parameters())
    return made


@pytest.fixture(scope="module")
def rig(model: nn.Module) -> Rig:
    """Makes runners over the one model."""
    choices = {name: choose_attention(model, name, VOCAB) for name in BACKENDS}

    def make(backend: str = "rows", slots: int = 400, vocab_size: int = VOCAB) -> MlxModelRunner:
        choice = choices[backend]
        pool = KVPool(choice.shapes, slots)
        return MlxModelRunner(model, choice.backend, pool, max_running=8, vocab_size=vocab_size)

    return make


def requests_of(lengths: Sequence[int], params: SamplingParams = GREEDY, spare: int = 20) -> list[Request]:
    """Requests of random tokens, whose slots lie everywhere in the pool but 0."""
    source = np.random.default_rng(len(lengths))
    slots = source.permutation(np.arange(1, 1 + sum(lengths) + spare * len(lengths)))
    found = []
    for i, length in enumerate(lengths):
        request = Request(f"r{i}", source.integers(0, VOCAB, length).tolist(), length, params, row=i + 1)
        mine, slots = slots[: length + spare], slots[length + spare :]
        request.slots = array("i", mine.tolist())
        found.append(request)
    return found


def exact(model: nn.Module, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
    """Log probabilities after each of ``tokens``, [n, vocab], by the model alone."""
    logits = model(mx.array([list(tokens)]))[0].astype(mx.float32)
    return np.asarray(logits - mx.logsumexp(logits, axis=-1, keepdims=True))


def whole(request: Request, **changes: object) -> Work:
    return Work(request, 0, len(request.tokens), True, **changes)  # type: ignore[arg-type]


Cuts = list[tuple[int, list[int]]]


@st.composite
def cuts(draw: st.DrawFn) -> Cuts:
    """Sequences, each as its length and the ends of its works; one work of each is in every step."""
    found = []
    for _ in range(draw(st.integers(1, 4))):
        length = draw(st.integers(1, 24))
        inner = draw(st.lists(st.integers(1, length), max_size=3))
        found.append((length, sorted({*inner, length})))
    return found


def steps_of(requests: Sequence[Request], ends: Sequence[list[int]], scored: bool) -> list[Batch]:
    """The works of all requests, a batch a step; ``scored``: prompt logprobs of each token are asked for."""
    found = []
    for at in range(max(map(len, ends))):
        works = []
        for request, mine in zip(requests, ends, strict=True):
            if at < len(mine):
                start = mine[at - 1] if at else 0
                last = at == len(mine) - 1
                works.append(Work(request, start, mine[at], last, start + 1 if scored else None))
        found.append(Batch(tuple(works)))
    return found


@pytest.mark.parametrize("backend", BACKENDS)
@given(cut=cuts())
def test_prompts_cut_in_any_way_give_the_models_tokens_and_logprobs(
    rig: Rig, model: nn.Module, backend: str, cut: Cuts
) -> None:
    params = msgspec.structs.replace(GREEDY, logprobs=True, top_logprobs=2, prompt_logprobs=True)
    requests = requests_of([length for length, _ in cut], params)
    runner = rig(backend)
    told: dict[str, list[RowResult]] = {r.id: [] for r in requests}
    flights = [runner.launch(batch) for batch in steps_of(requests, [ends for _, ends in cut], scored=True)]
    for flight in flights:  # read late, as the engine does
        for work, result in zip(flight.batch.works, flight.read(), strict=True):
            assert (result.token is not None) == work.samples == (result.logprob is not None)
            told[work.request.id].append(result)
    for request in requests:
        expected = exact(model, request.tokens)
        prompt = [p for result in told[request.id] for p in result.prompt_logprobs]
        assert [p.token for p in prompt] == request.tokens
        assert (prompt[0].logprob, prompt[0].top) == (None, [])
        last = told[request.id][-1].logprob
        assert last is not None
        assert expected[-1, last.token] == pytest.approx(expected[-1].max(), abs=1e-4)
        for row, p in enumerate([*prompt[1:], last]):
            assert p.logprob == pytest.approx(expected[row, p.token], abs=2e-4)
            assert [v for _, v in p.top] == pytest.approx(np.sort(expected[row])[::-1][:2], abs=2e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_may_stand_on_tokens_that_nobody_has_read(rig: Rig, backend: str) -> None:
    params = SamplingParams(temperature=1.0, seed=4)
    runner, requests = rig(backend), requests_of([3, 11, 1], params)
    flights = [runner.launch(Batch(tuple(map(whole, requests))))]
    for request in requests:
        request.length += 1
    for _ in range(5):  # each reads one token from the device: the host falls behind by six
        flights.append(runner.launch(Batch(tuple(Work(r, r.length - 1, r.length, True) for r in requests))))
        for request in requests:
            request.length += 1
    ahead = [[result.token for result in flight.read()] for flight in flights]

    runner, requests = rig(backend), requests_of([3, 11, 1], params)
    one_by_one = []
    for at in range(6):
        works = [Work(r, len(r.tokens) - 1 if at else 0, len(r.tokens), True) for r in requests]
        one_by_one.append([result.token for result in runner.launch(Batch(tuple(works))).read()])
        for request, token in zip(requests, one_by_one[-1], strict=True):
            assert token is not None
            request.tokens.append(token)
    assert ahead == one_by_one


def test_each_request_gets_the_logprobs_that_it_asked_for_and_no_others(rig: Rig) -> None:
    requests = requests_of([4, 4, 4, 4])
    wishes = [(False, 0), (True, 0), (True, 3), (True, 100)]
    for request, (logprobs, tops) in zip(requests, wishes, strict=True):
        request.params = msgspec.structs.replace(GREEDY, logprobs=logprobs, top_logprobs=tops)
    results = rig().launch(Batch(tuple(map(whole, requests)))).read()
    assert [r.logprob and len(r.logprob.top) for r in results] == [None, 0, 3, 100]
    assert all(not r.prompt_logprobs for r in results)


def test_ids_that_the_tokenizer_does_not_have_are_never_drawn(rig: Rig) -> None:
    params = SamplingParams(temperature=3.0, seed=1, logprobs=True, top_logprobs=100)
    requests = requests_of([6] * 8, params)
    runner = rig(vocab_size=20)
    for result in runner.launch(Batch(tuple(map(whole, requests)))).read():
        assert result.token is not None
        assert result.token < 20
        assert result.logprob is not None
        assert sorted(t for t, _ in result.logprob.top) == list(range(20))


@pytest.mark.parametrize("fault", ["no row", "too few slots", "scratch", "negative", "beyond the pool"])
def test_slots_outside_of_the_pool_are_found_before_they_are_used(rig: Rig, fault: str) -> None:
    (request,) = requests_of([5], spare=0)
    runner = rig(slots=50)
    before = [np.array(a) for a in runner.pool.arrays]
    match fault:
        case "no row":
            request.row = -1
        case "too few slots":
            request.slots.pop()
        case _:
            request.slots[3] = {"scratch": 0, "negative": -1, "beyond the pool": 50}[fault]
    with pytest.raises(AssertionError, match="r0 was scheduled without"):
        runner.launch(Batch((whole(request),)))
    assert all((np.array(a) == b).all() for a, b in zip(runner.pool.arrays, before, strict=True))


def test_padding_is_written_to_scratch_and_nowhere_else(rig: Rig) -> None:
    runner, requests = rig("padded"), requests_of([2, 9], spare=0)
    runner.launch(Batch(tuple(map(whole, requests)))).read()
    used = {slot for request in requests for slot in request.slots}
    for values in map(np.array, runner.pool.arrays):
        written = {int(slot) for slot in np.flatnonzero(np.abs(values).sum(axis=(1, 2)))}
        assert used <= written <= used | {0}


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_request_without_finite_numbers_is_nobody_elses_trouble(checkpoint: Path, backend: str) -> None:
    """Padding reads the request's own slots, is written to scratch, and scratch is behind everybody's mask."""
    core = load_core(EngineConfig(model_path=str(checkpoint), max_total_tokens=200, attention_backend=backend))
    runner = core._runner
    assert isinstance(runner, MlxModelRunner)
    embedding = runner.model.model.embed_tokens
    embedding.weight = mx.where(mx.arange(VOCAB)[:, None] == 77, mx.nan, embedding.weight)
    bad, *good = requests_of([6, 9, 8], spare=9)  # bad is padded, in one forward with the others
    bad.tokens[1] = 77
    assert 77 not in good[0].tokens + good[1].tokens
    results = runner.launch(Batch(tuple(map(whole, [*good, bad])))).read()
    assert [r.finite for r in results] == [True, True, False]
    lasts = [Work(r, len(r.tokens) - 1, len(r.tokens), True) for r in good]  # no padding that would mend scratch
    again = runner.launch(Batch(tuple(lasts))).read()
    assert [r.finite for r in again] == [True, True]
    assert [r.token for r in again] == [r.token for r in results[:2]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "qwen3", head_dim=16, num_hidden_layers=2)


# --- memory ---


def test_a_reset_forgets_all_and_never_holds_two_pools(rig: Rig) -> None:
    runner, requests = rig(slots=20_000), requests_of([5, 9])
    runner.launch(Batch(tuple(map(whole, requests))))
    mx.synchronize()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    runner.reset()
    assert mx.get_peak_memory() - before < runner.pool.nbytes / 4
    assert not any(np.array(a).any() for a in runner.pool.arrays)
    first = rig().launch(Batch(tuple(map(whole, requests)))).read()
    again = runner.launch(Batch(tuple(map(whole, requests)))).read()
    assert [r.token for r in again] == [r.token for r in first]


@given(st.lists(st.tuples(st.integers(0, 20_000), st.integers(1, 40), st.booleans()), min_size=1, max_size=8))
def test_padded_forwards_pad_little_and_read_what_was_written(shapes: list[tuple[int, int, bool]]) -> None:
    """Works are (start, tokens, whether the prefix is that of the work before, as far as it goes)."""
    works: list[Work] = []
    slot = 1
    for i, (start, count, shares) in enumerate(shapes):
        if shares and works and works[-1].end <= start + count - 1:
            before, start = works[-1].request.slots[: works[-1].end], works[-1].end
        else:
            before, slot = array("i", range(slot, slot + start)), slot + start
        request = Request(str(i), [], 1, GREEDY)
        request.slots = before + array("i", range(slot, slot + count))
        slot += count
        works.append(Work(request, start, start + count, True))
    ran: list[Work] = []
    for part in Padded("padded", grouped=False).forwards(works):
        later = {s for w in works if w not in ran and w not in part for s in w.request.slots[w.start : w.end]}
        assert all(later.isdisjoint(w.request.slots[: w.start]) for w in part)
        rows, contexts = [w.end - w.start for w in part], [w.end for w in part]
        assert len(part) * max(rows) <= 1.5 * sum(rows)
        assert len(part) * max(contexts) <= max(4 * sum(contexts), 1 << 14)
        ran += part
    assert sorted(ran, key=lambda w: w.request.id) == works


def test_a_step_without_anyone_to_sample_for_still_fills_the_pool(rig: Rig, model: nn.Module) -> None:
    runner, (request,) = rig(), requests_of([9])
    assert runner.launch(Batch((Work(request, 0, 6, False),))).read() == [RowResult()]
    (result,) = runner.launch(Batch((Work(request, 6, 9, True),))).read()
    assert result.token == int(exact(model, request.tokens)[-1].argmax())
    assert replace(result, token=None) == RowResult()


@pytest.mark.parametrize("backend", BACKENDS)
def test_long_prompts_run_ahead_of_the_tokens_that_draw(rig: Rig, model: nn.Module, backend: str) -> None:
    """The last layer's attention and MLP are computed for the last tokens only; one token of many is not worth it."""
    runner = rig(backend)
    requests = requests_of([70, 90, 1])
    rows: list[int] = []

    class Counting:
        def __call__(self, tokens: mx.array, cache: list[object]) -> mx.array:
            rows.append(tokens.size)
            out: mx.array = model(tokens, cache=cache)
            return out

    runner.model = Counting()
    flight = runner.launch(Batch(tuple(map(whole, requests))))
    ahead, last = rows[:-1], rows[-1]
    assert (sum(ahead) >= 158, last) == (True, 3)
    for request, result in zip(requests, flight.read(), strict=True):
        assert result.token == exact(model, request.tokens)[-1].argmax()
    rows.clear()
    runner.launch(Batch(tuple(map(whole, requests_of([20, 10]))))).read()
    assert sum(rows) >= 30
    assert rows[-1] != 2


# --- K and V to and from elsewhere ---


@pytest.mark.parametrize(
    ("in_place", "way"), [(False, ""), (True, ""), (False, "copy"), (False, "queue"), (True, "queue")]
)
@pytest.mark.parametrize("page", [1, 4])
def test_slots_that_are_read_and_written_elsewhere_hold_the_same(
    model: nn.Module, in_place: bool, way: str, page: int
) -> None:
    """Both ways there are, the kernels' by page too, which compute the same here in plain MLX."""
    choice = choose_attention(model, "rows", VOCAB)
    runner = MlxModelRunner(model, choice.backend, KVPool(choice.shapes, 200, page), max_running=8, vocab_size=VOCAB)
    request = Request("r", list(range(3, 43)), 40, GREEDY, row=1)
    pages = np.random.default_rng(3).permutation(np.arange(1, 200 // page))[: 60 // page]
    slots = (pages[:, None] * page + np.arange(page)).reshape(-1)
    request.slots = array("i", slots[:40].tolist())
    flight = runner.launch(Batch((Work(request, 0, 39, False),)))
    runner.pool.in_place = in_place
    before = runner._last_token
    rows = [np.array(r) for r in runner.read_slots(request.slots[8:36].tolist())]
    assert [r.dtype for r in rows] == [np.uint32] * 4
    assert (runner._last_token is before) == (not in_place), "the next step waits for the copy"
    flight.read()
    for kept, pool in zip(rows, runner.pool.arrays, strict=True):
        assert np.array_equal(kept.view(np.float32), np.array(pool)[slots[8:36]])
        assert np.abs(kept.view(np.float32)).sum() > 0
    before = runner._last_token
    others = array("i", [s for s in range(page, 200) if s not in set(slots.tolist())][: 28 + page])
    others = array(
        "i", [s for s in others if s // page * page + page - 1 in others and s // page * page in others][:28]
    )
    if way:  # from memory that files are read into: the last 28 tokens of one
        landing = runner.landing(2)
        lines = np.concatenate([np.pad(r, ((BLOCK - 28, 0), (0, 0), (0, 0))).reshape(-1) for r in rows])
        landing[1] = lines.view(np.uint8)
        assert runner._landing is not None
        write = runner._copy_landed if way == "copy" else runner._queue_landed
        write(others, runner._landing, [1], BLOCK - 28)
    else:
        runner.write_slots(others, rows)
    assert (runner._last_token is before) == (not in_place), "the next step waits for the writes"
    request.slots[8:36] = others
    runner.pool.in_place = False
    (result,) = runner.launch(Batch((Work(request, 39, 40, True),))).read()
    assert result.token == int(exact(model, request.tokens)[-1].argmax())
    for slot in (0, -1, 200):
        with pytest.raises(AssertionError, match="without slots of the pool"):
            runner.write_slots([1, slot], rows)
        runner.landing(1)
        with pytest.raises(AssertionError, match="without slots of the pool"):
            runner.write_landed([1, slot], [0], BLOCK - 2)


@pytest.mark.parametrize("count", [1, 63, 64, 300])
def test_slots_outside_of_the_pool_are_refused_before_a_launch(count: int) -> None:
    request = Request("r", [1] * (count + 2), count + 2, SamplingParams(), row=1)
    slots = array("i", [0, *range(1, count + 1), 0])
    work = Work(request, 1, count + 1, True)
    request.slots = slots[:]
    check_slots(work, count + 1)
    for at in {1, count // 2 + 1, count}:
        for wrong in (0, -1, count + 1):
            request.slots = slots[:]
            request.slots[at] = wrong
            with pytest.raises(AssertionError, match="without slots of the pool"):
                check_slots(work, count + 1)
    request.slots = slots[:count]
    with pytest.raises(AssertionError, match="without a row or slots"):
        check_slots(work, count + 1)
