"""Tile choices of the attention kernels, in one place. No triton here."""

from __future__ import annotations

from typing import NamedTuple

import torch

HIP = torch.version.hip is not None
HIP_STAGES, HIP_PREFILL_KEYS = 2, 64
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
    1: DecodeTile(64, 64, 1, 4, 2),
    2: DecodeTile(32, 64, 1, 4, 2),
    4: DecodeTile(32, 64, 1, 4, 2),
    8: DecodeTile(16, 64, 2, 4, 2),
    16: DecodeTile(16, 64, 5, 4, 2),
    32: DecodeTile(8, 64, 9, 4, 2),
    64: DecodeTile(8, 64, 18, 4, 2),
    128: DecodeTile(8, 64, 18, 4, 3),
}
"""By the most sequences of the bucket, for 8 key heads of 256 bytes; fewer key heads take more splits. 8B, 1088 tokens,
8 / 16 / 32 / 64 / 128 sequences: 16.3 / 27.0 / 43.4 / 78.9 / 145 us.

Page ids share the stages: with n of them, (n - 1) // 2 blocks of keys are under way. Few let more programs run."""
NARROW: dict[int, DecodeTile] = DECODE | {
    16: DecodeTile(16, 64, 3, 4, 2),
    32: DecodeTile(8, 64, 6, 4, 2),
    64: DecodeTile(8, 64, 6, 4, 2),
    128: DecodeTile(8, 64, 9, 4, 2),
}
"""The same for heads of up to 128 bytes. 1B: 11.3 / 17.1 / 27.0 / 47.3 / 88 us."""

PREFILL: dict[tuple[int, int], PrefillTile] = {
    (64, 2): PrefillTile(128, 64, 8, 2),
    (128, 2): PrefillTile(128, 128, 8, 3),
    (256, 2): PrefillTile(128, 32, 8, 2),
    (64, 4): PrefillTile(64, 32, 4, 2),
    (128, 4): PrefillTile(64, 32, 4, 1),
    (256, 4): PrefillTile(64, 16, 4, 1),
}
"""By padded head_dim and bytes of the compute dtype. 8B, 512 tokens after 7,680: 188 us, with blocks of 64 keys 235."""


def pad(n: int) -> int:
    """The next power of two."""
    return 1 << (n - 1).bit_length()


def decode_tile(sequences: int, kv_heads: int, head_dim: int, itemsize: int, hip: bool = HIP) -> DecodeTile:
    """Tile for a bucket of so many decoding sequences; itemsize: bytes of the wider of compute and KV dtype."""
    bucket = next((most for most in DECODE if most >= sequences), max(DECODE))
    tile = (NARROW if pad(head_dim) * itemsize <= 128 else DECODE)[bucket]
    shrink = max(1, pad(head_dim) * itemsize // 256)
    splits = min(MAX_SPLITS, max(1, tile.splits * 8 // kv_heads))
    keys, stages = max(16, tile.keys // shrink), min(tile.stages, HIP_STAGES) if hip else tile.stages
    return tile._replace(splits=splits, keys=keys, min_blocks=tile.min_blocks * shrink, stages=stages)


def prefill_tile(head_dim: int, itemsize: int, hip: bool = HIP) -> PrefillTile:
    """Tile for a head_dim up to 256; itemsize: bytes of the compute dtype."""
    tile = PREFILL[max(64, pad(head_dim)), itemsize]
    return tile._replace(stages=min(tile.stages, HIP_STAGES), keys=min(tile.keys, HIP_PREFILL_KEYS)) if hip else tile


def item_tokens(heads: int, kv_heads: int, head_dim: int, itemsize: int) -> int:
    """Most query tokens of one work item of the prefill kernel."""
    return prefill_tile(head_dim, itemsize).rows // pad(heads // kv_heads)


def max_items(tokens: int, rows: int, tokens_per_item: int) -> int:
    """Size of a work list that any step of up to `tokens` tokens in up to `rows` rows fits in, padding included."""
    return tokens // tokens_per_item + 2 * rows
