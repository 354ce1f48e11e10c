"""Starts and ends profiles from the HTTP process, and joins what both processes recorded into one file."""

from __future__ import annotations

import asyncio
import logging
import os
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from pippin.errors import EngineError, PippinError, RequestError
from pippin.messages import Command, Marks, ProfileStarted, StartProfile, StopProfile
from pippin.profile.files import STAGES, Stage, default_directory, discard, reserve, trace_path
from pippin.profile.replay import replay
from pippin.profile.timeline import Span, Timeline
from pippin.profile.trace import ENGINE, HTTP_SIDE, write_trace

log = logging.getLogger(__name__)

MOST_SPANS = 500_000
"""A profile that nobody stops ends with so many; they take about 100 MB."""

MARKS_A_SPAN = 4
"""Integers that an engine notes for a span, about."""

ACTIVITIES = ("CPU", "GPU")


class ProfileOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What to record, with SGLang's names.

    ``output_dir``: where the files go, as the HTTP process sees it; SGLANG_TORCH_PROFILER_DIR or the temporary
    directory if None. ``num_steps`` engine steps, from number ``start_step`` on; with ``profile_by_stage``, so many
    that compute prompts and so many that only decode, in files apart. ``profile_id`` names the files, behind
    ``profile_prefix``. ``activities``: CPU is the timeline, which is always there; GPU the device's own profiler.
    Raises RequestError that names the field.
    """

    output_dir: str | None = None
    num_steps: int | None = None
    start_step: int | None = None
    profile_by_stage: bool = False
    profile_id: str | None = None
    profile_prefix: str | None = None
    activities: list[str] | None = None

    def __post_init__(self) -> None:
        if self.num_steps is not None and self.num_steps < 1:
            raise RequestError(
                f"num_steps must be at least 1, or left out to record until stopped, not {self.num_steps}", "num_steps"
            )
        if self.start_step is not None and self.start_step < 0:
            raise RequestError(f"start_step must be at least 0, not {self.start_step}", "start_step")
        for activity in self.activities or ():
            if activity not in ACTIVITIES:
                raise RequestError(
                    f"activities may be CPU (the timeline) and GPU (a Metal capture, or NVTX ranges on CUDA), "
                    f"not {activity!r}",
                    "activities",
                )

    @property
    def gpu(self) -> bool | None:
        return None if self.activities is None else "GPU" in self.activities

    @property
    def name(self) -> str | None:
        if self.profile_prefix is None:
            return self.profile_id
        return f"{self.profile_prefix}-{self.profile_id or time.strftime('%Y%m%d-%H%M%S')}"


@dataclass(slots=True, eq=False)
class Run:
    """A profile that has begun: its files, and what is known so far."""

    id: str
    stem: str
    paths: list[Path]
    by_stage: bool
    sent: int
    answer: asyncio.Future[ProfileStarted]
    engine_pid: int = 0
    offset: int = 0
    marks: list[int] = field(default_factory=list)
    captures: list[str] = field(default_factory=list)
    error: str = ""
    writing: asyncio.Task[list[Path]] | None = None


class Profiler:
    """Holds the one profile that may run. ``timeline`` is None while none does. Used in the client's event loop.

    ``about`` gives facts for the files; ``send`` reaches the engine.
    """

    def __init__(self, send: Callable[[Command], None], about: Callable[[], dict[str, Any]] = dict) -> None:
        self.timeline: Timeline | None = None
        self._send, self._about = send, about
        self._run: Run | None = None
        self._ended: asyncio.Future[list[Path]] | None = None
        self._last = ""
        self._failure: PippinError | None = None

    async def start(self, options: ProfileOptions) -> list[Path]:
        """Begins a profile; returns the files that it will be written to.

        Raises RequestError: 409 if one runs, else for what can't be recorded, or written; what ``lost`` was told.
        """
        if self._failure is not None:
            raise self._failure
        if self._run is not None:
            raise RequestError(
                f"a profile is running, to {self._run.paths[0]}; end it with /stop_profile first", status=409
            )
        directory = Path(options.output_dir) if options.output_dir else default_directory()
        stem, paths = reserve(directory, options.name, options.profile_by_stage)
        loop = asyncio.get_running_loop()
        timeline = Timeline()
        run = Run(uuid.uuid4().hex, stem, paths, options.profile_by_stage, timeline.now(), loop.create_future())
        self._run, self._ended = run, loop.create_future()
        self._send(
            StartProfile(
                id=run.id,
                stem=stem,
                num_steps=options.num_steps,
                start_step=options.start_step,
                by_stage=options.profile_by_stage,
                gpu=options.gpu,
            )
        )
        try:
            await self._begin(run, timeline)
        except BaseException:
            self._send(StopProfile(run.id))
            self._run = None
            discard(run.paths)
            raise
        return run.paths

    async def _begin(self, run: Run, timeline: Timeline) -> None:
        answer = await run.answer
        if answer.error and not answer.pid:
            raise EngineError(answer.error, 503)
        if answer.error:
            raise RequestError(answer.error, answer.field)
        received, run.engine_pid = timeline.now(), answer.pid
        if not run.sent <= answer.clock <= received:  # its clock is not ours: half of the way is the best guess
            run.offset = (run.sent + received) // 2 - answer.clock
        if self._run is run and run.writing is None:
            self.timeline = timeline

    async def stop(self) -> list[Path]:
        """Ends the profile; returns the files that are complete. Raises RequestError if none runs."""
        run = self._run
        if run is None:
            raise RequestError("no profile is running; begin one with /start_profile" + self._last)
        if run.writing is None:
            self._send(StopProfile(run.id))
        assert self._ended is not None
        return await asyncio.shield(self._ended)

    def hear(self, event: ProfileStarted | Marks) -> None:
        """What the engine says of its profile."""
        run = self._run
        if run is None or run.id != event.id or run.writing is not None:
            return
        if isinstance(event, ProfileStarted):
            if not run.answer.done():
                run.answer.set_result(event)
            return
        run.marks += event.marks
        run.captures += event.files
        run.error = run.error or event.error
        if event.ended:
            self._finish(run)
        elif len(run.marks) // MARKS_A_SPAN + len(self.timeline or ()) > MOST_SPANS:
            log.warning("the profile has more than %d spans and ends", MOST_SPANS)
            self._send(StopProfile(run.id))

    def lost(self, why: PippinError) -> None:
        """The engine is gone: what it told is written."""
        self._failure, run = why, self._run
        if run is None or run.writing is not None:
            return
        if not run.answer.done():
            run.answer.set_exception(why)
            return
        run.error = run.error or str(why)
        self._finish(run)

    async def close(self, patience: float) -> None:
        """Ends a profile that runs, so that its file is there; without the engine's last spans after ``patience``."""
        run = self._run
        if run is None or self._ended is None:
            return
        if run.writing is None and run.answer.done():
            self._send(StopProfile(run.id))
            await asyncio.wait([self._ended], timeout=patience)
        self.lost(EngineError("the server shut down", 503))
        if run.writing is not None:
            await asyncio.wait([run.writing])

    def _finish(self, run: Run) -> None:
        timeline, self.timeline = self.timeline, None
        own = timeline.close() if timeline is not None else []
        run.writing = asyncio.create_task(self._write(run, own))

    async def _write(self, run: Run, own: list[Span]) -> list[Path]:
        assert self._ended is not None
        ended, about = self._ended, {**self._about(), **facts(run)}
        try:
            paths = await asyncio.to_thread(write_run, run, own, about)
        except Exception as error:
            log.error("the profile could not be written: %s", error)
            self._last = f" (the last one could not be written: {error})"
            if not ended.cancelled():
                ended.set_exception(EngineError(f"the profile could not be written: {error}"))
                ended.exception()  # nobody may be waiting
            paths = []
        else:
            log.info("profile written: %s", ", ".join(map(str, paths)))
            self._last = f" (the last one has ended by itself or was stopped, and is in {paths[0]})"
            if not ended.done():
                ended.set_result(paths)
        self._run = None
        return paths


