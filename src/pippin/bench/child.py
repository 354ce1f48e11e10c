"""A peer in a process of its own, so that it is measured as it is: Pippin hooks mlx-lm's models in its own process.

The child reads lines of JSON from its standard input, and answers each with one line: first a Hello with an Opened or a
Failed, then whatever the function that it opened takes with what that returns.
"""

from __future__ import annotations

import contextlib
import os
import pkgutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, TypeVar

import msgspec

from pippin.backend import prepare
from pippin.config import EngineConfig
from pippin.errors import ConfigError, EngineError, ModelError, PippinError
from pippin.garbage import leave_loaded_alone

T = TypeVar("T")
Ask = Callable[[Any], Any]
"""Takes and returns what JSON can hold, or msgspec can make into that."""

_KINDS: dict[str, type[PippinError]] = {"ConfigError": ConfigError, "ModelError": ModelError}


class Hello(msgspec.Struct, frozen=True):
    """Open ``target``, ``module:function``, with a configuration; it returns an Ask."""

    target: str
    config: EngineConfig


class Opened(msgspec.Struct, frozen=True, tag=True):
    """It is ready to be asked."""


class Failed(msgspec.Struct, frozen=True, tag=True):
    """It could not be opened, or failed to answer; ``kind`` is the error's class name."""

    kind: str
    message: str


class Answer(msgspec.Struct, frozen=True, tag=True):
    """What an Ask returned."""

    value: msgspec.Raw


class Child:
    """Starts a process and opens ``target`` there. Use it as a context manager: leaving ends the process.

    Raises the error that the child failed with if that is ConfigError or ModelError, else EngineError with the last of
    what it said on standard error.
    """

    def __init__(self, name: str, target: str, config: EngineConfig) -> None:
        self._name = name
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        command = [sys.executable, "-m", "pippin.bench.child"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, start_new_session=True
        )
        try:
            self._send(Hello(target, config))
            self._receive()
        except BaseException:
            self.close()
            raise

    def ask(self, question: object, answer: type[T]) -> T:
        """Sends a question, and waits for its answer."""
        self._send(question)
        return msgspec.json.decode(self._receive(), type=answer)

    def close(self) -> None:
        """Closes its input, which ends it; a child that does not end is killed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _send(self, message: object) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # what there is to say, _receive says
            self._process.stdin.write(msgspec.json.encode(message) + b"\n")
            self._process.stdin.flush()

    def _receive(self) -> bytes:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            self._errors.seek(0)
            said = self._errors.read().decode(errors="replace").strip().splitlines()
            raise EngineError(f"{self._name} ended with status {status}: " + " / ".join(said[-5:]))
        message = msgspec.json.decode(line, type=Opened | Failed | Answer)
        if isinstance(message, Failed):
            raise _KINDS.get(message.kind, EngineError)(f"{self._name}: {message.message}")
        return bytes(message.value) if isinstance(message, Answer) else b""


def main() -> int:
    """The child."""
    prepare()  # before any import of MLX
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    hello = msgspec.json.decode(sys.stdin.buffer.readline(), type=Hello)

    def send(make: Callable[[], object]) -> bool:
        try:
            message = make()
        except PippinError as error:
            message = Failed(type(error).__name__, str(error))
        answers.write(msgspec.json.encode(message) + b"\n")
        answers.flush()
        return not isinstance(message, Failed)

    asks: list[Ask] = []

    def opened() -> Opened:
        asks.append(pkgutil.resolve_name(hello.target)(hello.config))
        leave_loaded_alone()  # as an engine's own process does
        return Opened()

    if not send(opened):
        return 1
    for line in sys.stdin.buffer:
        question = msgspec.json.decode(line)
        if not send(lambda q=question: Answer(msgspec.Raw(msgspec.json.encode(asks[0](q))))):  # type: ignore[misc]
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
