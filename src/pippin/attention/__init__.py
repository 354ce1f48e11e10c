"""Attention backends: ways to run one forward over works of many requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import mlx.core as mx

from pippin.attention.latent import Latent
from pippin.attention.padded import Padded
from pippin.attention.rows import Rows
from pippin.attention.solo import Solo
from pippin.cache.pool import KVPool
from pippin.errors import ConfigError
from pippin.inputs import Step
from pippin.models.seam import Seam
from pippin.types import Work


class AttentionBackend(Protocol):
    """What a backend provides; ``name`` is its spelling for ``--attention-backend``."""

    @property
    def name(self) -> str: ...

    def forwards(self, works: Sequence[Work]) -> list[Sequence[Work]]:
        """Splits a step's works over forwards, to run in this order; most backends need one.

        A work may read slots that another one of this step writes: its forward must be the same, or come later.
        """
        ...

    def step(self, works: Sequence[Work], last_token: mx.array, pool: KVPool) -> Step:
        """Lays one forward's works out as arrays, to attend over ``pool``."""
        ...

    def layers(self, step: Step, pool: KVPool, seam: Seam) -> list[object]:
        """The cache objects for the model's layers, in the order of its own ``make_cache()``."""
        ...


_BACKENDS: dict[str, AttentionBackend] = {
    backend.name: backend
    for backend in (
        Rows(),
        Latent(),
        Padded("padded", grouped=False),
        Padded("padded_grouped", grouped=True),
        Solo("solo", padded=False),
        Solo("solo_padded", padded=True),
        Solo("alone", padded=True, alone=True),
    )
}


def register_attention_backend(backend: AttentionBackend) -> None:
    """Adds a backend, or replaces the one of that name; when choosing, the newest is tried last."""
    _BACKENDS[backend.name] = backend


def backends_to_try(name: str) -> list[AttentionBackend]:
    """The backends that ``--attention-backend`` allows: all for ``mlx``, else the named one."""
    if name == "mlx":
        return list(_BACKENDS.values())
    if name not in _BACKENDS:
        raise ConfigError(f"must be one of {', '.join(backend_names())}, not {name!r}", "--attention-backend")
    return [_BACKENDS[name]]


def backend_names() -> list[str]:
    """Every spelling that ``--attention-backend`` takes."""
    return ["mlx", *_BACKENDS]
