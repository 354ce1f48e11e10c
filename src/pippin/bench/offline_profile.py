"""``pippin bench offline --profile``: a timeline of one more run of the engine alone."""

from __future__ import annotations

import os
import time
from pathlib import Path

from pippin.bench.offline_run import CoreSide, Requests
from pippin.core import EngineCore
from pippin.errors import ConfigError
from pippin.messages import Marks, ProfileStarted, StartProfile, StopProfile
from pippin.profile.files import default_directory, discard, reserve
from pippin.profile.replay import replay
from pippin.profile.trace import ENGINE, write_trace


def profile_run(core: EngineCore, side: CoreSide, requests: Requests, run_name: str) -> list[Path]:
    """Serves the requests once more; the timeline, and on a GPU what its own profiler took.

    Raises ConfigError for what can't be recorded here.
    """
    stem, paths = reserve(default_directory(), f"offline-{run_name}", False)
    marks: list[int] = []
    errors: list[str] = []
    captures: list[str] = []

    def tell(event: ProfileStarted | Marks) -> None:
        errors.extend([event.error] if event.error else [])
        if isinstance(event, Marks):
            marks.extend(event.marks)
            captures.extend(event.files)

    began = time.perf_counter_ns()
    core.profile(StartProfile(id=run_name, stem=stem), tell)
    try:
        side.serve(requests, lambda: None)
    finally:
        core.profile(StopProfile(run_name), tell)
        if not marks:
            discard(paths)
    if errors:
        raise ConfigError(errors[0], "--profile")
    about = {"profile_id": Path(stem).name, "requests": len(requests), "captures": captures}
    write_trace(paths[0], replay(marks), began, {ENGINE: f"engine process ({os.getpid()})"}, about)
    return [*paths, *map(Path, captures)]
