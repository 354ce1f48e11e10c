"""Streams for MPS, which has one queue and no stream objects in torch.

Code that is written for CUDA asks the device's module for ``Stream``, ``StreamContext``, ``stream`` and
``current_stream``, to let work overlap. On MPS everything runs in the order in which it was queued, so each of these
has one truthful meaning: there is one stream, whoever waits for it waits for the device, and ``with`` changes nothing.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, Protocol


class Device(Protocol):
    """What a stream needs of ``torch.mps``."""

    def synchronize(self) -> None:
        """Waits until all that was queued is done."""


class Stream:
    """The device's one queue. All are equal; the arguments are those of ``torch.cuda.Stream``, and say nothing here."""

    def __init__(self, device: Any = None, priority: int = 0, *, of: Device) -> None:
        self._of = of

    def synchronize(self) -> None:
        self._of.synchronize()

    def wait_stream(self, stream: Stream) -> None:
        """Nothing: what comes later in one queue runs later."""

    def wait_event(self, event: Any) -> None:
        """Nothing, for the same reason."""

    def record_event(self, event: Any = None) -> Any:
        """Records ``event``, made now if None, behind what is queued, and returns it."""
        event = event if event is not None else self._of.event.Event()  # type: ignore[attr-defined]
        event.record()
        return event

    def query(self) -> bool:
        """Whether all is done: the only way to know is to wait."""
        self._of.synchronize()
        return True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream)

    def __hash__(self) -> int:
        return hash(Stream)


class StreamContext:
    """``with stream(s):`` runs what is inside on ``s``, which is where everything runs; None is allowed too."""

    def __init__(self, stream: Stream | None) -> None:
        self.stream = stream

    def __enter__(self) -> Stream | None:
        return self.stream

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Nothing to go back to."""


def add_streams(mps: Any) -> tuple[str, ...]:
    """Gives ``torch.mps`` what it lacks of the above; returns the names that were added. What is there stays."""

    class DeviceStream(Stream):
        def __init__(self, device: Any = None, priority: int = 0) -> None:
            super().__init__(device, priority, of=mps)

    one = DeviceStream()
    stand_ins = {
        "Stream": DeviceStream,
        "StreamContext": StreamContext,
        "stream": StreamContext,
        "current_stream": lambda device=None: one,
        "default_stream": lambda device=None: one,
        "set_stream": lambda stream: None,
    }
    missing = tuple(name for name in stand_ins if name not in vars(mps))
    for name in missing:
        setattr(mps, name, stand_ins[name])
    return missing
