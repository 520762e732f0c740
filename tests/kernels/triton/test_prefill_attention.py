"""Prefill attention over work items, and the work lists themselves, in the interpreter."""

from __future__ import annotations

import random

import pytest
import torch

from tests.kernels.triton.paged_step import PagedCase, check
from tests.seeds import SEED
from tokenspeed.contracts.errors import UnsupportedError
from tokenspeed.kernels.triton.attention_tiles import PrefillTile, item_tokens, max_items, pad, prefill_tile
from tokenspeed.kernels.triton.paged import Heads
from tokenspeed.kernels.triton.prefill_attention import prefill_attention
from tokenspeed.kernels.triton.work_items import StepRows, make_items
from tokenspeed.ops.definitions import KvScale

F8 = torch.float8_e4m3fn
SCALE = KvScale(1.7, 0.6)


def step_rows(case: PagedCase, capacity: int) -> StepRows:
    """slots, starts, counts, positions of the rows, then rubbish; and their number."""
    rows, start = [], 0
    for slot, (before, fed, padding) in zip(case.slot_of, case.rows, strict=True):
        rows.append((slot, start, fed, before))
        start += fed + padding
    rubbish = [(3, 1, 5, 7)] * (capacity - len(rows))
    slots, starts, counts, positions = torch.tensor([*rows, *rubbish], dtype=torch.int32).t().contiguous()
    return StepRows(slots, starts, counts, positions, torch.tensor([len(rows)], dtype=torch.int32))


def work_items(case: PagedCase, per_item: int, capacity: int, decode_rows: torch.Tensor | None = None) -> torch.Tensor:
    tokens = len(case.q)
    items = torch.full((max_items(tokens, capacity, per_item), 4), 99, dtype=torch.int32)
    make_items(step_rows(case, capacity), tokens, per_item, items, decode_rows)
    return items


@pytest.mark.parametrize("seed", [SEED])
@pytest.mark.parametrize(
    "heads, page, tile, dtype, kv_dtype",
    [
        (Heads(4, 2, 64, 0.125, 0), 16, PrefillTile(32, 32, 4, 2), torch.float32, None),
        (Heads(4, 1, 128, 0.09, 0), 64, PrefillTile(64, 32, 4, 2), torch.float16, None),
        (Heads(3, 1, 80, 0.11, 19, 0.7), 16, PrefillTile(64, 16, 4, 2), torch.float32, None),
        (Heads(2, 2, 96, 0.1, 3), 32, PrefillTile(32, 32, 4, 2), torch.float32, None),
        (Heads(2, 1, 64, 0.125, 70, kv_scale=SCALE), 16, PrefillTile(32, 16, 4, 2), torch.float16, F8),
    ],
    ids=["gqa", "f16", "odd group, window, cap", "narrow window", "fp8 pages, window"],
)
def test_chunks_attend_over_their_pages(seed, heads, page, tile, dtype, kv_dtype):
    at = torch.randint(20, 90, (2,), generator=torch.Generator().manual_seed(seed)).tolist()
    case = PagedCase([(0, 21, 0), (at[0], 18, 2), (at[1], 1, 0), (5, 0, 3)], heads, page, seed, dtype, kv_dtype)
    items = work_items(case, tile.rows // pad(heads.group), 5)
    out = prefill_attention(case.q, case.paged(), items, heads, tile)
    check(out, case.answer(), dtype)
    assert (out[case.step.slots < 0] == 0).all()


@pytest.mark.parametrize("seed", [SEED])
def test_a_row_has_the_same_bits_in_another_step(seed):
    heads, tile = Heads(2, 1, 64, 0.1, 0), PrefillTile(32, 16, 4, 2)
    case = PagedCase([(0, 9, 0), (33, 16, 0), (50, 3, 0)], heads, 16, seed)
    together = prefill_attention(case.q, case.paged(), work_items(case, 16, 3), heads, tile)
    only = torch.tensor([[case.slot_of[1], 0, 16, 33]], dtype=torch.int32)
    assert torch.equal(prefill_attention(case.q[9:25], case.paged(), only, heads, tile), together[9:25])


@pytest.mark.parametrize("seed", [SEED])
def test_sinks_join_the_denominator(seed):
    heads, tile = Heads(4, 2, 64, 0.1, 12), PrefillTile(32, 16, 4, 2)
    case = PagedCase([(30, 5, 0), (0, 2, 1)], heads, 16, seed)
    sinks = case.random(4) * 3
    out = prefill_attention(case.q, case.paged(), work_items(case, 16, 2), heads, tile, sinks)
    check(out, case.answer(sinks), case.dtype)


def test_too_many_heads_per_key_head_are_refused():
    heads, tile = Heads(33, 1, 64, 0.1, 0), PrefillTile(32, 16, 4, 2)
    case = PagedCase([(0, 1, 0)], heads, 16, SEED)
    with pytest.raises(UnsupportedError, match="at most 32 heads per key head, got 33"):
        prefill_attention(case.q, case.paged(), torch.zeros(1, 4, dtype=torch.int32), heads, tile)


@pytest.mark.parametrize("seed", range(SEED, SEED + 6))
@pytest.mark.parametrize("listed", [False, True])
def test_items_cover_each_token_once(seed, listed):
    draw = random.Random(seed)
    per_item, number = draw.choice([1, 7, 16, 128]), draw.choice([1, 2, 11, 37])
    rows = [(draw.randrange(50), draw.choice([0, 1, 1, 5, 64, 130]), draw.choice([0, 0, 1, 9])) for _ in range(number)]
    rows[0] = (3, 1, 0)
    capacity = number + draw.randrange(3)
    case = PagedCase(rows, Heads(1, 1, 1, 1.0, 0), 16, seed)
    decode_rows = torch.full((capacity,), 99, dtype=torch.int32) if listed else None
    items = work_items(case, per_item, capacity, decode_rows).tolist()
    decoding = [] if decode_rows is None else [token for token in decode_rows.tolist() if token >= 0]
    singles = {case.slot_of[i] for i, row in enumerate(rows) if row[1] == 1}
    slots, positions = case.step.slots.tolist(), case.step.positions.tolist()
    covered = list(decoding)
    for slot, first, count, start in items:
        assert 0 <= count <= per_item
        covered += range(first, first + count)
        assert all(slots[first + i] == slot for i in range(count))
        assert slot < 0 or (positions[first : first + count] == list(range(start, start + count)))
        assert not (listed and slot in singles)
    assert sorted(covered) == list(range(len(slots)))
    assert {slots[token] for token in decoding} == (singles if listed else set())


def test_items_of_a_tile_fill_its_rows():
    assert item_tokens(32, 8, 128, 2) == prefill_tile(128, 2).rows // 4
    assert item_tokens(28, 4, 80, 2) == prefill_tile(128, 2).rows // 8
