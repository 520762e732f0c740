"""Counting on the hot path: plain numbers of one thread, turned into Prometheus families only when they are read."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

STEP_BOUNDS = (0.0005, 0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0, 2.5, 10.0)
"""Of the engine's step times, in seconds."""


class Histogram:
    """Counts by upper bound, in seconds. A value on a bound belongs to it, as Prometheus has it."""

    __slots__ = ("_counts", "bounds", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.total = 0.0
        self._counts = [0] * (len(bounds) + 1)

    def observe(self, value: float) -> None:
        """Count one value."""
        self._counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def state(self) -> list[float]:
        """Counts by bound, those above the last, and the sum of the values: for `add` in another process."""
        return [*self._counts, self.total]

    def add(self, state: Sequence[float]) -> None:
        """Add what another histogram of the same bounds has counted; nothing where `state` is empty."""
        if state:
            self._counts = [have + int(more) for have, more in zip(self._counts, state[:-1], strict=True)]
            self.total += state[-1]

    @property
    def count(self) -> int:
        """How many values there were."""
        return sum(self._counts)

    def cumulative(self) -> list[tuple[str, float]]:
        """(upper bound, values up to it), the last bound is +Inf."""
        names = [*map(str, self.bounds), "+Inf"]
        return [(name, float(count)) for name, count in zip(names, accumulate(self._counts), strict=True)]
