"""What an engine is told beside requests, and what of it the next one is told again or told of.

Flushes that are not answered go on in the next engine; a LoRA adapter that was loaded is loaded there too; a profile
ends with the engine that it is of.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import msgspec

from pippin.messages import (
    AdaptersChanged,
    Event,
    Flush,
    Flushed,
    LoadAdapter,
    Marks,
    ModelInfo,
    ProfileStarted,
    StartProfile,
    UnloadAdapter,
)

log = logging.getLogger(__name__)

RESTARTING = "the engine is restarting; try again in a while"

Standing = Flush | LoadAdapter | UnloadAdapter | StartProfile


class Carried:
    """Commands that outlast an engine, and answers to those that don't. ``adapters``: name to path, as they are now."""

    def __init__(self) -> None:
        self.adapters: dict[str, str] = {}
        self._flushes: list[Flush] = []
        self._changing: set[str] = set()
        self._again: dict[str, str] = {}  # what an engine was told of adapters to be as the last: ids, names
        self._profile: str | None = None
        self._profiling = False

    def ask(self, command: Standing, ready: bool) -> Event | None:
        """Notes a command; its answer, if there is no engine that could give it."""
        match command:
            case Flush():
                self._flushes.append(command)
            case LoadAdapter(id=id) | UnloadAdapter(id=id) if ready:
                self._changing.add(id)
            case LoadAdapter(id=id) | UnloadAdapter(id=id):
                return self._unchanged(id)
            case StartProfile(id=id) if ready:
                self._profile, self._profiling = id, False
            case StartProfile(id=id):
                return ProfileStarted(id, 0, 0, RESTARTING)
        return None

    def hear(self, event: Event) -> Event | None:
        """Notes what an engine says; what of it is to be passed on."""
        match event:
            case Flushed(id):
                self._flushes = [flush for flush in self._flushes if flush.id != id]
            case AdaptersChanged(id=id, error=error) if id in self._again:
                name = self._again.pop(id)
                if not error:
                    return None
                log.warning("the LoRA adapter %s could not be loaded again, and is forgotten: %s", name, error)
                self.adapters.pop(name, None)
                return msgspec.structs.replace(event, adapters=dict(self.adapters))
            case AdaptersChanged(id, adapters):
                self.adapters = dict(adapters)
                self._changing.discard(id)
            case ProfileStarted():
                self._profiling = not event.error
            case Marks() if event.ended:
                self._profiling = False
        return event

    def commands(self, info: ModelInfo) -> Sequence[Flush | LoadAdapter | UnloadAdapter]:
        """What an engine that comes after another is told first; ``info`` is what it says of itself."""
        given, wanted = info.lora_paths, self.adapters
        unload = [UnloadAdapter(f"forget/{n}", n) for n in given if given[n] != wanted.get(n)]
        load = [LoadAdapter(f"restore/{n}", n, wanted[n]) for n in wanted if given.get(n) != wanted[n]]
        changes: list[LoadAdapter | UnloadAdapter] = [*unload, *load]
        self._again = {change.id: change.name for change in changes}
        return [*changes, *self._flushes]

    def lost(self, why: str) -> list[Event]:
        """The engine is gone: answers to what only it could have answered."""
        told: list[Event] = [self._unchanged(id) for id in self._changing]
        if self._profile is not None:
            ended = Marks(self._profile, [], ended=True, error=why)
            told.append(ended if self._profiling else ProfileStarted(self._profile, 0, 0, why))
        self._changing.clear()
        self._profile = None
        return told

    def give_up(self, why: str) -> list[Event]:
        """There will be no engine for a while: answers to what waits for one."""
        flushes, self._flushes = self._flushes, []
        return [Flushed(flush.id, False, why) for flush in flushes]

    def _unchanged(self, id: str) -> AdaptersChanged:
        return AdaptersChanged(id, dict(self.adapters), RESTARTING, status=503)
