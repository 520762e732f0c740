"""Runs step plans in this process: apply the delta, walk the plan, sample, append. Synchronous."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tokenspeed.contracts.step import ResultRow, StepPlan, StepResult
from tokenspeed.runner.arena import Arena
from tokenspeed.runner.backend import Backend
from tokenspeed.runner.edits import SampledRow, drawn_plainly
from tokenspeed.runner.inputs import FedRow, Slot, SlotTable, num_prompt_logprobs, wanted_rows
from tokenspeed.runner.logprobs import token_logprobs
from tokenspeed.runner.sampler import sample, sampler_inputs

LOGITS_BYTES = 256 * 2**20
"""Most bytes of float32 logits at once; more rows are taken in turns."""


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
        self._table = SlotTable(arena)
        self._chunk = max(1, LOGITS_BYTES // (4 * vocab_size))

    def launch(self, plan: StepPlan) -> Finished:
        """Run the step to its end."""
        self._table.apply(plan.delta)
        fed = self._table.feed(plan.rows)
        with torch.inference_mode():
            rows = self._run(fed)
        return Finished(StepResult(plan.step_id, rows))

    def close(self) -> None:
        """Nothing to release: memory goes with the objects."""

    def _run(self, fed: list[FedRow]) -> list[ResultRow]:
        self.backend.body(fed)
        for row in fed:
            row.slot.num_computed += row.count
        results = [ResultRow(row.number, row.start + row.count, [], [], []) for row in fed]
        wanted = wanted_rows(fed)
        jobs = [job for row, result in zip(fed, results, strict=True) for job in _jobs(row, result)]
        for first in range(0, len(jobs), self._chunk):
            part = slice(first, first + self._chunk)
            if not self._pick(wanted[part], jobs[part]):
                _sample(self.backend.logits(wanted[part]), jobs[part])
        return results

    def _pick(self, rows: list[int], jobs: list[_Job]) -> bool:
        """Tokens without logits, where all rows are drawn plainly and the backend has a way."""
        if any(job.prompt_token is not None for job in jobs):
            return False
        asks = [_sampled_row(job.row.slot) for job in jobs]
        tokens = self.backend.pick(rows, asks) if all(map(drawn_plainly, asks)) else None
        for job, token in zip(jobs, tokens or (), strict=False):
            job.row.slot.append(token)
            job.result.token_ids.append(token)
        return tokens is not None


@dataclass(frozen=True)
class _Job:
    """One wanted row of logits: to sample the row's next token, or to score a known prompt token."""

    row: FedRow
    result: ResultRow
    prompt_token: int | None


def _jobs(row: FedRow, result: ResultRow) -> list[_Job]:
    scored = row.slot.tokens[row.start + 1 : row.start + 1 + num_prompt_logprobs(row)]
    jobs = [_Job(row, result, token) for token in scored]
    return jobs + [_Job(row, result, None)] * row.samples


def _sample(logits: torch.Tensor, jobs: list[_Job]) -> None:
    """Score and sample; logits float32 [jobs, vocabulary]."""
    scored = [at for at, job in enumerate(jobs) if job.prompt_token is not None]
    if scored:
        _score(logits[scored], [jobs[at] for at in scored])
    drawn = [at for at, job in enumerate(jobs) if job.prompt_token is None]
    if drawn:
        _draw(logits if len(drawn) == len(jobs) else logits[drawn], [jobs[at] for at in drawn])


def _score(logits: torch.Tensor, jobs: list[_Job]) -> None:
    tops = [job.row.slot.sampling.prompt_logprobs for job in jobs]
    ids = torch.tensor([job.prompt_token for job in jobs], device=logits.device)
    for job, found in zip(jobs, token_logprobs(logits, ids, max(tops)).to_structs(tops), strict=True):
        job.result.prompt_logprobs.append(found)


def _draw(logits: torch.Tensor, jobs: list[_Job]) -> None:
    slots = [job.row.slot for job in jobs]
    rows = [_sampled_row(slot) for slot in slots]
    inputs = sampler_inputs(rows, logits.shape[1], logits.device)
    sampled = sample(logits, inputs)
    for job, token in zip(jobs, sampled.tokens.tolist(), strict=True):
        job.row.slot.append(token)
        job.result.token_ids.append(token)
    if sampled.logprobs is not None:
        asking = [job for job in jobs if job.row.slot.sampling.logprobs >= 0]
        for job, found in zip(asking, sampled.logprobs.to_structs(inputs.tops), strict=True):
            job.result.logprobs.append(found)


def _sampled_row(slot: Slot) -> SampledRow:
    return SampledRow(slot.sampling, slot.tokens, slot.num_prompt, len(slot.tokens), slot.seen)
