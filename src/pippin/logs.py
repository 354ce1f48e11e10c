"""Log lines of both processes: for people, or one JSON object a line (``--log-format json``), with the request's id."""

from __future__ import annotations

import json
import logging
import sys
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal

LogFormat = Literal["text", "json"]

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""Of the HTTP request that is being served here; empty outside of one."""


class TextFormatter(logging.Formatter):
    """``LEVEL: message``, behind the request's id where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        id = request_id.get()
        return super().format(record) + (f" [{id}]" if id else "")


class JsonFormatter(logging.Formatter):
    """A JSON object: time (UTC), level, logger, message, request_id, and what ``fields`` brought."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if id := request_id.get():
            line["request_id"] = id
        line |= vars(record).get("fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def fields(**values: Any) -> dict[str, Any]:
    """``extra`` of a log call: what JSON lines have as fields of their own."""
    return {"fields": values}


def configure(level: str, format: str = "text", *, text: str = "%(levelname)s: %(message)s") -> None:
    """Sends all loggers' lines of at least ``level`` to stderr. Does nothing where logging is set up already."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if format == "json" else TextFormatter(text))
    logging.basicConfig(level=level.upper(), handlers=[handler])
