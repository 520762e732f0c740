"""Tile choices of the small-row projections, for an H200 (132 SMs, 4.6 TB/s): measured entries first, then rules.

Measure with `python -m tokenspeed.bench.gpu.dense` and paste the winners into the tables.
"""

from __future__ import annotations

from dataclasses import dataclass

SMALL_ROWS = 64
"""Up to here a projection is bound by reading W, and ours; above it is the library's."""
FP8_SMALL_ROWS = 128
"""The same for e4m3 weights (128 rows, a layer of 8B: 95.5 us against the library's 115.6)."""
GEMV_ROWS = 1
"""Up to here rows are multiplied and summed with joins and norms inside; above they go to tensor cores (two rows, a
layer of 8B: 117 us, without them 200; of 1B 43 and 59)."""
FP8_GEMV_BYTES = 30 << 20
"""Of e4m3 weights: larger ones go to tensor cores even for one row, as widening them binds the gemv (measured: 28.3 and
18.3 us for 4096 x 14336)."""
FUSED_NORM_ELEMENTS = 32768
"""Rows times columns whose norm every program of a projection may repeat."""


@dataclass(frozen=True)
class GemvTile:
    """block_n rows of W by block_k columns per step of a program. pdl: launch ahead of the kernel in front."""

    block_n: int
    block_k: int
    warps: int
    pdl: bool = True


@dataclass(frozen=True)
class SkinnyTile:
    """block_n rows of W by block_k columns per stage; K split between split_k programs; columns asked for ahead."""

    block_n: int
    block_k: int
    split_k: int
    warps: int
    stages: int
    prefetch: int = 256
    pdl: bool = True


@dataclass(frozen=True)
class PackedTile:
    """block_n rows of packed W by a run of 128 columns per stage; K split between split_k programs; bytes of each row
    asked for ahead."""

    block_n: int
    split_k: int
    warps: int
    stages: int
    prefetch: int = 256
    pdl: bool = True


Key = tuple[int, int, int, int]
"""(rows rounded up to a power of two, rows of W, columns, bytes of an element of W)."""

