"""What a step's rows want of their logits: to sample the next token, or to score a known prompt token."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tokenspeed.contracts.step import ResultRow
from tokenspeed.runner.edits import SampledRow
from tokenspeed.runner.inputs import FedRow, Slot, num_prompt_logprobs
from tokenspeed.runner.logprobs import token_logprobs
from tokenspeed.runner.processors import LogitsProcessors
from tokenspeed.runner.sampler import sample, sampler_inputs

LOGITS_BYTES = 256 * 2**20
"""Most bytes of float32 logits at once; more rows are taken in turns."""


@dataclass(frozen=True)
class Job:
    """One wanted row of logits: to sample the row's next token, or to score a known prompt token."""

    row: FedRow
    result: ResultRow
    prompt_token: int | None


def jobs_of(row: FedRow, result: ResultRow) -> list[Job]:
    """In the order of `wanted_rows`."""
    scored = row.slot.tokens[row.start + 1 : row.start + 1 + num_prompt_logprobs(row)]
    jobs = [Job(row, result, token) for token in scored]
    return jobs + [Job(row, result, None)] * row.samples


def jobs_at_once(vocab_size: int) -> int:
    """Most jobs whose logits may be in memory together."""
    return max(1, LOGITS_BYTES // (4 * vocab_size))


def run_jobs(logits: torch.Tensor, jobs: list[Job], processors: LogitsProcessors) -> None:
    """Score and sample; logits float32 [jobs, vocabulary]."""
    scored = [at for at, job in enumerate(jobs) if job.prompt_token is not None]
    if scored:
        _score(logits[scored], [jobs[at] for at in scored])
    drawn = [at for at, job in enumerate(jobs) if job.prompt_token is None]
    if drawn:
        _draw(logits if len(drawn) == len(jobs) else logits[drawn], [jobs[at] for at in drawn], processors)


def _score(logits: torch.Tensor, jobs: list[Job]) -> None:
    tops = [job.row.slot.sampling.prompt_logprobs for job in jobs]
    ids = torch.tensor([job.prompt_token for job in jobs], device=logits.device)
    for job, found in zip(jobs, token_logprobs(logits, ids, max(tops)).to_structs(tops), strict=True):
        job.result.prompt_logprobs.append(found)


def _draw(logits: torch.Tensor, jobs: list[Job], processors: LogitsProcessors) -> None:
    slots = [job.row.slot for job in jobs]
    rows = [sampled_row(slot) for slot in slots]
    inputs = sampler_inputs(rows, logits.shape[1], logits.device)
    sampled = sample(logits, inputs, processed=processors.apply(logits, rows))
    for job, token in zip(jobs, sampled.tokens.tolist(), strict=True):
        job.row.slot.append(token)
        job.result.token_ids.append(token)
    if sampled.logprobs is not None:
        asking = [job for job in jobs if job.row.slot.sampling.logprobs >= 0]
        for job, found in zip(asking, sampled.logprobs.to_structs(inputs.tops), strict=True):
            job.result.logprobs.append(found)


def sampled_row(slot: Slot) -> SampledRow:
    """A slot's next token, as the sampler takes it."""
    return SampledRow(slot.sampling, slot.tokens, slot.num_prompt, len(slot.tokens), slot.seen)
