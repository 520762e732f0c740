"""Decode steps without the host: the captured graphs replayed back to back, over sequences made up on the device.

The engine must be idle and without a prefix cache: its pages are written over.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tokenspeed.bench.gpu.setup import SAMPLED
from tokenspeed.contracts.errors import UnsupportedError
from tokenspeed.contracts.step import NewSequence, PageGrant, PlanRow, SamplingRow, StepDelta, StepPlan
from tokenspeed.engine.llm import LLM
from tokenspeed.runner.gpu.executor import GpuExecutor
from tokenspeed.runner.gpu.graphs import RUNS_BEFORE_CAPTURE

GREEDY = SamplingRow(0.0, 0, 1.0, 0)
DRAWS = SamplingRow(SAMPLED["temperature"], SAMPLED["top_k"], SAMPLED["top_p"], 0)
OWN_STEPS = 2
"""Of `Sequences`, before the replays: one that brings them, one that is repeated."""
Timer = Callable[[Callable[[], None], int], float]


@dataclass(frozen=True)
class Sequences:
    """`batch` sequences in the first slots that hold `context` tokens and decode `steps` more. page: tokens of one."""

    batch: int
    context: int
    steps: int
    groups: int
    page: int
    num_pages: int
    sampling: SamplingRow

    @property
    def length(self) -> int:
        """Positions that are granted to each."""
        return self.context + self.steps + OWN_STEPS

    def enter(self, step_id: int) -> StepPlan:
        """They take their slots, whoever had them before, and feed one token each."""
        slots = range(self.batch)
        known = [1 + at % 7 for at in range(self.context + 1)]
        new = [NewSequence(slot, known, self.context, self.context, self.sampling) for slot in slots]
        return StepPlan(step_id, StepDelta(freed=list(slots), new=new, grants=self._grants()), self._rows())

    def go_on(self, step_id: int) -> StepPlan:
        """They feed one token more."""
        return StepPlan(step_id, StepDelta(), self._rows())

    def leave(self, step_id: int) -> StepPlan:
        """They give their slots back."""
        return StepPlan(step_id, StepDelta(freed=list(range(self.batch))), [])

    def _rows(self) -> list[PlanRow]:
        return [PlanRow(slot, 1, self.length) for slot in range(self.batch)]

    def _grants(self) -> list[PageGrant]:
        count = -(-self.length // self.page)
        places = itertools.product(range(self.groups), range(self.batch))
        return [
            PageGrant(slot, group, 0, [(number * count + at) % self.num_pages for at in range(count)])
            for number, (group, slot) in enumerate(places)
        ]


def executor_of(llm: LLM) -> GpuExecutor:
    """The engine's executor. Raises UnsupportedError where it is not a GPU's."""
    executor = llm.core.executor
    if not isinstance(executor, GpuExecutor):
        raise UnsupportedError("only a GPU's steps are captured in graphs")
    return executor


def sequences_of(llm: LLM, batch: int, context: int, steps: int, draws: bool = False) -> Sequences:
    """Such sequences for an engine's pages."""
    shape = llm.core.page_shape
    groups, page = len(shape.layout.windows), shape.page_size
    return Sequences(batch, context, steps, groups, page, llm.core.capacity.num_pages, DRAWS if draws else GREEDY)


def event_ms(run: Callable[[], None], times: int) -> float:
    """Device time of one of so many runs back to back."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(times):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / times


def bare_ms(
    llm: LLM, batch: int, context: int, steps: int, *, draws: bool = False, repeats: int = 3, timer: Timer = event_ms
) -> list[float]:
    """Milliseconds of a step, one figure per repeat, each over `steps` replays from the same lengths on. Raises
    UnsupportedError where there are no graphs."""
    executor, sequences = executor_of(llm), sequences_of(llm, batch, context, steps, draws)
    for number in range(RUNS_BEFORE_CAPTURE + 1):
        executor.launch(sequences.enter(number)).result()
    found = []
    for _ in range(repeats):
        executor.launch(sequences.enter(0)).result()
        found.append(timer(executor.repeatable(sequences.go_on(1)), steps))
    executor.launch(sequences.leave(2)).result()
    return found
