"""What holds of every file that a viewer of the Trace Event Format is to open."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Json = dict[str, Any]

ROUNDING = 1e-6  # microseconds that sums of floats may be off


def read_events(path: Path) -> list[Json]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        events: list[Json] = json.load(file)["traceEvents"]
    return events


def check_events(events: Iterable[Json]) -> None:
    """Known phases, named rows, and in each row spans that nest or follow one another."""
    events = list(events)
    named = {(e["pid"], e["tid"]) for e in events if e["ph"] == "M" and e["name"] == "thread_name"}
    rows: dict[tuple[int, int], list[Json]] = {}
    for event in events:
        assert event["ph"] in "MXCsf"
        if event["ph"] == "X":
            assert event["dur"] >= 0
            assert (event["pid"], event["tid"]) in named
            rows.setdefault((event["pid"], event["tid"]), []).append(event)
    for row in rows.values():
        check_row(row)
    starts = [e["id"] for e in events if e["ph"] == "s"]
    assert len(starts) == len(set(starts))


def check_row(row: list[Json]) -> None:
    open_until: list[float] = []
    for event in sorted(row, key=lambda e: (e["ts"], -e["dur"])):
        end = event["ts"] + event["dur"]
        while open_until and open_until[-1] <= event["ts"] + ROUNDING:
            open_until.pop()
        assert not open_until or end <= open_until[-1] + ROUNDING, f"{event} crosses another's end"
        open_until.append(end)
