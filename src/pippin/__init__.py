"""Pippin."""
