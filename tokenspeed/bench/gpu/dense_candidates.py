"""Tiles worth timing for the small-row projections; the first of a list is the one to compare variants with."""

from __future__ import annotations

from dataclasses import replace

from tokenspeed.kernels.triton.tiles import GemvTile, SkinnyTile

_GEMV = {
    (1, 2): ((4, 2048, 8), (2, 2048, 8), (8, 2048, 8), (4, 1024, 4), (8, 1024, 4), (16, 512, 4), (2, 4096, 8)),
    (2, 2): ((4, 2048, 8), (2, 2048, 8), (8, 1024, 8), (4, 1024, 4)),
    (4, 2): ((2, 2048, 8), (4, 1024, 8), (4, 512, 4)),
    (1, 1): ((4, 4096, 8), (2, 4096, 8), (8, 4096, 8), (8, 2048, 8), (4, 2048, 8), (16, 1024, 8)),
    (2, 1): ((4, 4096, 8), (2, 4096, 8), (4, 2048, 8), (8, 2048, 8)),
    (4, 1): ((2, 4096, 8), (4, 2048, 8), (4, 1024, 4)),
}
"""(rows of W, columns, warps) by rows of x and bytes of an element."""

_NARROW = ((16, 512, 1, 2, 6), (16, 1024, 1, 2, 4), (32, 512, 1, 4, 4), (32, 256, 1, 2, 6), (16, 512, 2, 2, 6))
"""(rows of W, bytes of a row's tile, split of K, warps, stages)."""
_WIDE = ((128, 4), (128, 6), (256, 3))
"""(bytes of a row's tile, stages) of products with more than 64 rows."""


def gemv_candidates(rows: int, item: int) -> list[GemvTile]:
    """For 1, 2 or 4 rows and elements of `item` bytes."""
    tiles = [GemvTile(*numbers) for numbers in _GEMV[rows, item]]
    return [*tiles, replace(tiles[0], pdl=False)]


def skinny_candidates(rows: int, n: int, k: int, item: int) -> list[SkinnyTile]:
    """For 16 to 128 padded rows against W [n, k]."""
    if rows > 64:
        return _wide_candidates(n, k, item)
    stages = 4 if rows <= 32 else 3
    splits = [s for s in (1, 2, 4, 8) if 96 <= -(-n // 64) * s <= 1024 and k // s >= 512] or [1]
    tiles = [SkinnyTile(64, 256 // item, s, 4, stages) for s in splits]
    tiles += [SkinnyTile(64, 128 // item, splits[0], 4, 6), SkinnyTile(128, 128 // item, splits[-1], 8, 4)]
    if rows <= 32:
        tiles += [SkinnyTile(bn, width // item, s, warps, depth) for bn, width, s, warps, depth in _NARROW]
    wide = [replace(tile, prefetch=512 // item) for tile in tiles]
    return [*wide, replace(wide[0], prefetch=0), replace(wide[0], pdl=False)]


def _wide_candidates(n: int, k: int, item: int) -> list[SkinnyTile]:
    """A tile of W and one of x lie in shared memory per stage, and sums fill the registers. Each program reads all of
    x from the second-level cache: the more rows of W it has, the less that is beside W."""
    tiles = []
    for block_n, warps in ((64, 4), (128, 8), (256, 8)):
        splits = [s for s in (1, 2, 4, 8) if 96 <= -(-n // block_n) * s <= 600 and k // s >= 512] or [1]
        shapes = _WIDE if block_n < 256 else _WIDE[:1]  # more does not fit
        for split in splits:
            tiles += [SkinnyTile(block_n, width // item, split, warps, stages) for width, stages in shapes]
    return [replace(tile, prefetch=256 // item) for tile in tiles]
