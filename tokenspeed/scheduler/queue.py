"""The waiting sequences, in order."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

from tokenspeed.scheduler.sequence import Order, Sequence

AGING_STEPS = 1024
"""One level of priority is worth this many steps of waiting: whoever has waited longer goes first all the same."""


def order_of(priority: int, arrival_step: int, arrival: int, index: int) -> Order:
    """The place of a sequence for good: waiting makes up for priority because later arrivals start further back."""
    return Order(priority * AGING_STEPS + arrival_step, arrival, index)


class OrderedSequences:
    """Sequences sorted by their order. O(log n) comparisons to add and remove (and the move of some pointers)."""

    def __init__(self) -> None:
        self._sequences: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._sequences)

    def __contains__(self, sequence: object) -> bool:
        return sequence in self._sequences

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    @property
    def first(self) -> Sequence:
        return self._sequences[0]

    @property
    def last(self) -> Sequence:
        return self._sequences[-1]

    def add(self, sequence: Sequence) -> None:
        insort(self._sequences, sequence, key=_order)

    def remove(self, sequence: Sequence) -> None:
        """Raises RuntimeError when it is not there."""
        at = bisect_left(self._sequences, sequence.order, key=_order)
        if at == len(self._sequences) or self._sequences[at] is not sequence:
            raise RuntimeError(f"sequence {sequence.live.request_id!r} {sequence.index} is not queued here")
        del self._sequences[at]


def _order(sequence: Sequence) -> Order:
    return sequence.order
