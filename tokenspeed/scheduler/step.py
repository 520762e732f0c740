"""A step while it is planned, and the part of it that is kept until its result comes."""

from __future__ import annotations

from dataclasses import dataclass, field

from tokenspeed.contracts.step import CopyPlan, NewSequence, PageGrant, PlanRow, StepDelta, StepPlan
from tokenspeed.scheduler.records import StepRecord
from tokenspeed.scheduler.sequence import Sequence


@dataclass(slots=True)
class Step:
    """Rows and what the executor must learn before them. `budget`: tokens that it may still feed."""

    step_id: int
    budget: int
    rows: list[PlanRow] = field(default_factory=list)
    sequences: list[Sequence] = field(default_factory=list)
    num_tokens: int = 0
    num_prefill_tokens: int = 0
    copies: list[CopyPlan] = field(default_factory=list)
    new: list[NewSequence] = field(default_factory=list)
    grants: list[PageGrant] = field(default_factory=list)
    forked: list[Sequence] = field(default_factory=list)
    """Sequences that run from the next step on."""

    def add(self, sequence: Sequence, count: int) -> None:
        """A row of at most `count` tokens, for which the sequence has pages."""
        if not sequence.entered:
            self._enter(sequence)
        if sequence.num_granted < sequence.table.num_entries:
            self._grant(sequence)
        sequence.last_step = self.step_id
        sequence.ahead += count
        sequence.planned += count
        self.rows.append(PlanRow(sequence.slot, count, sequence.planned))
        self.sequences.append(sequence)
        self.num_tokens += count
        self.budget -= count

    def plan(self, freed: list[int]) -> StepPlan:
        return StepPlan(self.step_id, StepDelta(freed, self.copies, self.new, self.grants), self.rows)

    def record(self, preempted: list[str]) -> StepRecord:
        ids = [sequence.live.request_id for sequence in self.sequences]
        return StepRecord(self.step_id, ids, self.num_tokens, self.num_prefill_tokens, preempted)

    def _enter(self, sequence: Sequence) -> None:
        sequence.entered = True
        tokens, live = sequence.token_ids.copy(), sequence.live
        row = sequence.sampling_row()
        pooling = live.request.pooling
        self.new.append(NewSequence(sequence.slot, tokens, sequence.num_computed, live.num_prompt, row, pooling))
        if sequence.copies is not None and sequence.copies.pages:
            self.copies.append(sequence.copies)
        sequence.copies = None

    def _grant(self, sequence: Sequence) -> None:
        first = sequence.num_granted
        for group, pages in enumerate(sequence.table.pages):
            self.grants.append(PageGrant(sequence.slot, group, first, pages[first:]))
        sequence.num_granted = sequence.table.num_entries
