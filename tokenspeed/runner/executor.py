"""Runs step plans in this process: apply the delta, walk the plan, sample, append. Synchronous."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tokenspeed.contracts.step import ResultRow, StepPlan, StepResult
from tokenspeed.runner.arena import Arena
from tokenspeed.runner.backend import Backend
from tokenspeed.runner.edits import drawn_plainly
from tokenspeed.runner.inputs import FedRow, SlotTable, num_prompt_logprobs, wanted_rows
from tokenspeed.runner.jobs import Job, jobs_at_once, jobs_of, run_jobs, sampled_row
from tokenspeed.runner.pooling import with_pooled
from tokenspeed.runner.processors import LogitsProcessors


@dataclass(frozen=True)
class Finished:
    """The handle of a step that is over."""

    step: StepResult

    def result(self) -> StepResult:
        """The result; never waits."""
        return self.step


class LocalExecutor:
    """The executor of one process and one device."""

    max_in_flight = 1

    def __init__(self, backend: Backend, arena: Arena, vocab_size: int) -> None:
        self.backend = backend
        self.processors = LogitsProcessors()
        self._arena = arena
        self._table = SlotTable(arena)
        self._chunk = jobs_at_once(vocab_size)

    def launch(self, plan: StepPlan) -> Finished:
        """Run the step to its end."""
        self._table.apply(plan.delta)
        fed = self._table.feed(plan.rows)
        with torch.inference_mode():
            drawn = self._decode(fed)
            rows = self._run(fed) if not drawn else _taken(fed, drawn)
        return Finished(StepResult(plan.step_id, rows, max(1, len(drawn))))

    def sleep(self) -> None:
        """Give back the memory of the pages."""
        self._arena.sleep()

    def wake(self) -> None:
        """Take it again."""
        self._arena.wake()

    def close(self) -> None:
        """Release the pages; other memory goes with the objects."""
        self._arena.close()

    def _decode(self, fed: list[FedRow]) -> list[list[int]]:
        """Tokens per pass and row, where every row decodes and the backend needs nobody for that."""
        if self.backend.max_passes == 1 or len(fed) > self._chunk or not all(map(_decodes, fed)):
            return []
        asks = [sampled_row(row.slot) for row in fed]
        return self.backend.decode(fed, asks, min(row.most for row in fed)) if all(map(drawn_plainly, asks)) else []

    def _run(self, fed: list[FedRow]) -> list[ResultRow]:
        self.backend.body(fed)
        for row in fed:
            row.slot.num_computed += row.count
        results = [ResultRow(row.number, row.start + row.count, [], [], []) for row in fed]
        wanted = wanted_rows(fed)
        jobs = [job for row, result in zip(fed, results, strict=True) for job in jobs_of(row, result)]
        for first in range(0, len(jobs), self._chunk):
            part = slice(first, first + self._chunk)
            left = self._pick(list(zip(wanted[part], jobs[part], strict=True)))
            if left:
                rows, others = map(list, zip(*left, strict=True))
                run_jobs(self.backend.logits(rows), others, self.processors)
        return with_pooled(fed, results, self.backend.hidden, self.backend.logits, self._chunk)

    def _pick(self, wanted: list[tuple[int, Job]]) -> list[tuple[int, Job]]:
        """Draw tokens without logits, of rows that are drawn plainly, where the backend has a way. The other rows."""
        plain, asks, others = [], [], []
        for each in wanted:
            ask = None if each[1].prompt_token is not None else sampled_row(each[1].row.slot)
            if ask is not None and drawn_plainly(ask):
                plain.append(each)
                asks.append(ask)
            else:
                others.append(each)
        tokens = self.backend.pick([row for row, _ in plain], asks) if plain else None
        if tokens is None:
            return wanted
        for (_, job), token in zip(plain, tokens, strict=True):
            job.row.slot.append(token)
            job.result.token_ids.append(token)
        return others


def _decodes(row: FedRow) -> bool:
    return row.count == 1 and row.samples and not num_prompt_logprobs(row)


def _taken(fed: list[FedRow], drawn: list[list[int]]) -> list[ResultRow]:
    """Every pass but the last fed what it drew."""
    results = []
    for row, tokens in zip(fed, zip(*drawn, strict=True), strict=True):
        for token in tokens:
            row.slot.append(token)
        row.slot.num_computed += len(tokens)
        results.append(ResultRow(row.number, row.slot.num_computed, list(tokens)))
    return results
