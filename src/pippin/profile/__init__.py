"""Where time goes: a timeline of both processes, and what the device's own profiler captures.

``timeline`` records spans, ``steps`` those of the engine, ``control`` starts, joins and ends a profile from the HTTP
process, ``trace`` writes it for Perfetto and chrome://tracing, ``summary`` reads it again. For steps without an engine
(``pippin bench one-batch``): ``stage.profiled``.
"""
