"""An engine that is gone, and when the next one may be tried."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

FIRST_DELAY_S = 1.0
LONGEST_DELAY_S = 60.0
HEALTHY_S = 60.0
"""An engine that lived this long was well: the delays begin again."""
WINDOW_S = 600.0
"""Restarts are counted over this time."""


@dataclass
class Outage:
    """Why there is no engine, and what is done about it."""

    reason: str
    step: str = ""
    """What is done, in words; nothing while the engine is being ended."""
    due: float | None = None
    """Monotonic seconds of the next start; None where it is under way, or there will be none."""
    final: bool = False
    """Nothing more is tried."""
    limit_s: float | None = None
    """What the load under way may take."""

    def text(self, loading: str) -> str:
        """What /health says. loading: how far a load under way is."""
        if not self.step:
            return self.reason
        if self.final:
            return f"{self.reason}; {self.step}"
        if self.due is None:
            limit = "" if self.limit_s is None else f" (it may take {self.limit_s:.0f} s)"
            return f"{self.reason}; {self.step}: {loading}{limit}"
        return f"{self.reason}; {self.step}, starting in {max(0.0, self.due - time.monotonic()):.1f} s"


class RestartPolicy:
    """Delays of 1, 2, 4 ... 60 seconds, and a most number of restarts in ten minutes."""

    def __init__(self, limit: int, first_delay_s: float = FIRST_DELAY_S) -> None:
        self.limit = limit
        self._first_delay_s = self._delay_s = first_delay_s
        self._restarts: deque[float] = deque()

    def next_delay(self, now: float, lived_s: float) -> float | None:
        """Seconds to wait before the next start, which is counted; None where there may be none.

        lived_s: how long the engine that ended was well, 0 where it did not start.
        """
        while self._restarts and now - self._restarts[0] >= WINDOW_S:
            self._restarts.popleft()
        if len(self._restarts) >= self.limit:
            return None
        if lived_s >= HEALTHY_S:
            self._delay_s = self._first_delay_s
        delay, self._delay_s = self._delay_s, min(2 * self._delay_s, LONGEST_DELAY_S)
        self._restarts.append(now)
        return delay

    @property
    def recent(self) -> int:
        """Restarts counted at the last call of `next_delay`."""
        return len(self._restarts)
