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
