"""The executor protocol: the only door between scheduling (ints) and computing (tensors)."""

from __future__ import annotations

from typing import Protocol

from tokenspeed.contracts.step import StepPlan, StepResult


class StepHandle(Protocol):
    """A launched step."""

    def result(self) -> StepResult:
        """Wait for the step and return what it gave. Raises what the step raised."""
        ...


class Executor(Protocol):
    """Runs steps in the order they are launched. Owns every tensor; the caller owns every page id and slot."""

    @property
    def max_in_flight(self) -> int:
        """Steps that may be launched before the first of them is waited for; 1 where launching waits anyway."""
        ...

    def launch(self, plan: StepPlan) -> StepHandle:
        """Apply the plan's delta, start its rows, return without waiting where the device allows."""
        ...

    def sleep(self) -> None:
        """Give back the memory of the pages, and with it what they hold. Every step has been waited for, and no launch
        may come before `wake`. May be called again, also after it failed."""
        ...

    def wake(self) -> None:
        """Take memory for the pages again, at the same addresses. May be called again. Raises MemoryLimitError where
        others have it by now."""
        ...

    def close(self) -> None:
        """Release the device. No launch may follow."""
        ...
