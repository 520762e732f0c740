"""What the executor remembers of each slot, and the inputs of one step made from it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from tokenspeed.contracts.step import PlanRow, SamplingRow, StepDelta
from tokenspeed.ops.reference import StepView


@dataclass
class Slot:
    """One sequence: its known tokens, how many are computed, its block table, and how to sample it."""

    tokens: list[int]
    num_computed: int
    num_prompt: int
    sampling: SamplingRow
    pages: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class FedRow:
    """A plan row as it is run: `count` tokens from position `start`; `samples` when they reach the end of what is
    known."""

    number: int
    slot: Slot
    start: int
    count: int
    samples: bool


class SlotTable:
    """The state of all slots; changed by deltas and by the tokens that steps sample."""

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._slots: dict[int, Slot] = {}

    def apply(self, delta: StepDelta) -> None:
        """Apply a delta in its order. Raises RuntimeError where it contradicts the state."""
        for number in delta.freed:
            self._slots.pop(number, None)  # Absent when the step that brought it was interrupted before it began.
        for new in delta.new:
            if new.slot in self._slots:
                raise RuntimeError(f"slot {new.slot} is in use")
            self._slots[new.slot] = Slot(list(new.token_ids), new.num_computed, len(new.token_ids), new.sampling)
        for grant in delta.grants:
            pages = self._slots[grant.slot].pages
            if len(pages) != grant.first:
                raise RuntimeError(f"slot {grant.slot} holds {len(pages)} pages, grant starts at {grant.first}")
            pages.extend(grant.pages)

    def feed(self, rows: list[PlanRow]) -> list[FedRow]:
        """How many tokens each row really feeds. Raises RuntimeError where a page is missing for one."""
        fed = []
        for row in rows:
            slot = self._slots[row.slot]
            count = min(row.max_tokens, len(slot.tokens) - slot.num_computed)
            if slot.num_computed + count > len(slot.pages) * self._page_size:
                raise RuntimeError(f"slot {row.slot} has no page for position {slot.num_computed + count - 1}")
            samples = slot.num_computed + count == len(slot.tokens)
            fed.append(FedRow(row.slot, slot, slot.num_computed, count, samples))
        return fed

    def view(self, fed: list[FedRow], kv: torch.Tensor) -> StepView:
        """Inputs of the step, on the device of `kv`; the wanted rows are the last of each row that samples, and those
        of prompt log-probabilities, in the order of `wanted_rows`."""
        device, size = kv.device, self._page_size
        tokens: list[int] = []
        positions: list[int] = []
        where: list[int] = []
        for row in fed:
            end = row.start + row.count
            tokens += row.slot.tokens[row.start : end]
            positions += range(row.start, end)
            where += [row.slot.pages[p // size] * size + p % size for p in range(row.start, end)]
        starts = [0]
        for row in fed:
            starts.append(starts[-1] + row.count)
        return StepView(
            tokens=torch.tensor(tokens, device=device),
            positions=torch.tensor(positions, device=device),
            slots=torch.tensor(where, device=device),
            query_start=starts,
            context=[row.start + row.count for row in fed],
            block_tables=[torch.tensor(row.slot.pages, device=device) for row in fed],
            kv=kv,
            rows=torch.tensor(wanted_rows(fed), dtype=torch.int64, device=device),
        )


def wanted_rows(fed: list[FedRow]) -> list[int]:
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
