"""Everything that Pippin raises on purpose.

PippinError
├── RequestError    one request asks for what can't be done: HTTP 400, names the field
├── ConfigError     a start-up option is wrong: CLI exit status 2, names the option
├── ModelError      a model can't be loaded or served exactly, and why
└── EngineError     the engine failed a request that was fine: HTTP 500 or 503
"""

from __future__ import annotations


class PippinError(Exception):
    """The root; catching it catches all of the below."""


class RequestError(PippinError):
    """A request that can't be served as asked.

    ``field`` is the JSON field as the client spelled it (or None if it is the whole body),
    ``message`` says what is wrong and what would be right, ``status`` is the HTTP status.
    """

    def __init__(self, message: str, field: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.status = status


class ConfigError(PippinError):
    """A wrong start-up option; ``option`` is the flag or field, e.g. ``--page-size``."""

    def __init__(self, message: str, option: str | None = None) -> None:
        super().__init__(f"{option}: {message}" if option else message)
        self.message = message
        self.option = option


class ModelError(PippinError):
    """A model that can't be loaded, or that no attention backend serves exactly."""


class EngineError(PippinError):
    """The engine failed, through no fault of the request; ``status`` is the HTTP status.

    ``retry_after``: after so many seconds it may be worth another try.
    """

    def __init__(self, message: str, status: int = 500, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.retry_after = retry_after
