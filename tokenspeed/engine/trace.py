"""Where the time of steps goes: what the engine's thread did, and when."""

from __future__ import annotations

import msgspec


class Span(msgspec.Struct, array_like=True, frozen=True):
    """One phase of a step: "schedule", "launch", "collect" (a wait), "update" or "send". start: seconds
    of a clock of the engine's own."""

    name: str
    start: float
    seconds: float
    step_id: int
    num_tokens: int = 0
    """The most that the step feeds."""


class StepTrace:
    """Phases, until so many steps have finished. until: a value of `Core.num_steps`."""

    def __init__(self, until: int) -> None:
        self.until = until
        self.spans: list[Span] = []

    def add(self, name: str, start: float, end: float, step_id: int, num_tokens: int = 0) -> None:
        """A phase, in seconds of `time.perf_counter`."""
        self.spans.append(Span(name, start, end - start, step_id, num_tokens))
