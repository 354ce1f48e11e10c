"""From configuration classes to command-line options: each field is one option, and exists exactly once."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_type_hints

import typer

from pippin.config import EngineConfig, SamplingOptions, ServerConfig, flag_of

PANELS: dict[type, str] = {
    EngineConfig: "Model and engine",
    ServerConfig: "Server",
    SamplingOptions: "Sampling",
}
"""Headings in ``--help``; a class that is not here stands under ``Options``."""


def with_options(function: Callable[..., None]) -> Callable[..., None]:
    """Turns each parameter that is annotated with a dataclass into one option a field (see ``config.option``).

    Two classes of one command must not share a field's name.
    """
    own = inspect.signature(function, eval_str=True)
    groups: dict[str, type[Any]] = {
        name: p.annotation
        for name, p in own.parameters.items()
        if isinstance(p.annotation, type) and dataclasses.is_dataclass(p.annotation)
    }
    fields = [(cls, f) for cls in groups.values() for f in dataclasses.fields(cls)]

    @functools.wraps(function)
    def command(**given: Any) -> None:
        for name, cls in groups.items():
            given[name] = cls(**{f.name: given.pop(f.name) for f in dataclasses.fields(cls)})
        function(**given)

    parameters = [p for name, p in own.parameters.items() if name not in groups]
    parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in parameters] + [_parameter(cls, f) for cls, f in fields]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def _parameter(cls: type, field: dataclasses.Field[Any]) -> inspect.Parameter:
    kind: Any = get_type_hints(cls)[field.name]
    if choices := field.metadata["choices"]:
        chosen: Any = Literal.__getitem__(choices)
        kind = chosen | None if NoneType in get_args(kind) else chosen
    spelled = [flag_of(field.name), *([field.metadata["flag"]] if field.metadata["flag"] else [])]
    declared = typer.Option(*spelled, help=field.metadata["help"], rich_help_panel=PANELS.get(cls))
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=Annotated[kind, declared]
    )
