"""Batch-invariant attention in the interpreter: bit-equal rows in any step, and right ones."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.triton.paged_step import PagedCase, check
from tests.kernels.triton.test_prefill_attention import F8, SCALE, work_items
from tests.seeds import SEED
from tokenspeed.contracts.errors import UnsupportedError
from tokenspeed.kernels.triton.attention_tiles import max_items
from tokenspeed.kernels.triton.invariant_attention import (
    ROWS,
    SPAN,
    TILES,
    InvariantTile,
    invariant_attention,
    invariant_item_tokens,
    shared_by,
)
from tokenspeed.kernels.triton.paged import Heads, PagedLayer
from tokenspeed.kernels.triton.work_items import StepRows, make_items

TILE = InvariantTile(32, 4, 1)


def items_of(case: PagedCase) -> torch.Tensor:
    return work_items(case, invariant_item_tokens(case.heads.heads, case.heads.kv_heads), len(case.rows) + 1)


def attended(case: PagedCase, programs: int, sinks: torch.Tensor | None = None) -> torch.Tensor:
    return invariant_attention(case.q, case.paged(), items_of(case), case.heads, sinks, programs, TILE)


@pytest.mark.parametrize("seed", [SEED])
@pytest.mark.parametrize("programs", [0, 1, 2])
@pytest.mark.parametrize(
    "heads, page, dtype, kv_dtype",
    [
        (Heads(4, 2, 64, 0.125, 0), 16, torch.float32, None),
        (Heads(3, 1, 80, 0.11, 19, 0.7), 16, torch.float32, None),
        (Heads(4, 1, 128, 0.09, 300), 64, torch.float16, None),
        (Heads(2, 1, 64, 0.125, 70, kv_scale=SCALE), 32, torch.float16, F8),
    ],
    ids=["gqa", "odd group, narrow window", "f16, window over spans", "fp8 pages"],
)
def test_prompts_and_decoding_over_pages(seed, programs, heads, page, dtype, kv_dtype):
    at = torch.randint(20, 90, (2,), generator=torch.Generator().manual_seed(seed)).tolist()
    rows = [
        (0, 21, 0),
        (SPAN - 7, 18, 2),
        (at[0], 1, 0),
        (2 * SPAN + at[1], 1, 0),
        (5, 0, 3),
        (SPAN, 1, 0),
        (SPAN - 1, 1, 0),
    ]
    case = PagedCase(rows, heads, page, seed, dtype, kv_dtype)
    out = attended(case, programs)
    check(out, case.answer(), dtype)
    assert (out[case.step.slots < 0] == 0).all()


@pytest.mark.parametrize("seed", [SEED])
def test_sinks_join_the_denominator(seed):
    case = PagedCase([(30, 5, 0), (SPAN + 3, 1, 1)], Heads(4, 2, 64, 0.1, 0), 16, seed)
    sinks = case.random(4) * 3
    apart, alone = attended(case, 2, sinks), attended(case, 0, sinks)
    check(apart, case.answer(sinks), case.dtype)
    assert torch.equal(apart, alone)


def part_of(case: PagedCase, rows: list[tuple[int, int, int]]) -> tuple[torch.Tensor, PagedLayer, torch.Tensor]:
    """Queries, pages and items of a step that feeds (slot, first token in the case, tokens) alone."""
    chosen = torch.cat([torch.arange(first, first + count) for _, first, count in rows])
    step, total = case.step, len(chosen)
    counts = torch.tensor([count for _, _, count in rows])
    starts = counts.cumsum(0) - counts
    firsts = step.positions[chosen[starts]]
    columns = [torch.tensor([slot for slot, _, _ in rows]), starts, counts, firsts]
    fed = StepRows(*(column.int() for column in columns), torch.tensor([len(rows)], dtype=torch.int32))  # type: ignore[call-arg]
    each = invariant_item_tokens(case.heads.heads, case.heads.kv_heads)
    items = torch.empty(max_items(total, len(rows), each), 4, dtype=torch.int32)
    make_items(fed, total, each, items)
    paged = case.paged()._replace(positions=step.positions[chosen], slots=step.slots[chosen])
    return case.q[chosen], paged, items


def chunks(fed: int, size: int, most: int) -> list[tuple[int, int]]:
    """(first, tokens) of up to `most` chunks of a prompt's part, the last one among them."""
    every = [(first, min(size, fed - first)) for first in range(0, fed, size)]
    return every[-most:]


@pytest.mark.parametrize("seed", [SEED])
@pytest.mark.parametrize(
    "heads, dtype, most",
    [
        (Heads(4, 1, 64, 0.1, 0), torch.float32, 2),
        (Heads(3, 1, 80, 0.1, 270, 1.5), torch.float16, 2),
        pytest.param(Heads(4, 1, 64, 0.1, 0), torch.float16, 99, marks=pytest.mark.slow),
    ],
    ids=["full", "window", "all"],
)
def test_a_token_has_the_same_bits_in_any_step(seed, heads, dtype, most):
    """Tokens of a prompt that ends in the third span: in one chunk beside others, in chunks of any size, alone."""
    before, fed = 2 * SPAN - 9, 27
    case = PagedCase([(7, 1, 0), (before, fed, 0), (SPAN, 2, 0)], heads, 16, seed, dtype)
    whole = attended(case, 0)[1 : 1 + fed]
    assert torch.equal(attended(case, 3)[1 : 1 + fed], whole)
    slot, others = case.slot_of[1], [(case.slot_of[0], 0, 1), (case.slot_of[2], 1 + fed, 2)]
    for size in (1, 4, 17):
        for first, count in chunks(fed, size, most):
            mine = (slot, 1 + first, count)
            for rows, programs in (([mine], 2), ([others[0], mine, others[1]], 0)):
                q, paged, items = part_of(case, rows)
                found = invariant_attention(q, paged, items, heads, None, programs, TILE)
                at = 0 if len(rows) == 1 else 1
                assert torch.equal(found[at : at + count], whole[first : first + count]), (size, first)


def test_too_many_heads_per_key_head_are_refused():
    case = PagedCase([(0, 1, 0)], Heads(ROWS + 1, 1, 64, 0.1, 0), 16, SEED)
    with pytest.raises(UnsupportedError, match=f"takes {ROWS} heads per key head, got {ROWS + 1}"):
        invariant_attention(case.q, case.paged(), torch.zeros(1, 4, dtype=torch.int32), case.heads)


def test_spans_are_whole_blocks_of_keys():
    assert all(SPAN % tile.keys == 0 for tile in TILES.values())


@pytest.mark.parametrize("tokens, spans, expected", [(1, 1, 0), (1, 5, 5), (64, 4, 4), (8, 512, 16), (32, 512, 0)])
def test_programs_share_spans_where_sums_fit(tokens, spans, expected):
    assert shared_by(tokens, Heads(32, 8, 128, 1.0, 0), spans) == expected
    assert shared_by(65, Heads(32, 8, 128, 1.0, 0), spans) == 0
