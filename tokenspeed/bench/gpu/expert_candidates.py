"""Tiles worth timing for the experts of a layer."""

from __future__ import annotations

from collections.abc import Iterator

from tokenspeed.kernels.triton.expert_tiles import ProductTile
from tokenspeed.kernels.triton.tiles import GemvTile

_FIRST = ((8, 1024, 4), (4, 1024, 4), (16, 512, 4), (8, 2048, 8), (4, 2048, 8), (8, 512, 4), (16, 1024, 8))
_SECOND = ((4, 1024, 4), (2, 1024, 2), (8, 1024, 8), (8, 512, 4), (4, 512, 2), (16, 256, 4), (8, 256, 2))
"""(rows of W, columns, warps) of gate and up, and of down."""
_PRODUCTS = {
    16: ((64, 256, 4, 4), (64, 256, 4, 3), (64, 512, 4, 3), (64, 128, 4, 6), (32, 512, 4, 4), (32, 256, 2, 6),
         (128, 128, 4, 4), (128, 256, 8, 3), (128, 256, 4, 4)),
    32: ((64, 256, 4, 4), (64, 128, 4, 6), (128, 128, 4, 4), (128, 256, 8, 3)),
    64: ((64, 128, 4, 4), (128, 128, 4, 4), (128, 128, 8, 4), (128, 64, 4, 4)),
    128: ((128, 128, 8, 4), (128, 128, 8, 3), (128, 64, 8, 4), (64, 128, 4, 4)),
}  # fmt: skip
"""(rows of W, bytes of a row's tile, warps, stages) by choices of a block."""

_PACKED = {
    8: ((64, 2, 4), (64, 2, 6), (128, 2, 4), (128, 4, 4), (64, 1, 4), (32, 1, 6), (32, 2, 6), (16, 1, 8)),
    16: ((64, 2, 4), (64, 2, 6), (128, 2, 4), (128, 4, 4), (64, 1, 4), (32, 2, 6)),
    32: ((128, 4, 4), (128, 4, 3), (256, 8, 3), (64, 4, 4), (64, 2, 4), (128, 8, 4)),
    64: ((64, 4, 3), (64, 4, 4), (128, 8, 3), (128, 8, 4), (128, 4, 3)),
    128: ((128, 8, 2), (128, 8, 3), (128, 4, 3), (64, 4, 3), (256, 8, 2)),
}
"""(rows of W, warps, stages) by choices of a block, of MXFP4 weights."""


Splits = tuple[int, int]


def packed_choice_candidates() -> Iterator[tuple[ProductTile | None, ProductTile | None, Splits | None]]:
    """Tiles of gate and up, and of down, of MXFP4 weights, and parts of their columns; None for the rules'."""
    for splits in ((1, 1), (1, 2), (2, 2), (2, 4), (4, 2), (4, 4), (4, 8), (8, 8)):
        yield None, None, splits
    for tile in _packed(8):
        yield tile, None, None
        yield None, tile, None


def packed_candidates(tokens: int) -> Iterator[ProductTile]:
    """For MXFP4 weights."""
    for rows in _PACKED:
        if rows <= 32 if tokens <= 150 else rows >= 32:
            yield from _packed(rows)


def _packed(rows: int) -> Iterator[ProductTile]:
    for block_n, warps, stages in _PACKED[rows]:
        for prefetch in (0, 256) if rows <= 32 else (0,):
            yield ProductTile(rows, block_n, 128, warps, stages, prefetch, rows <= 32)


def choice_candidates() -> Iterator[tuple[GemvTile | None, GemvTile | None]]:
    """Tiles of gate and up, and of down; None for the rule's."""
    yield from ((GemvTile(*shape), None) for shape in _FIRST)
    yield from ((None, GemvTile(*shape)) for shape in _SECOND)


def product_candidates(tokens: int, item: int) -> Iterator[ProductTile]:
    """For weights of `item` bytes an element."""
    for rows, shapes in _PRODUCTS.items():
        if rows < 64 if tokens <= 300 else rows >= 32:
            for block_n, width, warps, stages in shapes:
                streams = (True,) if rows <= 32 else (False,)
                for prefetch in (0, 512 // item) if rows <= 32 else (0,):
                    yield from (ProductTile(rows, block_n, width // item, warps, stages, prefetch, s) for s in streams)
