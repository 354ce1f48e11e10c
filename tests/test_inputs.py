"""Works become arrays: every token is laid out once, with its own position, slot and context."""

from __future__ import annotations

from array import array

import mlx.core as mx
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pippin.inputs import Group, padded_step, row_step
from pippin.types import Request, SamplingParams, Work


def work(index: int, start: int, count: int, unseen: bool) -> Work:
    """Work on tokens start … start+count-1 of a request whose slots and tokens tell whose they are."""
    end = start + count
    seen = end - 1 if unseen else end
    request = Request(str(index), [1000 * (index + 1) + i for i in range(seen)], seen, SamplingParams(), row=index + 1)
    request.slots = array("i", [10_000 * (index + 1) + i for i in range(end + 3)])
    return Work(request, start, end, samples=True)


@st.composite
def batches(draw: st.DrawFn) -> list[Work]:
    shapes = draw(st.lists(st.tuples(st.integers(0, 300), st.integers(1, 6), st.booleans()), min_size=1, max_size=8))
    return [
        work(i, start if not unseen else start + 1, count, unseen) for i, (start, count, unseen) in enumerate(shapes)
    ]


LAST = mx.array([7000 + i for i in range(9)], dtype=mx.int32)


def expected_tokens(w: Work) -> list[int]:
    known = w.request.tokens[w.start : w.end]
    return known + [7000 + w.request.row] * (w.end - w.start - len(known))


def covers(group: Group, works: list[Work], rows: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The (position, slot count) of each of the group's rows, checked against the works that own them."""
    assert group.slots is not None
    positions, slots = np.asarray(group.positions), np.asarray(group.slots)
    for i in range(group.count):
        owner = rows[group.first + i * group.rows][0]
        w = works[owner]
        assert list(positions[i]) == list(range(w.start, w.start + group.rows))
        assert list(slots[i, : w.end]) == list(w.request.slots[: w.end])
        assert not slots[i, w.end :].any()
        assert group.ragged or w.end == group.context
    return [(group.first + i, group.rows) for i in range(group.count)]


@given(batches())
def test_rows_hold_each_token_once_with_its_position_slot_and_context(works: list[Work]) -> None:
    step = row_step(works, LAST)
    tokens, positions = np.asarray(step.tokens)[:, 0], np.asarray(step.positions)
    slots = np.asarray(step.write_slots)
    assert len(tokens) == sum(w.end - w.start for w in works)
    rows: list[tuple[int, int]] = [(-1, -1)] * len(tokens)
    for i, w in enumerate(works):
        last = step.lasts[i]
        here = slice(last - (w.end - w.start) + 1, last + 1)
        assert list(tokens[here]) == expected_tokens(w)
        assert list(positions[here]) == list(range(w.start, w.end))
        assert list(slots[here]) == list(w.request.slots[w.start : w.end])
        rows[here] = [(i, p) for p in range(w.start, w.end)]
    assert sum(g.count * g.rows for g in step.groups) == len(tokens)
    at = 0
    for group in step.groups:
        assert group.first == at
        covers(group, works, rows)
        at += group.count * group.rows


@given(batches())
def test_padding_goes_to_scratch_and_changes_no_token(works: list[Work]) -> None:
    step = padded_step(works, LAST)
    tokens, slots = np.asarray(step.tokens), np.asarray(step.write_slots)
    (group,) = step.groups
    assert group.slots is not None
    for i, w in enumerate(works):
        n = w.end - w.start
        assert list(tokens[i, :n]) == expected_tokens(w)
        assert list(slots[i, :n]) == list(w.request.slots[w.start : w.end])
        assert not slots[i, n:].any()
        assert step.lasts[i] == i * tokens.shape[1] + n - 1
        assert np.asarray(step.positions)[i] == w.start
        assert list(np.asarray(group.positions)[i, :n]) == list(range(w.start, w.end))
        assert list(np.asarray(group.slots)[i, : w.end]) == list(w.request.slots[: w.end])


@given(works=batches(), several=st.sampled_from([1, 3, 6]), page=st.sampled_from([1, 4]))
def test_works_of_few_tokens_are_one_group_that_reads_pages(works: list[Work], several: int, page: int) -> None:
    for w in works:  # whole pages, as a pool of pages has them
        w.request.slots = array("i", [page * (100 * w.request.row + i // page) + i % page for i in range(w.end)])
    step = row_step(works, LAST, page, several)
    counts = [w.end - w.start for w in works]
    assert sum(g.rows == 1 for g in step.groups) <= 1
    few = [g for g in step.groups if g.counts is not None]
    assert len(few) == any(1 < n <= several for n in counts)
    positions, slots = np.asarray(step.positions), np.asarray(step.write_slots)
    at, seen = 0, 0
    for group in step.groups:
        assert group.tokens.start == at
        at = group.tokens.stop
        assert group.pages is not None
        assert (group.counts is not None) == (1 < group.rows <= several)
        first = group.tokens.start
        for line, count in zip(np.asarray(group.pages), group.counts or [group.rows] * group.count, strict=True):
            last = positions[first + count - 1]
            assert list(positions[first : first + count]) == list(range(last - count + 1, last + 1))
            assert line[last // page] * page + last % page == slots[first + count - 1]
            first, seen = first + count, seen + 1
        assert first == at
    assert (at, seen) == (sum(counts), len(works))


def test_single_tokens_are_padded_to_at_most_twice_the_shortest_beyond_256() -> None:
    contexts = [5, 250, 300, 700, 1500, 40]
    step = row_step([work(i, c - 1, 1, False) for i, c in enumerate(contexts)], LAST)
    assert [(g.count, g.context) for g in step.groups] == [(3, 250), (1, 300), (1, 700), (1, 1500)]
