"""Where a shared library of this process keeps the address of a function that it calls: ELF on 64 bits, by glibc."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Tags of the dynamic section (System V ABI, "Dynamic Linking"), and of dlinfo.
_END, _RELOCATION_BYTES, _STRINGS, _SYMBOLS, _RELOCATIONS = 0, 2, 5, 6, 23
_LINK_MAP = 2
_ENTRY, _SYMBOL = 24, 24


class Slot:
    """The place that a library reads the address of one of its functions from, each time it calls it."""

    def __init__(self, address: int) -> None:
        self._place = ctypes.c_uint64.from_address(address)

    @contextmanager
    def replaced(self, function: Callable[..., Any]) -> Iterator[None]:
        """While it lasts, the library calls ``function``, one of ctypes', in place of the one it calls otherwise."""
        before, address = self._place.value, ctypes.cast(function, ctypes.c_void_p).value  # type: ignore[arg-type]
        assert address is not None
        self._place.value = address
        try:
            yield
        finally:
            self._place.value = before


def jump_slot(library: ctypes.CDLL, name: str) -> Slot | None:
    """That of ``name`` in ``library``; None if it doesn't call it so, or may not be told another."""
    found = ctypes.c_void_p()
    tell = ctypes.CDLL(None).dlinfo
    tell.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p]
    if tell(library._handle, _LINK_MAP, ctypes.byref(found)) or not found.value:
        return None
    base, entries = _word(found.value), _word(found.value + 16)  # of struct link_map: l_addr, l_name, l_ld
    tags = dict(_tags(entries))
    if not {_RELOCATION_BYTES, _STRINGS, _SYMBOLS, _RELOCATIONS} <= tags.keys():
        return None
    for entry in range(tags[_RELOCATIONS], tags[_RELOCATIONS] + tags[_RELOCATION_BYTES], _ENTRY):
        place, info = _word(entry), _word(entry + 8)
        at = tags[_STRINGS] + ctypes.c_uint32.from_address(tags[_SYMBOLS] + (info >> 32) * _SYMBOL).value
        if ctypes.string_at(at) == name.encode():
            return Slot(base + place) if _writable(base + place) else None
    return None


def _tags(at: int) -> Iterator[tuple[int, int]]:
    while (tag := _word(at)) != _END:
        yield tag, _word(at + 8)
        at += 16


def _writable(address: int) -> bool:
    """Whether this process may write there: a library that is bound when it is loaded locks its places."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, rights = line.split()[:2]
        first, end = (int(part, 16) for part in span.split("-"))
        if first <= address < end:
            return rights.startswith("rw")
    return False


def _word(address: int) -> int:
    return ctypes.c_uint64.from_address(address).value
