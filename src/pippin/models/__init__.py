"""Models: load a checkpoint, quantize it while loading, and the seam through which layers reach the KV store."""

from __future__ import annotations

from pippin.backend import import_mlx_lm

import_mlx_lm()
