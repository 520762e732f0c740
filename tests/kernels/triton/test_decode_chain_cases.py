"""The benchmark of a layer's attention part lists its cases without a device, and counts what they must move."""

from __future__ import annotations

from tokenspeed.bench.gpu.decode_chain import candidates, cases
from tokenspeed.kernels.triton.attention_tiles import fused_tile


def test_cases_are_distinct_and_count_bytes() -> None:
    made = list(cases())
    assert len({case.name for case in made}) == len(made)
    name = "chain 8b B=8 ctx=1024 apart"
    by_name = {case.name: case for case in made}
    alone = by_name[f"{name} alone"]
    assert alone.bytes == 2 * 2 * 8 * 128 * 8 * (1024 + 1) + 2 * 2 * 8 * 4096
    assert by_name[f"{name} o-bf16"].bytes - alone.bytes == 2 * by_name[f"{name} o-fp8"].bytes - 2 * alone.bytes
    assert len([case for case in made if "ahead=before-wait" in case.name.split()]) == 2 * 3 * 3 * 2


def test_candidates_differ_in_one_thing_or_two() -> None:
    usual = fused_tile(8, 8, 128, 2, 132)
    found = list(candidates(usual))
    assert found[0] == usual
    assert len(set(found)) == len(found)
    assert all(sum(a != b for a, b in zip(tile, usual, strict=True)) <= 2 for tile in found)
    assert all(tile.splits >= 1 and tile.keys >= 16 for tile in found)


def test_the_tile_of_a_bucket_knows_how_many_programs_a_device_holds() -> None:
    few, many = fused_tile(1, 8, 128, 2, 132), fused_tile(32, 8, 128, 2, 132)
    assert (few.held, few.programs, many.held, many.programs) == (True, 264, False, 396)
    assert (few.splits, many.splits) == (264 // 8, 16)
    assert fused_tile(32, 8, 256, 2, 132).programs == 264
    unknown = fused_tile(32, 8, 128, 2, 0)
    assert unknown.programs == 0
    assert unknown.min_blocks >= 1
    assert fused_tile(8, 2, 128, 2, 132).splits > fused_tile(8, 8, 128, 2, 132).splits
