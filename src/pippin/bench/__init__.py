"""Measurements: one batch without a server, the engine alone, a server under load. The results are lines of JSON."""
