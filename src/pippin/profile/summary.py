"""What a timeline says in numbers: time by lane, gaps between device steps, the slowest steps."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec

from pippin.errors import RequestError
from pippin.profile.timeline import DEVICE

MOST_BYTES = 2**31
"""Of an unpacked file; a profile of 500 000 spans has 200 MB."""


class Event(msgspec.Struct, frozen=True):
    """An event of the Trace Event Format, as far as it is read. ``ts`` and ``dur`` in microseconds."""

    ph: str
    name: str = ""
    cat: str = ""
    pid: int | str = 0
    tid: int | str = 0
    ts: float = 0.0
    dur: float = 0.0
    args: dict[str, Any] = {}

    @property
    def bounds(self) -> tuple[int, int]:
        """Start and end in whole nanoseconds: as floats, a span may end behind its neighbour's start."""
        return round(self.ts * 1000), round((self.ts + self.dur) * 1000)


class Document(msgspec.Struct, frozen=True):
    traceEvents: list[Event]
    otherData: dict[str, Any] = {}


@dataclass(frozen=True, slots=True)
class LaneSummary:
    """A lane's spans, in milliseconds. ``busy``: at least one is open; ``total``: outermost spans' lengths added up."""

    process: str
    lane: str
    count: int
    rows: int
    busy: float
    total: float
    longest: float


@dataclass(frozen=True, slots=True)
class StepSummary:
    """A device step: its label, where it starts, and how long it took; milliseconds."""

    number: int | None
    label: str
    start: float
    length: float
    waited: float


@dataclass(frozen=True, slots=True)
class GapSummary:
    """The device had nothing queued for ``length`` milliseconds before step ``number``."""

    number: int | None
    label: str
    start: float
    length: float


@dataclass(frozen=True, slots=True)
class StageSummary:
    """All device steps of one stage: how many, their time in milliseconds, and what they computed."""

    stage: str
    steps: int
    busy: float
    prefill_tokens: int
    decode_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Summary:
    """``wall`` milliseconds lie between the first span's start and the last one's end.

    ``steps`` are slowest first, ``gaps`` longest first. ``early`` steps were done before the host asked for them.
    """

    wall: float
    lanes: tuple[LaneSummary, ...]
    stages: tuple[StageSummary, ...]
    steps: tuple[StepSummary, ...]
    gaps: tuple[GapSummary, ...]
    early: int
    about: dict[str, Any]


EARLY_MS = 0.05
"""A result that was waited for no longer was there before."""


def read_trace(path: Path) -> Document:
    """A timeline's file, gzipped or not. Raises RequestError if it is none."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RequestError(f"{path} can't be read: {error.strerror}", "file") from error
    if data[:2] == b"\x1f\x8b":
        data = _unpacked(path, data)
    try:
        return msgspec.json.decode(
            b'{"traceEvents":' + data + b"}" if data.lstrip()[:1] == b"[" else data, type=Document
        )
    except (msgspec.MsgspecError, UnicodeError) as error:
        hint = "; the profile still runs, or was not ended" if not data else ""
        raise RequestError(f"{path} is no timeline in the Trace Event Format: {error}{hint}", "file") from error


def _unpacked(path: Path, data: bytes) -> bytes:
    unpacker = zlib.decompressobj(wbits=31)
    try:
        found = unpacker.decompress(data, MOST_BYTES)
    except zlib.error as error:
        raise RequestError(f"{path} is a damaged gzip file: {error}", "file") from error
    if unpacker.unconsumed_tail:
        raise RequestError(f"{path} holds more than {MOST_BYTES >> 30} GiB", "file")
    if not unpacker.eof:
        raise RequestError(f"{path} is a gzip file that was cut off", "file")
    return found


def summarize(document: Document) -> Summary:
    """The numbers. Raises RequestError if there is no span."""
    spans = [e for e in document.traceEvents if e.ph == "X"]
    if not spans:
        raise RequestError("the timeline holds no span: nothing ran while it was recorded", "file")
    device = sorted((e for e in spans if e.cat == DEVICE), key=lambda e: e.bounds)
    steps = sorted(map(_step, device), key=lambda s: -s.length)
    return Summary(
        wall=(max(e.bounds[1] for e in spans) - min(e.bounds[0] for e in spans)) / 1e6,
        lanes=tuple(_lanes(document.traceEvents, spans)),
        stages=tuple(_stages(device)),
        steps=tuple(steps),
        gaps=tuple(_gaps(device)),
        early=sum(step.waited < EARLY_MS for step in steps),
        about=document.otherData,
    )


def busy_time(spans: Sequence[tuple[int, int]]) -> int:
    """How long at least one of the spans (start, end) is open."""
    total, until = 0, min((start for start, _ in spans), default=0)
    for start, end in sorted(spans):
        total += max(0, end - max(start, until))
        until = max(until, end)
    return total


def outermost(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The spans (start, end) of one row that lie in no other; the row's spans nest or follow one another."""
    found: list[tuple[int, int]] = []
    for start, end in sorted(spans, key=lambda s: (s[0], -s[1])):
        if not found or start >= found[-1][1]:
            found.append((start, end))
    return found


def _lanes(events: Sequence[Event], spans: Sequence[Event]) -> list[LaneSummary]:
    named = [e for e in events if e.ph == "M"]
    processes = {e.pid: str(e.args.get("name", e.pid)) for e in named if e.name == "process_name"}
    threads = {(e.pid, e.tid): str(e.args.get("name", e.tid)) for e in named if e.name == "thread_name"}
    lanes: dict[tuple[int | str, str], list[Event]] = {}
    for span in spans:
        lane = span.cat if span.cat and threads.get((span.pid, span.tid), "").startswith(span.cat) else ""
        lanes.setdefault((span.pid, lane or threads.get((span.pid, span.tid), str(span.tid))), []).append(span)
    return [_lane(processes.get(pid, str(pid)), lane, found) for (pid, lane), found in lanes.items()]


def _lane(process: str, lane: str, spans: Sequence[Event]) -> LaneSummary:
    rows: dict[int | str, list[tuple[int, int]]] = {}
    for span in spans:
        rows.setdefault(span.tid, []).append(span.bounds)
    tops = [span for row in rows.values() for span in outermost(row)]
    return LaneSummary(
        process,
        lane,
        len(tops),
        len(rows),
        busy_time(tops) / 1e6,
        sum(end - start for start, end in tops) / 1e6,
        max(end - start for start, end in tops) / 1e6,
    )


def _step(event: Event) -> StepSummary:
    waited = event.args.get("waited_us", 0)
    return StepSummary(event.args.get("step"), event.name, event.ts / 1000, event.dur / 1000, waited / 1000)


def _gaps(device: Sequence[Event]) -> list[GapSummary]:
    """Where the device lane is empty between its first and its last step, longest first."""
    found = []
    for before, after in pairwise(device):
        end, start = before.bounds[1], after.bounds[0]
        if start > end:
            found.append(GapSummary(after.args.get("step"), after.name, end / 1e6, (start - end) / 1e6))
    return sorted(found, key=lambda gap: -gap.length)


def _stages(device: Sequence[Event]) -> list[StageSummary]:
    found = []
    for stage in sorted({str(e.args.get("stage", "")) for e in device}, reverse=True):
        mine = [e for e in device if str(e.args.get("stage", "")) == stage]
        counts = (sum(e.args.get(f"{kind}_tokens", 0) for e in mine) for kind in ("prefill", "decode", "cached"))
        found.append(StageSummary(stage, len(mine), sum(e.dur for e in mine) / 1000, *counts))
    return found
