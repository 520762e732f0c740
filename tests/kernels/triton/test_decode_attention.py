"""Split-KV decode attention against float64, in the interpreter."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.triton.paged_step import PagedCase, check
from tests.seeds import SEED
from tokenspeed.kernels.triton.attention_tiles import DecodeTile, decode_tile
from tokenspeed.kernels.triton.decode_attention import decode_attention
from tokenspeed.kernels.triton.paged import Heads
from tokenspeed.ops.definitions import KvScale

PADDING = (0, 0, 1)
F8 = torch.float8_e4m3fn
SCALE = KvScale(1.7, 0.6)


def tile(splits: int, keys: int = 16, min_blocks: int = 1) -> DecodeTile:
    return DecodeTile(splits, keys, min_blocks, 4, 2)


@pytest.mark.parametrize("seed", [SEED])
@pytest.mark.parametrize(
    "heads, page, used, dtype, kv_dtype",
    [
        (Heads(4, 2, 64, 0.125, 0), 16, tile(3, 32), torch.float32, None),
        (Heads(8, 2, 128, 0.09, 0), 32, tile(5, 16, 2), torch.float16, None),
        (Heads(3, 1, 80, 0.11, 40, 0.7), 16, tile(2, 16), torch.float32, None),
        (Heads(2, 2, 96, 0.1, 0), 64, tile(1, 32), torch.float32, None),
        (Heads(7, 1, 64, 0.125, 0, kv_scale=SCALE), 16, tile(4), torch.float16, F8),
        (Heads(4, 1, 256, 0.06, 33, 2.5), 64, tile(4), torch.float32, None),
    ],
    ids=["gqa", "f16", "odd group, window, cap", "one split", "fp8 pages", "wide, window, cap"],
)
def test_each_row_attends_over_its_pages(seed, heads, page, used, dtype, kv_dtype):
    before = torch.randint(1, 140, (3,), generator=torch.Generator().manual_seed(seed)).tolist()
    rows = [(0, 1, 0), (before[0], 1, 0), PADDING, (before[1], 1, 0), (before[2], 1, 1)]
    case = PagedCase(rows, heads, page, seed, dtype, kv_dtype)
    out = decode_attention(case.q, case.paged(), heads, used)
    check(out, case.answer(), dtype)
    assert (out[case.step.slots < 0] == 0).all()


@pytest.mark.parametrize("seed", [SEED])
@pytest.mark.parametrize("window", [0, 20])
def test_sinks_join_the_denominator(seed, window):
    heads = Heads(4, 2, 64, 0.2, window)
    case = PagedCase([(70, 1, 0), (5, 1, 1)], heads, 16, seed)
    sinks = case.random(4) * 3
    out = decode_attention(case.q, case.paged(), heads, tile(3), sinks)
    check(out, case.answer(sinks), case.dtype)
    assert (out[2] == 0).all()


@pytest.mark.parametrize("seed", [SEED])
@pytest.mark.parametrize("queries, window", [(4, 18), (3, 0)])
def test_some_tokens_of_a_sequence_fold_into_one_item(seed, queries, window):
    heads = Heads(6, 2, 64, 0.1, window)
    rows = [(61, queries, 0), (0, queries, 0), (30, queries - 1, 1), (0, 0, queries)]
    case = PagedCase(rows, heads, 16, seed)
    out = decode_attention(case.q, case.paged(), heads, tile(3), queries=queries)
    check(out, case.answer(), case.dtype)


@pytest.mark.parametrize("seed", [SEED])
def test_listed_rows_are_written_and_no_others(seed):
    heads = Heads(4, 1, 64, 0.1, 0)
    case = PagedCase([(40, 1, 0), (3, 2, 1), (50, 1, 0)], heads, 16, seed)
    out = torch.full_like(case.q, 7.0)
    listed = torch.tensor([4, -1, 0], dtype=torch.int32)
    assert decode_attention(case.q, case.paged(), heads, tile(2), rows=listed, out=out) is out
    expected = case.answer()
    check(out[[0, 4]], expected[[0, 4]], case.dtype)
    assert (out[1:4] == 7).all()


@pytest.mark.parametrize("seed", [SEED])
@pytest.mark.parametrize("splits", [1, 3])
def test_a_listed_item_leaves_its_neighbours_alone(seed, splits):
    heads = Heads(2, 1, 64, 0.1, 0)
    case = PagedCase([(40, 2, 0), (30, 1, 0), (50, 1, 0)], heads, 16, seed)
    out = torch.full_like(case.q, 7.0)
    listed = torch.tensor([0, 2], dtype=torch.int32)
    decode_attention(case.q, case.paged(), heads, tile(splits), rows=listed, out=out, queries=2)
    check(out[:3], case.answer()[:3], case.dtype)
    assert (out[3] == 7).all()


@pytest.mark.parametrize("seed", [SEED])
@pytest.mark.parametrize("splits", [1, 4])
def test_a_row_has_the_same_bits_alone(seed, splits):
    heads = Heads(4, 2, 64, 0.1, 0)
    case = PagedCase([(90, 1, 0), (17, 1, 0), (133, 1, 0)], heads, 16, seed)
    together = decode_attention(case.q, case.paged(), heads, tile(splits))
    paged = case.paged()
    alone = paged._replace(positions=paged.positions[2:], slots=paged.slots[2:])
    assert torch.equal(decode_attention(case.q[2:], alone, heads, tile(splits)), together[2:])


@pytest.mark.parametrize("seed", [SEED])
def test_a_long_context_is_spread_over_all_splits(seed):
    heads = Heads(2, 1, 64, 0.1, 0)
    case = PagedCase([(1990 + seed % 97, 1, 0)], heads, 64, seed)
    out = decode_attention(case.q, case.paged(), heads, tile(13, 64))
    check(out, case.answer(), case.dtype)


def test_wide_heads_take_smaller_blocks_and_few_key_heads_more_splits():
    usual, wide = decode_tile(1, 8, 128, 2), decode_tile(1, 8, 256, 2)
    assert (wide.keys, wide.min_blocks) == (usual.keys // 2, usual.min_blocks * 2)
    assert decode_tile(8, 2, 128, 2).splits > decode_tile(8, 8, 128, 2).splits
    assert decode_tile(500, 8, 128, 2) == decode_tile(128, 8, 128, 2)
