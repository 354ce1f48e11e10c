"""What attention computes, apart from its arrays."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Form:
    """Of a layer's attention: pages of ``page_size`` slots, logits times ``scale``.

    ``window`` is the number of newest tokens that a row attends to, its own included; None: all. ``softcap`` bounds
    logits: ``softcap * tanh(logit / softcap)``.
    """

    page_size: int
    scale: float
    window: int | None = None
    softcap: float | None = None
