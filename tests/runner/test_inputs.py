"""Slots and step inputs: deltas, upper bounds, positions and page slots, which rows want logits."""

from __future__ import annotations

import pytest
import torch

from tokenspeed.contracts.step import CopyPlan, NewSequence, PageGrant, PlanRow, SamplingRow, StepDelta
from tokenspeed.ops.kv import KV_TORCH
from tokenspeed.runner.arena import Arena, PageShape
from tokenspeed.runner.inputs import SlotTable, step_view, wanted_rows
from tokenspeed.runner.layout import PageLayout, page_layout

GREEDY = SamplingRow(0.0, 0, 1.0, 0)
SCORED = SamplingRow(0.0, 0, 1.0, 0, prompt_logprobs=2)
ALL = 10**6


def make_arena(windows: tuple[int, ...] = (0, 0), kv: torch.dtype = torch.float32) -> Arena:
    return Arena(12, PageShape(page_layout(windows), 4, 1, 8, kv), torch.device("cpu"))


def make_table(arena: Arena) -> SlotTable:
    made = SlotTable(arena)
    made.apply(
        StepDelta(
            new=[NewSequence(5, [10, 11, 12, 13, 14, 15], 4, 6, GREEDY), NewSequence(2, [20, 21, 22], 0, 3, SCORED)],
            grants=[PageGrant(5, 0, 0, [7, 3]), PageGrant(2, 0, 0, [9])],
        )
    )
    return made


def test_view_places_tokens() -> None:
    arena = make_arena()
    fed = make_table(arena).feed([PlanRow(5, 100, ALL), PlanRow(2, 2, ALL)])
    assert [(row.start, row.count, row.samples) for row in fed] == [(4, 2, True), (0, 2, False)]
    view = step_view(arena, fed)
    assert view.tokens.tolist() == [14, 15, 20, 21]
    assert view.positions.tolist() == [4, 5, 0, 1]
    assert view.slots.tolist() == [[12, 13, 36, 37]]
    assert view.query_start == [0, 2, 4]
    assert view.context == [6, 2]
    assert [[t.tolist() for t in tables] for tables in view.block_tables] == [[[7, 3]], [[9]]]
    # The last token of slot 5 samples; both fed tokens of slot 2 predict prompt tokens and it samples nothing.
    assert wanted_rows(fed) == [1, 2, 3]


def test_each_group_has_its_own_pages() -> None:
    arena = make_arena(windows=(0, 8, 8))
    made = SlotTable(arena)
    grants = [PageGrant(0, 0, 0, [1]), PageGrant(0, 1, 0, [2]), PageGrant(0, 2, 0, [3])]
    made.apply(StepDelta(new=[NewSequence(0, [4, 5], 0, 2, GREEDY)], grants=grants))
    view = step_view(arena, made.feed([PlanRow(0, 2, ALL)]))
    assert view.slots.tolist() == [[4, 5], [8, 9], [12, 13]]
    assert view.places == ((0, 0), (1, 0), (2, 0))


def test_prompt_logprobs_stop_at_the_prompt() -> None:
    made = make_table(make_arena())
    fed = made.feed([PlanRow(2, 3, ALL)])
    # Positions 0 and 1 predict prompt tokens 1 and 2; position 2 samples.
    assert wanted_rows(fed) == [0, 1, 2]
    fed[0].slot.num_computed = 3
    fed[0].slot.append(99)
    assert wanted_rows(made.feed([PlanRow(2, 1, ALL)])) == [0]


def test_contradictions_raise() -> None:
    made = make_table(make_arena())
    with pytest.raises(RuntimeError, match="in use"):
        made.apply(StepDelta(new=[NewSequence(5, [1], 0, 1, GREEDY)]))
    with pytest.raises(RuntimeError, match="holds 1 pages"):
        made.apply(StepDelta(grants=[PageGrant(2, 0, 3, [1])]))
    entering = NewSequence(5, [1] * 9, 0, 9, GREEDY)
    made.apply(StepDelta(freed=[5], new=[entering], grants=[PageGrant(5, 0, 0, [1, 2])]))
    with pytest.raises(RuntimeError, match="no page for position 8"):
        made.feed([PlanRow(5, 9, ALL)])
    with pytest.raises(RuntimeError, match="no page for position 7"):
        made.feed([PlanRow(5, 8, 6)])


@pytest.mark.parametrize("kv", KV_TORCH.values(), ids=KV_TORCH)
def test_copies_come_before_what_reads_them(kv: torch.dtype) -> None:
    arena = make_arena(kv=kv)
    stored = arena.kv.view(torch.uint8)
    stored.random_()
    before = stored.clone()
    SlotTable(arena).apply(StepDelta(copies=[CopyPlan([(3, 8), (4, 0)])]))
    assert (stored[8] == before[3]).all()
    assert (stored[0] == before[4]).all()
    untouched = [page for page in range(12) if page not in (0, 8)]
    assert (stored[untouched] == before[untouched]).all()


@pytest.mark.parametrize(
    ("windows", "expected"),
    [
        ((0, 0, 0), PageLayout((0,), 3, ((0, 0), (0, 1), (0, 2)))),
        ((5, 5, 0), PageLayout((0, 5, 5), 1, ((1, 0), (2, 0), (0, 0)))),
        ((5, 0, 5, 0), PageLayout((0, 5), 2, ((1, 0), (0, 0), (1, 1), (0, 1)))),
        # Four of one kind and six of the other: pairs waste nothing, fours would waste two layers.
        ((0,) * 4 + (5,) * 6, None),
    ],
)
def test_layout(windows: tuple[int, ...], expected: PageLayout | None) -> None:
    found = page_layout(windows)
    if expected is not None:
        assert found == expected
    assert len(set(found.places)) == len(windows)
    for layer, (group, index) in enumerate(found.places):
        assert found.windows[group] == windows[layer]
        assert index < found.layers_per_group
    if expected is None:
        assert (found.layers_per_group, len(found.windows)) == (2, 5)


def test_page_bytes_counts_keys_and_values_of_a_group() -> None:
    windows = tuple(0 if i % 6 == 5 else 512 for i in range(18))
    shape = PageShape(page_layout(windows), 16, 1, 256, torch.bfloat16)
    assert shape.layout.windows == (0, 512, 512, 512, 512, 512)
    assert shape.page_bytes == 3 * 16 * 256 * 2 * 2
    assert Arena(2, shape, torch.device("cpu")).kv[0].nbytes == shape.page_bytes


@pytest.mark.parametrize(("kv", "entry"), [("float32", 24), ("bfloat16", 12), ("fp8", 6), ("int8", 8)])
def test_page_bytes_of_narrow_types(kv: str, entry: int) -> None:
    """int8: six codes and a scale of two bytes."""
    shape = PageShape(page_layout((0, 0)), 5, 3, 6, KV_TORCH[kv])
    assert shape.page_bytes == 2 * 2 * 5 * 3 * entry
    assert shape.element_bytes == entry / 6
    assert Arena(2, shape, torch.device("cpu")).kv[0].nbytes == shape.page_bytes
