"""Steps without an engine: ``pippin bench one-batch --profile`` records prefill and decode apart with this.

    with profiled(runner, "profile_batch1_input128_output16_prefill", directory, gpu=gpu) as profile:
        profile.runner.launch(batch).read()
    print(profile.files)

writes ``….trace.json.gz``, and on a Mac where ``gpu`` is true ``….gputrace`` beside it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pippin.profile.engine import METAL, tracer_for
from pippin.profile.files import default_directory, discard, reserve, trace_path
from pippin.profile.gpu import Metal
from pippin.profile.replay import replay
from pippin.profile.steps import Outcome, Runner, StepProfile, TimedRunner, Window
from pippin.profile.trace import ENGINE, write_trace


@dataclass(slots=True)
class StageProfile:
    """``runner`` launches like the one behind it, and records; ``files`` are there when the block has ended.

    ``error`` says why a capture that was begun came to nothing.
    """

    runner: TimedRunner
    files: list[Path] = field(default_factory=list)
    error: str = ""


@contextmanager
def profiled(
    runner: Runner,
    name: str,
    directory: str | Path | None = None,
    *,
    gpu: bool | None = None,
    device: str = "cpu",
    about: Mapping[str, str | int] = {},
    metal: Metal = METAL,
    window: Window | None = None,
) -> Iterator[StageProfile]:
    """Records the steps that the block launches and reads, and writes them when it ends, even by an exception.

    ``runner`` is any ``ModelRunner``. ``name``: of the files, without suffix; numbered if taken. ``directory`` None:
    SGLANG_TORCH_PROFILER_DIR or the temporary directory. ``gpu`` and ``device`` (``gpu`` or ``cpu``) as in
    ``StartProfile``. ``about`` goes into the file; ``window`` says which steps are recorded, all if left out. Raises
    RequestError for what can't be captured, or written.
    """
    stem, paths = reserve(Path(directory) if directory is not None else default_directory(), name, False)
    marks: list[int] = []

    def report(noted: list[int], outcome: Outcome | None) -> None:
        marks.extend(noted)
        if outcome is not None:
            found.files, found.error = [trace_path(stem), *outcome.files], outcome.error

    try:
        tracer = tracer_for(gpu, stem, False, device, metal)
    except BaseException:
        discard(paths)
        raise
    profile = StepProfile(window or Window(None, None, False), report, tracer)
    found = StageProfile(TimedRunner(runner, profile))
    began = profile.now()
    try:
        yield found
    finally:
        found.runner.leave()
        profile.end()
        names = {ENGINE: f"engine process ({os.getpid()})"}
        write_trace(trace_path(stem), replay(marks), began, names, {"profile_id": Path(stem).name, **about})
