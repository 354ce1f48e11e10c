"""Works that are cut for attention: nothing of them is lost, few shapes are left, tokens are those of whole ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pippin.inputs import row_step
from pippin.pieces import Pieces
from pippin.types import Work
from tests.checkpoints import make_checkpoint
from tests.compiling import play_gpu
from tests.cores import GREEDY, collect, make_core, prompts, submits
from tests.test_inputs import LAST, expected_tokens, work

FEW = Pieces(8, planned=True)  # so works are cut at multiples of 16, up to a context of 512


@contextmanager
def cut_as(pieces: Pieces) -> Iterator[None]:
    """As on a machine whose attention wants works cut so."""
    with mock.patch.object(Pieces, "of", staticmethod(lambda several: pieces)):
        yield


@st.composite
def chunks(draw: st.DrawFn) -> list[Work]:
    """Chunks of all lengths, some of which have more than their last row asked for."""
    shapes = draw(
        st.lists(st.tuples(st.sampled_from([0, 0, 5, 32, 40, 200]), st.integers(1, 300), st.booleans()), min_size=1)
    )
    made = [work(i, start, count, False) for i, (start, count, _) in enumerate(shapes)]
    return [w._replace(logprobs_from=1 if asks else None) for w, (_, _, asks) in zip(made, shapes, strict=True)]


@given(chunks())
def test_pieces_are_all_of_each_work_in_few_shapes(works: list[Work]) -> None:
    pieces = FEW.parts(works)
    for i, w in enumerate(works):
        mine = sorted((p for n, p in pieces if n == i), key=lambda p: p.start)
        assert [p.start for p in mine] == [w.start, *(p.end for p in mine[:-1])]
        assert mine[-1].end == w.end
        assert [p.samples for p in mine] == [False] * (len(mine) - 1) + [True]
        if len(works) > 1 and w.logprobs_from is not None:
            assert mine == [w]
        elif w.end <= FEW.farthest:
            gathers = [p for p in mine if not FEW.are_few(p)]
            assert len(gathers) <= 1
            assert all(p.start % FEW.unit == p.end % FEW.unit == 0 for p in gathers)
    if len(works) == 1:  # whoever asks for more rows than the last counts back from it
        assert [p for _, p in pieces] == sorted((p for _, p in pieces), key=lambda p: p.start)


@given(chunks(), st.sampled_from([1, 4, 16]))
def test_a_step_of_pieces_holds_each_token_once(works: list[Work], page: int) -> None:
    with cut_as(FEW):
        step = row_step(works, LAST, page, 8)
    positions, slots = np.asarray(step.positions), np.asarray(step.write_slots)
    tokens = np.asarray(step.tokens)[:, 0]
    wanted = sorted(
        (w.request.slots[p], p, t)
        for w in works
        for p, t in zip(range(w.start, w.end), expected_tokens(w), strict=True)
    )
    assert sorted(zip(slots.tolist(), positions.tolist(), tokens.tolist(), strict=True)) == wanted
    for w, last in zip(works, step.lasts, strict=True):
        assert slots[last] == w.request.slots[w.end - 1]
        if len(works) == 1 or w.logprobs_from is not None:
            here = slice(last + 1 - (w.end - w.start), last + 1)
            assert slots[here].tolist() == list(w.request.slots[w.start : w.end])
    at = 0
    for group in step.groups:
        assert group.tokens.start == at
        at = group.tokens.stop
        if group.counts is None and group.rows > 1:
            assert group.count.bit_count() == 1
            assert not group.ragged
    assert at == len(tokens)


@given(st.lists(st.integers(2, 256), min_size=1, max_size=64))
def test_short_prompts_of_all_lengths_attend_in_one_launch(lengths: list[int]) -> None:
    works = [work(i, 0, n, False) for i, n in enumerate(lengths)]
    with cut_as(Pieces(64, planned=True)):
        (group,) = row_step(works, LAST, 16, 64).groups
    assert sorted(group.counts or ()) == sorted(lengths)


def test_shapes_that_gather_are_few_whatever_comes() -> None:
    """What 2 000 steps of up to eight prompts of 257 to 2 048 tokens ask of MLX's attention."""
    random, cut, shapes, before = Random(0), Pieces(64, planned=True), set(), set()
    for _ in range(2000):
        works = [work(i, 0, random.randint(257, 2048), False) for i in range(random.randint(1, 8))]
        before |= {(w.end - w.start, w.end) for w in works}
        gathers = Counter((p.end - p.start, p.end) for _, p in cut.parts(works) if not cut.are_few(p))
        shapes |= {(cut.together(n), *shape) for shape, n in gathers.items()}
    assert len(shapes) < 60 < 1500 < len(before)


def test_where_nothing_is_planned_works_stay_whole() -> None:
    works = [work(0, 0, 300, False), work(1, 7, 100, False), work(2, 0, 3, False)]
    assert [p for _, p in Pieces(8, planned=False).parts(works)] == [works[2], works[1], works[0]]
    assert Pieces.of(64) == Pieces(64, planned=False)  # this machine has no GPU, or one that plans nothing


# --- engines ---

OPTIONS: list[dict[str, Any]] = [
    {"chunked_prefill_size": 512},
    {"chunked_prefill_size": 37},
    {"chunked_prefill_size": 64, "max_total_tokens": 400, "disable_overlap_schedule": True},
]


def answers(path: Path, options: dict[str, Any]) -> dict[str, list[Any]]:
    """Tokens and log probabilities of requests that come together, and of more behind what they left in the cache."""
    core = make_core(path, page_size=4, disable_graph=True, skip_server_warmup=True, **options)
    scored = msgspec.structs.replace(GREEDY, logprobs=True, prompt_logprobs=True)
    rows, found = prompts(6, 120), dict[str, list[Any]]()
    for name, asked in (("first", rows), ("again", [row + [7] * 30 for row in rows[:3]]), ("lone", [rows[0] * 2])):
        params = scored if name != "first" else GREEDY
        wanted = [*submits(asked, params, name), *submits(rows[4:], scored, f"{name}-scored")]
        for id, outputs in collect(core, wanted if name != "lone" else wanted[:1]).items():
            found[id] = [token for o in outputs for token in o.tokens]
            found[f"{id} logprobs"] = [x.logprob for o in outputs for x in o.prompt_logprobs if x.logprob is not None]
    return found


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ",".join(f"{k}={v}" for k, v in o.items()))
@pytest.mark.parametrize("family", ["qwen3", "gpt_oss", "qwen3_next"])
def test_tokens_are_those_of_works_that_are_whole(
    family: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model with windows and of one with a recurrent state too."""
    path = make_checkpoint(tmp_path / family, family)
    play_gpu(monkeypatch)
    expected = answers(path, options)
    used = 0

    def cut(pieces: Pieces, work: Work) -> list[Work]:
        nonlocal used
        found = original(pieces, work)
        used += len(found) > 1
        return found

    original = Pieces._pieces
    monkeypatch.setattr(Pieces, "_pieces", cut)
    with cut_as(Pieces(4, planned=True)):
        found = answers(path, options)
    assert used > 3
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        if "logprobs" in name:
            np.testing.assert_allclose(found[name], values, rtol=1e-3, atol=1e-4)
        else:
            assert found[name] == values
