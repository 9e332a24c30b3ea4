"""Tiles cover every channel once, in whole groups and units, and are no larger than they have to be."""

from __future__ import annotations

import pytest

from workers.tiles import CHANNELS, PIXELS, UNIT, Tiles

NORMS = [
    (96, 32),
    (48, 16),
    (24, 8),
    (192, 32),
    (288, 32),
    (384, 32),
    (672, 32),
    (1120, 32),
    (1344, 32),
    (1568, 32),
    (1240, 8),
    (15, 5),
    (36, 3),
]


@pytest.mark.parametrize(("channels", "groups"), [*NORMS, *((32 * width, 32) for width in range(1, 64)), (2048, 1), (1, 1)])
def test_programs_have_whole_groups_and_units_and_all_channels_in_tiles_that_fit(channels, groups):
    found = Tiles.of(channels, groups, 1024)
    assert found.width * groups == channels
    assert found.span % found.width == 0 and found.span % found.unit == 0 and channels % found.unit == 0
    assert (found.programs - 1) * found.span < channels <= found.programs * found.span
    assert found.span <= found.channels <= max(2 * CHANNELS, 2 * found.width, 16)
    assert found.channels & (found.channels - 1) == 0


@pytest.mark.parametrize(("channels", "groups"), [(96, 32), (288, 32), (192, 32), (48, 16), (72, 12), (1024, 32)])
def test_channels_are_moved_a_unit_at_a_time_where_groups_allow(channels, groups):
    assert Tiles.of(channels, groups, 64).unit == UNIT


def test_a_tile_has_no_more_pixels_than_there_are():
    assert [Tiles.of(96, 32, pixels).pixels for pixels in (1, 16, 25, 49, 4096)] == [1, 16, 32, 64, PIXELS]
