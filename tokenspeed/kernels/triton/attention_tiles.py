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


class FusedTile(NamedTuple):
    """Of the kernel that does a decode step's rope, KV write and attention at once. splits, keys, min_blocks, warps,
    stages: as in DecodeTile.

    programs: how many the device holds at once; where not 0, the kernel splits sequences so that no more are used, and
    takes min_blocks only where there are more sequences and key heads than that. How a sequence is split then depends
    on the others. Before the wait of dependent launch, held: the first block of keys is loaded, and held
    in registers; warm: so many blocks behind it are brought into the second-level cache.
    ahead: when the next kernel's weight is asked for: 0 never, 1 before all else, 2 behind the program's own keys.
    ahead_bytes: most that is asked for.
    """

    splits: int
    keys: int
    min_blocks: int
    warps: int
    stages: int
    programs: int = 0
    held: bool = True
    warm: int = 0
    ahead: int = 0
    ahead_bytes: int = 32 << 20


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

FUSED_SPLITS = {1: 64, 2: 64, 4: 48, 8: 32, 16: 24, 32: 16, 64: 8}
"""Most splits of a sequence by the most sequences of the bucket, for 8 key heads; fewer take more."""
FUSED_FEW_BLOCKS = 8
HELD_SEQUENCES = 4
"""Up to here splits are a block or two, and the first is held."""
PROGRAMS = {True: 4, False: 3}
"""Of the fused kernel that two processors are given at once, by whether keys are held or heads wide (32 sequences of
1088 tokens of 8B: 45 us, and 59 with twice as many). A processor of Hopper's generation holds at least two."""
WARM_BLOCKS = 0
AHEAD = 0

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
    keys, stages = max(16, tile.keys // shrink), HIP_STAGES if hip else tile.stages
    return tile._replace(splits=splits, keys=keys, min_blocks=tile.min_blocks * shrink, stages=stages)


def fused_tile(
    sequences: int, kv_heads: int, head_dim: int, itemsize: int, processors: int, hip: bool = HIP
) -> FusedTile:
    """Tile for a bucket of up to 64 decoding sequences, on a device of so many `processors`; 0 where that is unknown:
    then sequences are split as by `decode_tile`."""
    usual = decode_tile(sequences, kv_heads, head_dim, itemsize, hip)
    most = FUSED_SPLITS[next((bucket for bucket in FUSED_SPLITS if bucket >= sequences), max(FUSED_SPLITS))]
    splits = min(MAX_SPLITS, max(1, most * 8 // kv_heads))
    few = FUSED_FEW_BLOCKS * DECODE[1].keys // usual.keys if processors else usual.min_blocks
    held = sequences <= HELD_SEQUENCES
    programs = PROGRAMS[held or pad(head_dim) > 128] * processors // 2
    if programs:  # more could not be used
        splits = max(1, min(splits, programs // kv_heads))
    return FusedTile(splits, usual.keys, few, usual.warps, usual.stages, programs, held, WARM_BLOCKS, AHEAD)


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
