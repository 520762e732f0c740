"""Tile choices of the attention kernels, in one place. No triton here."""

from __future__ import annotations

from typing import NamedTuple

import torch

HIP = torch.version.hip is not None
HIP_STAGES = 2
"""AMD's compiler takes 64 KiB of shared memory at most on gfx942, and pipelines by direct loads."""


class DecodeTile(NamedTuple):
    """splits: most programs that share one sequence's keys. keys: per block. min_blocks: blocks below which a split is
    not worth its combination. A sequence of n blocks uses min(splits, ceil(n / min_blocks)) of them."""

    splits: int
    keys: int
    min_blocks: int
    warps: int
    stages: int


class PrefillTile(NamedTuple):
    """rows: query tokens times query heads of one key head. keys: per block."""

    rows: int
    keys: int
    warps: int
    stages: int


MAX_SPLITS = 128
MAX_HEAD_DIM = 256
MAX_GROUP = 64
"""Query heads of one key head."""

DECODE: dict[int, DecodeTile] = {
    1: DecodeTile(64, 64, 1, 4, 5),
    2: DecodeTile(32, 64, 1, 4, 5),
    4: DecodeTile(32, 64, 1, 4, 5),
    8: DecodeTile(16, 64, 2, 4, 5),
    16: DecodeTile(16, 64, 4, 4, 5),
    32: DecodeTile(8, 64, 4, 4, 5),
    64: DecodeTile(8, 64, 8, 4, 5),
    128: DecodeTile(8, 64, 16, 4, 5),
}
"""By the most sequences of the bucket, for 8 key heads of 256 bytes or less; fewer key heads take more splits.

Page ids share the stages: with n of them, (n - 1) // 2 blocks of keys are under way."""
MANY_SEQUENCES, FEW_STAGES = 8, 3
"""From so many sequences on, blocks of 16 KiB have fewer stages, which lets more programs run (8B, 1024 tokens,
8 / 32 / 128 sequences: 15.2 / 42.2 / 138 us, and 18.6 / 44.8 / 141 with five)."""

PREFILL: dict[tuple[int, int], PrefillTile] = {
    (64, 2): PrefillTile(128, 64, 4, 3),
    (128, 2): PrefillTile(128, 64, 8, 3),
    (256, 2): PrefillTile(128, 32, 8, 2),
    (64, 4): PrefillTile(64, 32, 4, 2),
    (128, 4): PrefillTile(64, 32, 4, 1),
    (256, 4): PrefillTile(64, 16, 4, 1),
}
"""By padded head_dim and bytes of the compute dtype."""


def pad(n: int) -> int:
    """The next power of two."""
    return 1 << (n - 1).bit_length()


def decode_tile(sequences: int, kv_heads: int, head_dim: int, itemsize: int, hip: bool = HIP) -> DecodeTile:
    """Tile for a bucket of so many decoding sequences; itemsize: bytes of the wider of compute and KV dtype."""
    bucket = next((most for most in DECODE if most >= sequences), max(DECODE))
    tile = DECODE[bucket]
    shrink = max(1, pad(head_dim) * itemsize // 256)
    splits = min(MAX_SPLITS, max(1, tile.splits * 8 // kv_heads))
    many = bucket >= MANY_SEQUENCES and pad(head_dim) * itemsize >= 256
    keys, stages = max(16, tile.keys // shrink), HIP_STAGES if hip else FEW_STAGES if many else tile.stages
    return tile._replace(splits=splits, keys=keys, min_blocks=tile.min_blocks * shrink, stages=stages)


def prefill_tile(head_dim: int, itemsize: int, hip: bool = HIP) -> PrefillTile:
    """Tile for a head_dim up to 256; itemsize: bytes of the compute dtype."""
    tile = PREFILL[max(64, pad(head_dim)), itemsize]
    return tile._replace(stages=min(tile.stages, HIP_STAGES)) if hip else tile


def item_tokens(heads: int, kv_heads: int, head_dim: int, itemsize: int) -> int:
    """Most query tokens of one work item of the prefill kernel."""
    return prefill_tile(head_dim, itemsize).rows // pad(heads // kv_heads)


def max_items(tokens: int, rows: int, tokens_per_item: int) -> int:
    """Size of a work list that any step of up to `tokens` tokens in up to `rows` rows fits in, padding included."""
    return tokens // tokens_per_item + 2 * rows
