"""Measurements against other servers, each in one run on one machine."""

from pippin.backend import preload_openblas

HAS_OPENBLAS = preload_openblas()  # before any module here imports MLX
