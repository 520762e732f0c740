"""What the executor remembers of each slot, and the inputs of one step made from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tokenspeed.contracts.step import PlanRow, Pooling, SamplingRow, StepDelta
from tokenspeed.ops.reference import StepView
from tokenspeed.runner.arena import Arena
from tokenspeed.runner.edits import SeenTokens, has_penalties


@dataclass
class Slot:
    """One sequence: its known tokens, how many are computed, a block table per page group, and how to sample it.

    seen: counts of its tokens, kept where penalties need them. pooling: what it gives in place of tokens; summed: of a
    mean, the hidden states so far, float64 [hidden size].
    """

    tokens: list[int]
    num_computed: int
    num_prompt: int
    sampling: SamplingRow
    tables: list[list[int]]
    seen: SeenTokens | None = None
    pooling: Pooling | None = None
    summed: torch.Tensor | None = None

    def append(self, token: int) -> None:
        """Take in a sampled token."""
        self.tokens.append(token)
        if self.seen is not None:
            self.seen.extend([token])


@dataclass(frozen=True)
class FedRow:
    """A plan row as it is run: `count` tokens from position `start`; `samples` when they reach the end of what is
    known; it may go on with what it samples until it has fed `most`."""

    number: int
    slot: Slot
    start: int
    count: int
    samples: bool
    most: int

    @property
    def pools(self) -> bool:
        """Whether it reaches the end of a sequence that gives something in place of tokens."""
        return self.slot.pooling is not None and self.start + self.count == self.slot.num_prompt


class SlotTable:
    """The state of all slots; changed by deltas and by the tokens that steps sample."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._slots: dict[int, Slot] = {}

    def apply(self, delta: StepDelta) -> None:
        """Apply a delta in its order. Raises RuntimeError where it contradicts the state."""
        for number in delta.freed:
            self._slots.pop(number, None)  # Absent when the step that brought it was interrupted before it began.
        for copies in delta.copies:
            self._arena.copy(copies.pages)
        groups = len(self._arena.shape.layout.windows)
        for new in delta.new:
            if new.slot in self._slots:
                raise RuntimeError(f"slot {new.slot} is in use")
            tables: list[list[int]] = [[] for _ in range(groups)]
            slot = Slot(
                list(new.token_ids), new.num_computed, new.num_prompt, new.sampling, tables, pooling=new.pooling
            )
            if has_penalties(new.sampling):
                slot.seen = SeenTokens(slot.tokens[: slot.num_prompt])
                slot.seen.extend(slot.tokens[slot.num_prompt :])
            self._slots[new.slot] = slot
        for grant in delta.grants:
            table = self._slots[grant.slot].tables[grant.group]
            if len(table) != grant.first:
                raise RuntimeError(f"slot {grant.slot} holds {len(table)} pages, grant starts at {grant.first}")
            table.extend(grant.pages)

    def feed(self, rows: list[PlanRow]) -> list[FedRow]:
        """How many tokens each row really feeds. Raises RuntimeError where a page is missing for one."""
        fed = []
        for row in rows:
            slot = self._slots[row.slot]
            count = min(row.max_tokens, len(slot.tokens) - slot.num_computed)
            end = slot.num_computed + count
            held = min(map(len, slot.tables)) * self._arena.shape.page_size
            if end > min(row.num_reserved, held):
                raise RuntimeError(f"slot {row.slot} has no page for position {end - 1}")
            samples = end == len(slot.tokens) and slot.pooling is None
            fed.append(FedRow(row.slot, slot, slot.num_computed, count, samples, row.max_tokens))
        return fed


def step_view(arena: Arena, fed: Sequence[FedRow]) -> StepView:
    """Inputs of the step for the references, on the arena's device. No row is wanted yet."""
    layout, device = arena.shape.layout, arena.kv.device
    starts = [0]
    for row in fed:
        starts.append(starts[-1] + row.count)
    spans = [range(row.start, row.start + row.count) for row in fed]
    tokens = [token for row in fed for token in row.slot.tokens[row.start : row.start + row.count]]
    slots = [_page_slots(fed, spans, group, arena.shape.page_size) for group in range(len(layout.windows))]
    tables = [[torch.tensor(table, device=device) for table in row.slot.tables] for row in fed]
    return StepView(
        tokens=torch.tensor(tokens, device=device),
        positions=torch.tensor([p for span in spans for p in span], device=device),
        slots=torch.tensor(slots, device=device),
        query_start=starts,
        context=[span.stop for span in spans],
        block_tables=tables,
        places=layout.places,
        kv=arena.kv,
        rows=torch.empty(0, dtype=torch.int64, device=device),
    )


def _page_slots(fed: Sequence[FedRow], spans: list[range], group: int, size: int) -> list[int]:
    return [
        row.slot.tables[group][p // size] * size + p % size for row, span in zip(fed, spans, strict=True) for p in span
    ]


def wanted_rows(fed: Sequence[FedRow]) -> list[int]:
    """Offsets into the step's tokens whose logits are wanted: per row the prompt's, then the one that samples."""
    wanted: list[int] = []
    offset = 0
    for row in fed:
        wanted += range(offset, offset + num_prompt_logprobs(row))
        if row.samples:
            wanted.append(offset + row.count - 1)
        offset += row.count
    return wanted


def num_prompt_logprobs(row: FedRow) -> int:
    """Fed positions whose next token is a prompt token and whose log-probability was asked for."""
    if row.slot.sampling.prompt_logprobs < 0:
        return 0
    return max(0, min(row.count, row.slot.num_prompt - 1 - row.start))