GEMV: dict[Key, GemvTile] = {
    (1, 2048, 2048, 1): GemvTile(block_n=8, block_k=2048, warps=8, pdl=True),
    (1, 2048, 2048, 2): GemvTile(block_n=16, block_k=512, warps=4, pdl=True),
    (1, 2048, 8192, 1): GemvTile(block_n=8, block_k=2048, warps=8, pdl=True),
    (1, 2048, 8192, 2): GemvTile(block_n=4, block_k=2048, warps=8, pdl=True),
    (1, 3072, 2048, 1): GemvTile(block_n=8, block_k=2048, warps=8, pdl=True),
    (1, 3072, 2048, 2): GemvTile(block_n=4, block_k=1024, warps=4, pdl=True),
    (1, 4096, 4096, 1): GemvTile(block_n=8, block_k=4096, warps=8, pdl=True),
    (1, 4096, 4096, 2): GemvTile(block_n=2, block_k=2048, warps=8, pdl=True),
    (1, 4096, 14336, 1): GemvTile(block_n=8, block_k=2048, warps=8, pdl=True),
    (1, 4096, 14336, 2): GemvTile(block_n=2, block_k=2048, warps=8, pdl=True),
    (1, 6144, 4096, 1): GemvTile(block_n=8, block_k=4096, warps=8, pdl=True),
    (1, 6144, 4096, 2): GemvTile(block_n=8, block_k=1024, warps=4, pdl=True),
    (1, 16384, 2048, 1): GemvTile(block_n=8, block_k=2048, warps=8, pdl=True),
    (1, 16384, 2048, 2): GemvTile(block_n=4, block_k=1024, warps=4, pdl=True),
    (1, 28672, 4096, 1): GemvTile(block_n=8, block_k=4096, warps=8, pdl=True),
    (1, 28672, 4096, 2): GemvTile(block_n=8, block_k=1024, warps=4, pdl=True),
    (1, 128256, 2048, 2): GemvTile(block_n=8, block_k=2048, warps=8, pdl=True),
    (1, 128256, 4096, 2): GemvTile(block_n=4, block_k=1024, warps=4, pdl=True),
}
SKINNY: dict[Key, SkinnyTile] = {
    (16, 2048, 2048, 1): SkinnyTile(block_n=128, block_k=128, split_k=4, warps=8, stages=4, prefetch=512, pdl=True),
    (16, 2048, 2048, 2): SkinnyTile(block_n=64, block_k=128, split_k=4, warps=4, stages=4, prefetch=256, pdl=True),
    (16, 2048, 8192, 1): SkinnyTile(block_n=64, block_k=256, split_k=4, warps=4, stages=4, prefetch=512, pdl=True),
    (16, 2048, 8192, 2): SkinnyTile(block_n=64, block_k=128, split_k=4, warps=4, stages=4, prefetch=0, pdl=True),
    (16, 3072, 2048, 1): SkinnyTile(block_n=64, block_k=128, split_k=2, warps=4, stages=6, prefetch=512, pdl=True),
    (16, 3072, 2048, 2): SkinnyTile(block_n=32, block_k=256, split_k=1, warps=4, stages=4, prefetch=256, pdl=True),
    (16, 4096, 4096, 1): SkinnyTile(block_n=64, block_k=256, split_k=4, warps=4, stages=4, prefetch=512, pdl=True),
    (16, 4096, 4096, 2): SkinnyTile(block_n=16, block_k=512, split_k=1, warps=2, stages=4, prefetch=256, pdl=True),
    (16, 4096, 14336, 1): SkinnyTile(block_n=64, block_k=256, split_k=4, warps=4, stages=4, prefetch=512, pdl=True),
    (16, 4096, 14336, 2): SkinnyTile(block_n=16, block_k=512, split_k=1, warps=2, stages=4, prefetch=256, pdl=True),
    (16, 6144, 4096, 1): SkinnyTile(block_n=64, block_k=256, split_k=1, warps=4, stages=4, prefetch=512, pdl=True),
    (16, 6144, 4096, 2): SkinnyTile(block_n=32, block_k=128, split_k=1, warps=2, stages=6, prefetch=256, pdl=True),
    (16, 16384, 2048, 1): SkinnyTile(block_n=64, block_k=256, split_k=1, warps=4, stages=4, prefetch=512, pdl=True),
    (16, 16384, 2048, 2): SkinnyTile(block_n=64, block_k=128, split_k=1, warps=4, stages=4, prefetch=256, pdl=True),
    (16, 28672, 4096, 1): SkinnyTile(block_n=64, block_k=256, split_k=1, warps=4, stages=4, prefetch=512, pdl=True),
    (16, 28672, 4096, 2): SkinnyTile(block_n=64, block_k=128, split_k=1, warps=4, stages=4, prefetch=256, pdl=True),
    (16, 128256, 2048, 2): SkinnyTile(block_n=64, block_k=128, split_k=1, warps=4, stages=4, prefetch=256, pdl=True),
    (16, 128256, 4096, 2): SkinnyTile(block_n=64, block_k=128, split_k=1, warps=4, stages=4, prefetch=0, pdl=True),
    (32, 2048, 2048, 1): SkinnyTile(block_n=128, block_k=128, split_k=4, warps=8, stages=4, prefetch=512, pdl=True),
    (32, 2048, 2048, 2): SkinnyTile(block_n=64, block_k=64, split_k=4, warps=4, stages=6, prefetch=256, pdl=True),
    (32, 2048, 8192, 1): SkinnyTile(block_n=64, block_k=256, split_k=4, warps=4, stages=4, prefetch=512, pdl=True),
    (32, 2048, 8192, 2): SkinnyTile(block_n=64, block_k=128, split_k=4, warps=4, stages=4, prefetch=0, pdl=True),
    (32, 3072, 2048, 1): SkinnyTile(block_n=64, block_k=128, split_k=2, warps=4, stages=6, prefetch=512, pdl=True),
    (32, 3072, 2048, 2): SkinnyTile(block_n=64, block_k=64, split_k=2, warps=4, stages=6, prefetch=256, pdl=True),
    (32, 4096, 4096, 1): SkinnyTile(block_n=64, block_k=128, split_k=2, warps=4, stages=6, prefetch=512, pdl=True),
    (32, 4096, 4096, 2): SkinnyTile(block_n=64, block_k=128, split_k=2, warps=4, stages=4, prefetch=0, pdl=True),
    (32, 4096, 14336, 1): SkinnyTile(block_n=64, block_k=256, split_k=2, warps=4, stages=4, prefetch=512, pdl=True),
    (32, 4096, 14336, 2): SkinnyTile(block_n=64, block_k=128, split_k=2, warps=4, stages=4, prefetch=0, pdl=True),
    (32, 6144, 4096, 1): SkinnyTile(block_n=64, block_k=256, split_k=1, warps=4, stages=4, prefetch=512, pdl=True),
    (32, 6144, 4096, 2): SkinnyTile(block_n=64, block_k=128, split_k=1, warps=4, stages=4, prefetch=256, pdl=True),
    (32, 16384, 2048, 1): SkinnyTile(block_n=64, block_k=256, split_k=1, warps=4, stages=4, prefetch=512, pdl=False),
    (32, 16384, 2048, 2): SkinnyTile(block_n=64, block_k=128, split_k=1, warps=4, stages=4, prefetch=0, pdl=True),
    (32, 28672, 4096, 1): SkinnyTile(block_n=64, block_k=256, split_k=1, warps=4, stages=4, prefetch=512, pdl=True),
    (32, 28672, 4096, 2): SkinnyTile(block_n=64, block_k=128, split_k=1, warps=4, stages=4, prefetch=256, pdl=True),
    (32, 128256, 2048, 2): SkinnyTile(block_n=128, block_k=64, split_k=1, warps=8, stages=4, prefetch=256, pdl=True),
    (32, 128256, 4096, 2): SkinnyTile(block_n=128, block_k=64, split_k=1, warps=8, stages=4, prefetch=256, pdl=True),
    (128, 4096, 4096, 1): SkinnyTile(block_n=64, block_k=128, split_k=2, warps=4, stages=6, prefetch=256, pdl=True),
    (128, 4096, 14336, 1): SkinnyTile(block_n=64, block_k=128, split_k=2, warps=4, stages=6, prefetch=256, pdl=True),
    (128, 6144, 4096, 1): SkinnyTile(block_n=64, block_k=128, split_k=1, warps=4, stages=6, prefetch=256, pdl=True),
    (128, 28672, 4096, 1): SkinnyTile(block_n=256, block_k=128, split_k=1, warps=8, stages=4, prefetch=256, pdl=True),
}
"""Measured on one H200 with triton 3.6.0: the projections of Llama 3.2 1B and 3.1 8B, in bf16 and fp8."""

