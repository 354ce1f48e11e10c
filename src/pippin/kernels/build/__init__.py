"""Kernels compiled ahead of time and kept. See docs/kernels.md.

``source``: of what. ``nvrtc``, ``cuda``, ``metal``: how. ``toolchain``: with what. ``variants``: which. ``store``:
where. ``prebuilt``: how a launch finds them.
"""
