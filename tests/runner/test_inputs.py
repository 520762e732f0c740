"""Slots and step inputs: deltas, upper bounds, positions and page slots, which rows want logits."""

from __future__ import annotations

import pytest
import torch

from tokenspeed.contracts.errors import MemoryLimitError
from tokenspeed.contracts.step import NewSequence, PageGrant, PlanRow, SamplingRow, StepDelta
from tokenspeed.runner.arena import fit_pages, page_bytes
from tokenspeed.runner.inputs import SlotTable, wanted_rows

GREEDY = SamplingRow(0.0, 0, 1.0, 0)
SCORED = SamplingRow(0.0, 0, 1.0, 0, prompt_logprobs=2)


def table() -> SlotTable:
    made = SlotTable(page_size=4)
    made.apply(
        StepDelta(
            new=[NewSequence(5, [10, 11, 12, 13, 14, 15], 4, GREEDY), NewSequence(2, [20, 21, 22], 0, SCORED)],
            grants=[PageGrant(5, 0, [7, 3]), PageGrant(2, 0, [9])],
        )
    )
    return made


def test_view_places_tokens() -> None:
    made = table()
    fed = made.feed([PlanRow(5, 100), PlanRow(2, 2)])
    assert [(row.start, row.count, row.samples) for row in fed] == [(4, 2, True), (0, 2, False)]
    view = made.view(fed, torch.empty(10, 1, 2, 4, 1, 8))
    assert view.tokens.tolist() == [14, 15, 20, 21]
    assert view.positions.tolist() == [4, 5, 0, 1]
    assert view.slots.tolist() == [12, 13, 36, 37]
    assert view.query_start == [0, 2, 4]
    assert view.context == [6, 2]
    assert [t.tolist() for t in view.block_tables] == [[7, 3], [9]]
    # The last token of slot 5 samples; both fed tokens of slot 2 predict prompt tokens and it samples nothing.
    assert view.rows.tolist() == [1, 2, 3]


def test_prompt_logprobs_stop_at_the_prompt() -> None:
    made = table()
    fed = made.feed([PlanRow(2, 3)])
    # Positions 0 and 1 predict prompt tokens 1 and 2; position 2 samples.
    assert wanted_rows(fed) == [0, 1, 2]
    fed[0].slot.num_computed = 3
    fed[0].slot.tokens.append(99)
    assert wanted_rows(made.feed([PlanRow(2, 1)])) == [0]


def test_contradictions_raise() -> None:
    made = table()
    with pytest.raises(RuntimeError, match="in use"):
        made.apply(StepDelta(new=[NewSequence(5, [1], 0, GREEDY)]))
    with pytest.raises(RuntimeError, match="holds 1 pages"):
        made.apply(StepDelta(grants=[PageGrant(2, 3, [1])]))
    made.apply(StepDelta(freed=[5], new=[NewSequence(5, [1] * 9, 0, GREEDY)], grants=[PageGrant(5, 0, [1, 2])]))
    with pytest.raises(RuntimeError, match="no page for position 8"):
        made.feed([PlanRow(5, 9)])


def fit(budget: int, asked_len: int | None = None, context: int = 1000) -> tuple[int, int]:
    return fit_pages(
        bytes_per_page=100, page_size=16, budget=budget, free=5000, asked_len=asked_len, context=context, max_num_seqs=3
    )


def test_pages_fit_the_budget_or_the_need() -> None:
    assert fit(100 * 63) == (63, 1000)
    assert fit(10**9) == (3 * 63, 1000)
    assert fit(100 * 10) == (10, 160)
    assert fit(100 * 10, asked_len=160) == (10, 160)


@pytest.mark.parametrize("budget, asked", [(99, None), (99, 2), (100 * 10, 161)])
def test_too_little_memory_says_what_helps(budget: int, asked: int | None) -> None:
    with pytest.raises(MemoryLimitError, match=r"needs .* MiB.*--kv-cache-memory-bytes.*--max-model-len"):
        fit(budget, asked)


def test_page_bytes_counts_keys_and_values_of_all_layers() -> None:
    assert page_bytes(18, 16, 1, 256, torch.bfloat16) == 18 * 16 * 256 * 2 * 2