_GEMV_TILE_BYTES = 16384
_GEMV_ROW_BYTES = 4096
_WIDE_PROGRAMS = 96
_SKINNY_PROGRAMS = 200
"""Programs wanted: each holds some 64 KiB on the way, so one and a half per SM keep memory busy."""


def gemv_tile(rows: int, n: int, k: int, item: int) -> GemvTile:
    """The tile for 1, 2 or 4 rows against W [n, k] of `item` bytes an element."""
    found = GEMV.get((rows, n, k, item))
    if found is not None:
        return found
    block_k = _columns(k, _GEMV_ROW_BYTES // item)
    block_n = max(2, min(16, _GEMV_TILE_BYTES // (block_k * item) // max(1, rows // 2)))
    while block_n > 2 and n // block_n < 2 * 132:
        block_n //= 2
    warps = max(1, min(8, block_k // 256))
    return GemvTile(block_n, block_k, warps)


def skinny_tile(rows: int, n: int, k: int, item: int, scale_block: int = 0) -> SkinnyTile:
    """The tile for 16 to 128 (padded) rows against W [n, k]; a tile lies within one block of scales along K."""
    found = SKINNY.get((rows, n, k, item))
    if found is not None and not scale_block:
        return found
    if rows <= 16 and n <= 8192 and not scale_block:
        return SkinnyTile(16, 512 // item, 1, 2, 6, prefetch=512 // item)
    if rows > SMALL_ROWS:
        return _wide_tile(n, k, item, scale_block)
    tiles = -(-n // 64)
    split = 1
    while tiles * split < _SKINNY_PROGRAMS and split < 8 and k // (2 * split) >= 512:
        split *= 2
    return SkinnyTile(64, scale_block or 256 // item, split, 4, 4 if rows <= 32 else 3, prefetch=512 // item)


def _wide_tile(n: int, k: int, item: int, scale_block: int) -> SkinnyTile:
    """For 128 rows: K is split until most SMs have a program."""
    split = 1
    while -(-n // 128) * split < _WIDE_PROGRAMS and split < 8 and k // (2 * split) >= 512:
        split *= 2
    return SkinnyTile(128, scale_block or 128 // item, split, 8, 4, prefetch=256 // item)


def packed_tile(rows: int, n: int, k: int, kind: str) -> PackedTile:
    """The tile for 16 to 64 (padded) rows against packed W [n, k] of kind int8, int4 or mxfp4."""
    tiles, split = -(-n // 64), 1
    while tiles * split < _SKINNY_PROGRAMS and split < 8 and k // (2 * split) >= 512:
        split *= 2
    per_part = k // split * (2 if kind == "int8" else 1) // 2
    return PackedTile(64, split, 4, 4, prefetch=256 if per_part >= 256 else 0)


def _columns(k: int, most: int) -> int:
    """The widest tile, a power of two of 256 to `most` columns, that divides k; else one that wastes little."""
    width = most
    while width > 512 and k % width:
        width //= 2
    return width if k % width == 0 else 256