def facts(run: Run) -> dict[str, Any]:
    """What the files say of the profile itself."""
    return {
        "profile_id": Path(run.stem).name,
        "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "clock": "time.perf_counter_ns of both processes",
        "clock_offset_ns": run.offset,
        "captures": run.captures,
        "error": run.error,
    }


def write_run(run: Run, own: Sequence[Span], about: dict[str, Any]) -> list[Path]:
    """Writes a profile's trace files; returns them and the captures."""
    played = replay(run.marks)
    moved = [shifted(span, run.offset) for span in played] if run.offset else played
    names = {HTTP_SIDE: f"HTTP process ({os.getpid()})", ENGINE: f"engine process ({run.engine_pid})"}
    stages: Sequence[Stage | None] = STAGES if run.by_stage else (None,)
    written = []
    for stage in stages:
        spans = [*own, *moved] if stage is None else of_stage([*own, *moved], stage)
        path = trace_path(run.stem, stage)
        write_trace(path, spans, run.sent, names, about | ({"stage": stage} if stage else {}))
        written.append(path)
    return [*written, *map(Path, run.captures)]


def shifted(span: Span, offset: int) -> Span:
    return msgspec.structs.replace(span, start=span.start + offset, end=span.end + offset)


def of_stage(spans: Sequence[Span], stage: Stage) -> list[Span]:
    """Marks of the steps of one stage, and all others from the first to the last of these."""
    steps = {s.step for s in spans if s.step is not None and s.args is not None and s.args.get("stage") == stage}
    mine = [s for s in spans if s.step in steps and s.step is not None]
    if not mine:
        return []
    first, last = min(s.start for s in mine), max(s.end for s in mine)
    return [s for s in spans if s.step in steps or (s.step is None and s.start < last and s.end > first)]
