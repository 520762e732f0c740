"""The benchmark's cases can be listed without a device, and count what a launch must move."""

from __future__ import annotations

from tokenspeed.bench.gpu.dense import SHAPES, cases
from tokenspeed.bench.gpu.dense_candidates import gemv_candidates, skinny_candidates


def test_cases_are_distinct_and_count_bytes_and_operations() -> None:
    made = cases(models=["llama-3.1-8b"], rows=(1, 8))
    assert len({case.name for case in made}) == len(made)
    down = next(case for case in made if case.name.startswith("llama-3.1-8b down fp8 B8 skinny"))
    assert down.bytes == 4096 * 14336 + 2 * 8 * (4096 + 14336)
    assert down.flops == 2 * 8 * 4096 * 14336
    assert down.key == (16, 4096, 14336, 1)
    up = next(case for case in made if case.name.startswith("llama-3.1-8b gate_up bf16 B1 fused"))
    assert up.bytes == 2 * 28672 * 4096 + 2 * (4096 + 14336)
    assert all("head" not in case.name for case in made if " fp8 " in case.name)


def test_every_candidate_covers_whole_gate_and_up_pairs_and_tiles_of_its_shape() -> None:
    for shape in SHAPES:
        for item in (1, 2):
            tiles = [tile for rows in (1, 2, 4) for tile in gemv_candidates(rows, item)]
            assert all(tile.block_n % 2 == 0 for tile in tiles)
            for rows in (16, 32, 64, 128):
                candidates = skinny_candidates(rows, shape.n, shape.k, item)
                assert len(set(candidates)) == len(candidates)
                assert all(tile.split_k * tile.block_k <= shape.k for tile in candidates)
