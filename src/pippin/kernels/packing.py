"""Slots of quantized numbers: how a token's K or V lies in a pool of words, and plain MLX that writes and reads it.

A slot is a line of 32-bit words: every head's numbers, packed, then a word for each group of numbers that share a
scale, then zeros up to whole 16 bytes. So a token's scales come with its numbers, and a pool stays one array.

- ``int8``: a number is ``scale * (code - 128)``, a group is a head, its word the scale as float32.
- ``fp8``: ``scale * e4m3(code)`` (OCP 8-bit floating point, arXiv 2209.05433), with the same groups and words.
- ``int4``: ``scale * code + least``, a group is 32 numbers (16 or 8 where those do not divide a head), its word the
  scale and the least number as bfloat16, the scale in the upper half.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import mlx.core as mx

Packing = Literal["int8", "int4", "fp8"]

PACKINGS: tuple[Packing, ...] = ("int8", "int4", "fp8")
_LARGEST = {"int8": 127.0, "fp8": 448.0}
_TOP_HALF = 0xFFFF0000


@dataclass(frozen=True, slots=True)
class Line:
    """The layout of one slot's K, or V: ``heads`` of ``dim`` numbers, which must be a multiple of 8."""

    packing: Packing
    heads: int
    dim: int

    @property
    def bits(self) -> int:
        return 4 if self.packing == "int4" else 8

    @property
    def group(self) -> int:
        """Numbers of a head that share a scale."""
        return next(n for n in (32, 16, 8) if self.dim % n == 0) if self.packing == "int4" else self.dim

    @property
    def number_words(self) -> int:
        return self.heads * self.dim * self.bits // 32

    @property
    def scale_words(self) -> int:
        return self.heads * self.dim // self.group

    @property
    def words(self) -> int:
        """All of the line, the zeros at its end too."""
        return -(-(self.number_words + self.scale_words) // 4) * 4

    @property
    def nbytes(self) -> int:
        return 4 * self.words

    def pack(self, x: mx.array) -> mx.array:
        """x [.., heads, dim] as lines of words [.., words] uint32. What is not a number makes its whole group so."""
        lead = x.shape[:-2]
        groups = x.astype(mx.float32).reshape(*lead, self.scale_words, self.group)
        codes, scales = _codes4(groups) if self.packing == "int4" else _codes8(groups, self.packing)
        parts = [codes.reshape(*lead, -1).view(mx.uint32), scales.reshape(*lead, -1)]
        spare = self.words - self.number_words - self.scale_words
        return mx.concatenate([*parts, *([mx.zeros((*lead, spare), mx.uint32)] if spare else [])], axis=-1)

    def unpack(self, lines: mx.array, dtype: mx.Dtype) -> mx.array:
        """Lines [.., words] as numbers [.., heads, dim] of ``dtype``."""
        lead = lines.shape[:-1]
        codes = mx.contiguous(lines[..., : self.number_words]).view(mx.uint8)
        scales = mx.contiguous(lines[..., self.number_words : self.number_words + self.scale_words])[..., None]
        if self.packing == "int4":
            codes = mx.stack([codes & 15, codes >> 4], axis=-1)
            numbers = codes.reshape(*lead, -1, self.group).astype(mx.float32)
            x = numbers * (scales & _TOP_HALF).view(mx.float32) + (scales << 16).view(mx.float32)
        else:
            codes = codes.reshape(*lead, -1, self.group)
            numbers = mx.from_fp8(codes, mx.float32) if self.packing == "fp8" else codes.astype(mx.float32) - 128
            x = numbers * scales.view(mx.float32)
        return x.astype(dtype).reshape(*lead, self.heads, self.dim)


def _codes8(groups: mx.array, packing: Packing) -> tuple[mx.array, mx.array]:
    """Codes uint8 [.., groups, n] and the words of their scales uint32 [.., groups, 1]."""
    scales = mx.max(mx.abs(groups), axis=-1, keepdims=True) * (1 / _LARGEST[packing])
    near = groups * _inverse(scales)
    codes = mx.to_fp8(near) if packing == "fp8" else (mx.round(near) + 128).astype(mx.uint8)
    return codes, scales.view(mx.uint32)


def _codes4(groups: mx.array) -> tuple[mx.array, mx.array]:
    """Two codes a byte, uint8 [.., groups, n / 2], the first in the lower half; words as ``_codes8``.

    Both numbers of a word are rounded so that the codes still reach from the least to the largest.
    """
    least = mx.min(groups, axis=-1, keepdims=True)
    bits = least.view(mx.uint32)
    down = mx.where(least < 0, bits + 0xFFFF, bits) & _TOP_HALF
    least = down.view(mx.float32)
    wide = (mx.max(groups, axis=-1, keepdims=True) - least) * (1 / 15)
    up = (wide.view(mx.uint32) + 0xFFFF) & _TOP_HALF
    codes = mx.clip(mx.round((groups - least) * _inverse(up.view(mx.float32))), 0, 15).astype(mx.uint8)
    pairs = codes.reshape(*codes.shape[:-1], -1, 2)
    return pairs[..., 0] | (pairs[..., 1] << 4), up | (down >> 16)


def _inverse(scales: mx.array) -> mx.array:
    return mx.where(scales > 0, 1 / scales, 0.0)


@lru_cache(maxsize=64)
def line(packing: Packing, heads: int, dim: int) -> Line:
    """The one ``Line`` of these."""
    return Line(packing, heads, dim)


@dataclass(frozen=True, slots=True, eq=False)
class PackedPool:
    """A pool of quantized K, or V: ``lines`` [slots, words] uint32, which reads as [slots, heads, dim] of ``dtype``."""

    lines: mx.array
    layout: Line
    dtype: mx.Dtype

    @staticmethod
    def zeros(slots: int, layout: Line, dtype: mx.Dtype) -> PackedPool:
        return PackedPool(mx.zeros((slots, layout.words), mx.uint32), layout, dtype)

    @property
    def shape(self) -> tuple[int, int, int]:
        """As of the array that it stands for."""
        return self.lines.shape[0], self.layout.heads, self.layout.dim

    def __getitem__(self, slots: mx.array) -> mx.array:
        """The numbers of ``slots`` [..] int32: [.., heads, dim]."""
        return self.layout.unpack(self.lines[slots], self.dtype)

    def __setitem__(self, slots: mx.array, x: mx.array) -> None:
        """Stores x [n, heads, dim] at ``slots`` [n] int32, in the same buffer where nothing else holds it."""
        self.lines[slots] = self.layout.pack(x)


def packed(numbers: mx.array, packing: Packing) -> PackedPool:
    """A quantized pool that holds ``numbers`` [slots, heads, dim]."""
    layout = line(packing, numbers.shape[1], numbers.shape[2])
    return PackedPool(layout.pack(numbers), layout, numbers.dtype)


Pool = mx.array | PackedPool


def storage(pool: Pool) -> mx.array:
    """The array that a pool's slots lie in."""
    return pool.lines if isinstance(pool, PackedPool) else pool


def packing_of(pool: Pool) -> Packing | None:
    return pool.layout.packing if isinstance(pool, PackedPool) else None
