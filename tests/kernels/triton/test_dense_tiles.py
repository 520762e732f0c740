"""Tile rules: what they give is launchable for any shape, and measured entries come first."""

from __future__ import annotations

import random

import pytest

from tests.seeds import SEED
from tokenspeed.kernels.triton import tiles
from tokenspeed.kernels.triton.tiles import GemvTile, SkinnyTile, gemv_tile, skinny_tile

SHARED_MEMORY = 227 * 1024
"""Bytes a program may have on an H200."""


def power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


@pytest.mark.parametrize("seed", [SEED])
def test_rules_give_tiles_for_any_shape(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(300):
        n, k, item = rng.randint(2, 200_000), rng.randint(16, 30_000), rng.choice([1, 2, 4])
        for rows in (1, 2, 4):
            tile = gemv_tile(rows, n, k, item)
            assert all(map(power_of_two, (tile.block_n, tile.block_k, tile.warps))), (n, k, tile)
            assert tile.block_n % 2 == 0
            assert tile.warps * 32 * 8 <= tile.block_k, (n, k, tile)
        for rows in (16, 32, 64):
            for scale_block in (0, 128):
                wide = skinny_tile(rows, n, k, item, scale_block)
                assert all(map(power_of_two, (wide.block_n, wide.block_k, wide.warps))), (n, k, wide)
                assert wide.stages * wide.block_k * (wide.block_n + rows) * item <= SHARED_MEMORY
                assert wide.split_k == 1 or k // wide.split_k >= wide.block_k
                assert scale_block == 0 or wide.block_k == scale_block


def test_measured_entries_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    measured, wide = GemvTile(2, 512, 2), SkinnyTile(32, 64, 2, 2, 2)
    monkeypatch.setitem(tiles.GEMV, (1, 6144, 4096, 2), measured)
    monkeypatch.setitem(tiles.SKINNY, (16, 6144, 4096, 1), wide)
    assert gemv_tile(1, 6144, 4096, 2) == measured
    assert gemv_tile(1, 6144, 4096, 1) != measured
    assert skinny_tile(16, 6144, 4096, 1) == wide
    assert skinny_tile(32, 6144, 4096, 1) != wide
    assert skinny_tile(16, 6144, 4096, 1, scale_block=128).block_k == 128
