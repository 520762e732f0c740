"""How many decode passes a step may hold, where the executor can run several without the host."""

from __future__ import annotations

LONGEST_S = 0.032
"""A request that comes during a step waits for its end, and the tokens of a step arrive together: 30 times a second."""
_WEIGHT = 0.5
"""Of the newest step in the mean: the rows of a batch come and go."""


class Burst:
    """As many passes as fit into `longest_s`, by the steps of late."""

    def __init__(self, most: int, longest_s: float = LONGEST_S) -> None:
        self._most = most
        self._longest_s = self._pass_s = longest_s

    def observe(self, num_passes: int, seconds: float) -> None:
        """A step that only decoded took `seconds` for its passes."""
        self._pass_s += _WEIGHT * (seconds / num_passes - self._pass_s)

    def num_passes(self) -> int:
        """For the next step."""
        return max(1, min(self._most, int(self._longest_s / max(self._pass_s, 1e-6))))
