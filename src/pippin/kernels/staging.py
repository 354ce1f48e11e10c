"""The launch that copies what a recorded step reads to where it reads it."""

from __future__ import annotations

import mlx.core as mx

from pippin.kernels.launch import Launch, Launcher, Source

STAGE = Source("stage", "stage", ("table", "packed", "table_place", "packed_place", "sizes"), ("token",))
_THREADS = 256

Pair = tuple[mx.array, mx.array]


def stage(launch: Launcher, given: Pair, places: Pair, sizes: mx.array) -> mx.array:
    """Copies two int32 arrays into ``places``, which are as long; ``sizes`` int32 [8] begins with both lengths.

    Lazy: it is done where what this returns, int32 [8], is evaluated. MLX doesn't know that ``places`` change.
    """
    blocks = -(-max(place.size for place in places) // _THREADS)
    what = Launch(STAGE, (("THREADS", _THREADS),), (blocks, 1), _THREADS, (((8,), mx.int32),))
    return launch(what, [*given, *places, sizes])[0]
