"""The host's mirror of the device's slots: lengths and tables as they will be once everything launched has run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tokenspeed.contracts.step import NewSequence, PlanRow, StepPlan
from tokenspeed.runner.edits import SeenTokens, has_penalties
from tokenspeed.runner.inputs import FedRow, Slot


@dataclass
class HostSlot(Slot):
    """A sequence whose `tokens` are those that arrived; num_tokens counts also what launched steps will sample."""

    num_tokens: int = 0
    table_lengths: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class LaunchedRow(FedRow):
    """A row as it was launched, its first token at place `offset` of the step."""

    slot: HostSlot
    offset: int = field(kw_only=True)


@dataclass
class Changes:
    """What a step's delta changes on the device: new sequences, and runs of block table entries."""

    new: list[NewSequence] = field(default_factory=list)
    tables: list[tuple[int, int, int, list[int]]] = field(default_factory=list)
    """(group, slot, first entry, pages)."""


class HostSlots:
    """All slots; changed by plans as they are launched and by tokens as they arrive."""

    def __init__(self, num_groups: int, page_size: int) -> None:
        self._num_groups = num_groups
        self._page_size = page_size
        self._slots: dict[int, HostSlot] = {}

    def apply(self, plan: StepPlan) -> Changes:
        """Take in a delta, but for its copies. Raises RuntimeError where it contradicts the state."""
        changes = Changes()
        for number in plan.delta.freed:
            self._slots.pop(number, None)  # Absent when the step that brought it was interrupted before it began.
        for new in plan.delta.new:
            if new.slot in self._slots:
                raise RuntimeError(f"slot {new.slot} is in use")
            self._slots[new.slot] = _host_slot(new, self._num_groups)
            changes.new.append(new)
        for grant in plan.delta.grants:
            lengths = self._slots[grant.slot].table_lengths
            if lengths[grant.group] != grant.first:
                raise RuntimeError(
                    f"slot {grant.slot} holds {lengths[grant.group]} pages, grant starts at {grant.first}"
                )
            lengths[grant.group] += len(grant.pages)
            changes.tables.append((grant.group, grant.slot, grant.first, list(grant.pages)))
        return changes

    def launch(self, rows: Sequence[PlanRow]) -> list[LaunchedRow]:
        """How many tokens each row feeds; its sequence counts as that far from now on."""
        launched, offset = [], 0
        for row in rows:
            slot = self._slots[row.slot]
            count = min(row.max_tokens, slot.num_tokens - slot.num_computed)
            start, end = slot.num_computed, slot.num_computed + count
            if end > min(row.num_reserved, min(slot.table_lengths) * self._page_size):
                raise RuntimeError(f"slot {row.slot} has no page for position {end - 1}")
            samples = end == slot.num_tokens and slot.pooling is None
            launched.append(LaunchedRow(row.slot, slot, start, count, samples, row.max_tokens, offset=offset))
            slot.num_computed = end
            slot.num_tokens += samples
            offset += count
        return launched


def _host_slot(new: NewSequence, num_groups: int) -> HostSlot:
    tokens = list(new.token_ids)
    slot = HostSlot(
        tokens,
        new.num_computed,
        new.num_prompt,
        new.sampling,
        [],
        pooling=new.pooling,
        num_tokens=len(tokens),
        table_lengths=[0] * num_groups,
    )
    if has_penalties(new.sampling):
        slot.seen = SeenTokens(tokens[: new.num_prompt])
        slot.seen.extend(tokens[new.num_prompt :])
    return slot
