"""How the channels of a group norm are shared among the programs of `workers.kernels`, each of which has whole groups."""

from __future__ import annotations

import math
from typing import NamedTuple

CHANNELS, PIXELS, PIXELS_BACKWARD = 64, 64, 32
"""A tile has at most so many channels, or those of one group, or twice as many where that lets them be moved a unit at a time; and at most
so many pixels. The best of ten sizes on an H200."""
UNIT = 8
"""Channels that are moved at once, 16 bytes in half precision, where groups of them do not become too wide."""


class Tiles(NamedTuple):
    unit: int
    """Channels that are moved at once; a program begins at a multiple of it."""
    width: int
    """Channels of a group."""
    span: int
    """Channels of a program, of all but perhaps the last."""
    programs: int
    channels: int
    pixels: int
    """Of a tile, both powers of two."""

    @classmethod
    def of(cls, channels: int, groups: int, pixels: int) -> Tiles:
        width = channels // groups
        aligned = channels % UNIT == 0 and math.lcm(width, UNIT) <= 2 * CHANNELS
        unit = UNIT if aligned else math.gcd(width, UNIT)
        least = math.lcm(width, unit)  # a program begins at a whole group and at a whole unit
        programs = _share(channels, max(CHANNELS // least, 1) * least)
        span = _share(channels // least, programs) * least
        return cls(unit, width, span, _share(channels, span), max(16, _power(span)), min(PIXELS, _power(pixels)))


def _share(whole: int, part: int) -> int:
    return -(-whole // part)


def _power(number: int) -> int:
    """The next power of two."""
    return 1 << (number - 1).bit_length()
