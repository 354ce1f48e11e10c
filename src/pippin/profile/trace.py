"""Spans to a file that Perfetto, chrome://tracing and speedscope open.

The format is the Trace Event Format's JSON, gzipped: complete events (``ph`` X) with microseconds since the profile
began, a thread for each row of a lane, metadata that names and orders them, counters of each step's tokens, and an
arrow from where a step was built to where it ran.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from pippin.profile.timeline import BUILDING, DEVICE, ENGINE_LANES, HTTP_LANES, Span

Json = dict[str, Any]

ENGINE, HTTP_SIDE = 1, 2
PROCESSES = {ENGINE: ("engine process", ENGINE_LANES), HTTP_SIDE: ("HTTP process", HTTP_LANES)}
"""Their numbers in the file; viewers show them in this order, and an engine has few rows."""
_ROWS = 1000
"""Thread ids of a lane: its place times this, plus its row."""


def rows_of(spans: Sequence[Span]) -> list[list[Span]]:
    """A lane's spans in as few rows as a first fit finds, so that in each row they nest or follow one another.

    Spans of a group share a row, and with no other group's at the same time.
    """
    rows: list[list[Span]] = []
    open_until: list[list[int]] = []
    for members in sorted(_groups(spans), key=lambda g: (g[0].start, -max(s.end for s in g))):
        start, end = members[0].start, max(s.end for s in members)
        alone = bool(members[0].group)
        for row, ends in zip(rows, open_until, strict=True):
            while ends and ends[-1] <= start:
                ends.pop()
            if not ends or (not alone and end <= ends[-1]):
                row += members
                ends.append(end)
                break
        else:
            rows.append(list(members))
            open_until.append([end])
    return rows


def _groups(spans: Sequence[Span]) -> list[list[Span]]:
    """Spans of one group together, outermost first; each other span alone."""
    groups: dict[object, list[Span]] = {}
    for span in spans:
        groups.setdefault(span.group or id(span), []).append(span)
    return [sorted(members, key=lambda s: (s.start, -s.end)) for members in groups.values()]


def trace_events(spans: Sequence[Span], origin: int, names: Mapping[int, str] = {}) -> Iterator[Json]:
    """The file's events. ``origin`` is time 0, in nanoseconds; ``names`` say more of a process, by its number."""
    for pid, (process, lanes) in PROCESSES.items():
        mine = [s for s in spans if s.lane in lanes]
        if not mine:
            continue
        yield _metadata("process_name", pid, 0, name=names.get(pid, process))
        yield _metadata("process_sort_index", pid, 0, sort_index=pid)
        for place, lane in enumerate(lanes, 1):
            rows = rows_of([s for s in mine if s.lane == lane])
            for number, row in enumerate(rows):
                tid = place * _ROWS + number
                yield _metadata("thread_name", pid, tid, name=f"{lane} {number + 1}" if len(rows) > 1 else lane)
                yield _metadata("thread_sort_index", pid, tid, sort_index=tid)
                for span in row:
                    yield from _events_of(span, pid, tid, origin)


def _metadata(what: str, pid: int, tid: int, **args: str | int) -> Json:
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": args}


def _events_of(span: Span, pid: int, tid: int, origin: int) -> Iterator[Json]:
    start, end = span.start - origin, span.end - origin
    place = {"cat": span.lane, "pid": pid, "tid": tid, "ts": start / 1000}
    args = {**(span.args or {}), **({} if span.step is None else {"step": span.step})}
    yield {"ph": "X", "name": span.name, **place, "dur": (end - start) / 1000, "args": args}
    if span.step is None or span.args is None:
        return
    if span.lane == BUILDING:
        yield {"ph": "s", "name": "queued", "id": span.step, **place}
    elif span.lane == DEVICE:
        yield {"ph": "f", "bp": "e", "name": "queued", "id": span.step, **place}
        counts = {kind: span.args[f"{kind}_tokens"] for kind in ("prefill", "decode")}
        yield {"ph": "C", "name": "tokens in step", "pid": pid, "ts": start / 1000, "args": counts}
        yield {"ph": "C", "name": "tokens in step", "pid": pid, "ts": end / 1000, "args": dict.fromkeys(counts, 0)}


def write_trace(path: Path, spans: Sequence[Span], origin: int, names: Mapping[int, str], about: Json) -> None:
    """Writes the gzipped file at once or not at all; ``about`` goes in as ``otherData``. Raises OSError."""
    events = list(trace_events(spans, origin, names))
    document = {"displayTimeUnit": "ms", "otherData": about, "traceEvents": events}
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(gzip.compress(msgspec.json.encode(document), compresslevel=6, mtime=0))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
