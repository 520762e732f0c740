"""Which kernels run the chosen experts, and in which tiles, for an H200 (132 SMs, 4.6 TB/s)."""

from __future__ import annotations

from dataclasses import dataclass

from tokenspeed.kernels.triton.tiles import GemvTile
from tokenspeed.ops.definitions import distinct_experts

FEW_TOKENS = 4
"""Up to here choices are multiplied one by one, if few experts are chosen twice."""
FEW_ONCE = 0.9
"""Share of the choices that have to be of distinct experts for that, as uniform routing has them."""
_ELEMENTS = 4096
"""Of W in a tile of the kernels for few tokens."""
_PROGRAMS = 2 * 132
_CHOICE_PROGRAMS, _LEAST_PART = 10 * 132, 4 * 128


@dataclass(frozen=True)
class ProductTile:
    """rows of x and block_n rows of W by block_k columns per stage. prefetch: columns of W asked for ahead. stream:
    whether W is read once, so that it need not stay in the second-level cache."""

    rows: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    prefetch: int
    stream: bool


def by_choice(tokens: int, experts: int, k: int, scale_block: int = 0) -> bool:
    """Whether choices are multiplied one by one. scale_block: of the weights, 0 for none."""
    if tokens > FEW_TOKENS or scale_block:
        return False
    return distinct_experts(experts, k, tokens) >= FEW_ONCE * tokens * k


def gate_up_tile(choices: int, n: int, k: int) -> GemvTile:
    """For `choices` rows against gate_up [experts, 2n, k] each."""
    block_k = _columns(k, 1024)
    block_n = max(4, min(16, _ELEMENTS * 2 // block_k))
    while block_n > 4 and choices * 2 * n // block_n < 2 * _PROGRAMS:
        block_n //= 2
    return GemvTile(block_n, block_k, _warps(block_n * block_k))


def down_tile(tokens: int, n: int, k: int) -> GemvTile:
    """For the choices of `tokens` tokens against down [experts, n, k]."""
    block_k = _columns(k, 1024)
    block_n = max(2, min(16, _ELEMENTS // block_k))
    while block_n > 2 and tokens * n // block_n < _PROGRAMS:
        block_n //= 2
    return GemvTile(block_n, block_k, _warps(block_n * block_k))


def product_tile(tokens: int, experts: int, k: int, item: int, scale_block: int = 0) -> ProductTile:
    """For the choices of `tokens` tokens, k each, by weights of `item` bytes an element: a block of choices is as large
    as uniform routing makes an expert's part. A tile lies within one block of scales along the columns."""
    part = tokens * k / distinct_experts(experts, k, tokens)
    rows = next((rows for rows, most in ((16, 10), (32, 24), (64, 96)) if part <= most), 128)
    return tile_of(rows, item, scale_block)


def tile_of(rows: int, item: int, scale_block: int = 0) -> ProductTile:
    """The tile for blocks of 16, 32, 64 or 128 choices."""
    if rows <= 32:
        return ProductTile(rows, 64, scale_block or 256 // item, 4, 4, 512 // item, True)
    narrow = scale_block or 128 // item
    if rows == 64:
        return ProductTile(rows, 128, narrow, 4 if item < 4 else 8, 4, 0, False)
    return ProductTile(rows, 128, narrow, 8, 4 if item < 4 else 3, 0, False)


def choice_tile(choices: int, stored: int) -> ProductTile:
    """For so many choices of a few tokens, one by one, by MXFP4 weights of `stored` rows: wide ones where programs are
    enough with the columns in four parts."""
    if 4 * choices * -(-stored // 64) >= _CHOICE_PROGRAMS:
        return packed_tile_of(8)
    return ProductTile(8, 32, 128, 2, 6, 256, True)


def choice_splits(programs: int, columns: int) -> int:
    """Into how many parts so many programs of `choice_tile` cut the columns: until processors have some ten each, of
    four runs or more."""
    splits = 1
    while programs * splits < _CHOICE_PROGRAMS and columns >= 2 * splits * _LEAST_PART:
        splits *= 2
    return splits


def packed_product_tile(tokens: int, experts: int, k: int) -> ProductTile:
    """As `product_tile`, by MXFP4 weights."""
    part = tokens * k / distinct_experts(experts, k, tokens)
    return packed_tile_of(next((rows for rows, most in ((8, 5), (16, 10), (32, 24), (64, 96)) if part <= most), 128))


def packed_tile_of(rows: int) -> ProductTile:
    """The tile for blocks of 8, 16, 32, 64 or 128 choices by MXFP4 weights, whose runs have 128 columns."""
    if rows <= 16:
        # A warp has 32 rows of W: 184 instructions for 2048 codes, with 16 rows 226, with 64 rows 164.
        return ProductTile(rows, 64, 128, 2, 4, 256, True)
    if rows == 32:
        return ProductTile(rows, 128, 128, 4, 4, 256, True)
    return ProductTile(rows, 128, 128, 8, 3, 0, False)


def _columns(k: int, most: int) -> int:
    """The widest tile of at most `most` columns, a power of two, that wastes no more than a third of its threads."""
    width = most
    while width > 256 and 3 * -(-k // width) * width > 4 * k:
        width //= 2
    return width


def _warps(elements: int) -> int:
    return max(1, min(8, elements // 1024))
