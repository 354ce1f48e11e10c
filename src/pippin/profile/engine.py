"""Opens a profile in the engine's process, where the device is."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import mlx.core as mx

from pippin.errors import RequestError
from pippin.messages import Marks, ProfileStarted, StartProfile
from pippin.profile.gpu import Metal, Tracer, open_tracer
from pippin.profile.steps import Outcome, StepProfile, Window

Tell = Callable[[ProfileStarted | Marks], None]

METAL: Metal = mx.metal


def open_profile(
    command: StartProfile,
    tell: Tell,
    *,
    device: str,
    running: bool,
    steps: int,
    on_end: Callable[[], None],
    metal: Metal = METAL,
) -> StepProfile | None:
    """A profile of the engine's steps; None if it can't be, and ``tell`` has heard why.

    ``device`` is ``gpu`` or ``cpu``; ``steps`` counts those launched so far; ``on_end`` is called when it ends.
    """
    try:
        if running:
            raise RequestError("a profile is running; end it with /stop_profile first", status=409)
        tracer = tracer_for(command.gpu, command.stem, command.by_stage, device, metal)
    except RequestError as error:
        tell(ProfileStarted(command.id, time.perf_counter_ns(), os.getpid(), error.message, error.field))
        return None

    def report(noted: list[int], outcome: Outcome | None) -> None:
        if outcome is None:
            tell(Marks(command.id, noted))
        else:
            tell(Marks(command.id, noted, True, [str(file) for file in outcome.files], outcome.error))

    window = Window(command.num_steps, command.start_step, command.by_stage)
    tell(ProfileStarted(command.id, time.perf_counter_ns(), os.getpid()))
    return StepProfile(window, report, tracer, steps=steps, on_end=on_end)


def tracer_for(gpu: bool | None, stem: str, by_stage: bool, device: str, metal: Metal = METAL) -> Tracer | None:
    """What records beside the timeline on this device (``gpu`` or ``cpu``); see ``StartProfile``.

    Raises RequestError if ``gpu`` is true and there is nothing that could.
    """
    if device != "gpu":
        if gpu:
            raise RequestError("the model runs on the CPU: leave GPU out, the timeline shows its steps", "activities")
        return None
    return open_tracer(gpu, stem, by_stage, metal=metal, cuda=mx.cuda.is_available())
