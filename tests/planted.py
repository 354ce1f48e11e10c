"""Faults put into a kernel's source, to see that its self-check finds them."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from pippin.kernels.host import host_launcher
from pippin.kernels.launch import Launcher


def assert_found(line: str, planted: str, passes: Callable[[Launcher], bool]) -> None:
    """With ``planted`` in place of ``line`` a check fails in one of three orders of threads."""
    seen = []

    def edit(text: str) -> str:
        seen.append(line in text)
        return text.replace(line, planted)

    with mx.stream(mx.cpu):
        found = [passes(host_launcher(schedule, seed, edit)) for schedule, seed in ((0, 0), (1, 0), (2, 3))]
    assert any(seen), "the line is in no source that was compiled"
    assert not all(found)
