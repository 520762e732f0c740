"""Tokens and log-probabilities of a step's rows by kernels that treat a row alike in every batch.

Torch's log_softmax on a GPU sums a row in an order that depends on where in memory the row begins, and its sampler
differs from the kernels' in the last bit of an exponential. So here every row that a slot of the device describes is
drawn by the same kernels as in a captured step, whatever the rows beside it ask for, and all are scored by one kernel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from tokenspeed.contracts.step import TokenLogprobs
from tokenspeed.kernels.triton.logprobs import token_logprobs
from tokenspeed.kernels.triton.sampling_state import MAX_TOP, Field, SamplingState, excess, is_edited
from tokenspeed.runner.gpu.link import TritonSteps
from tokenspeed.runner.jobs import Job, sampled_row
from tokenspeed.runner.processors import LogitsProcessors
from tokenspeed.runner.sampler import sample, sampler_inputs


class DrawnRows(NamedTuple):
    """Slots and positions of tokens to draw, int32 [n]."""

    sample_slots: torch.Tensor
    sample_positions: torch.Tensor


def run_invariant_jobs(
    logits: torch.Tensor,
    jobs: list[Job],
    kernels: TritonSteps,
    state: SamplingState,
    pool: torch.Tensor,
    processors: LogitsProcessors,
) -> None:
    """As `jobs.run_jobs`, of logits [jobs, vocabulary] in the compute dtype; state and pool are the step's."""
    tokens = [job.prompt_token for job in jobs]
    drawn = [at for at, token in enumerate(tokens) if token is None]
    held = [at for at in drawn if _is_held(jobs[at])]
    others = [at for at in drawn if not _is_held(jobs[at])]
    for at, token in zip(held, _drawn(logits, jobs, held, kernels, state, pool), strict=True):
        tokens[at] = token
    if others:
        rows, raw = [sampled_row(jobs[at].row.slot) for at in others], logits[others].float()
        inputs = sampler_inputs(rows, raw.shape[1], raw.device)
        sampled = sample(raw, inputs, processed=processors.apply(raw, rows))
        for at, token in zip(others, sampled.tokens.tolist(), strict=True):
            tokens[at] = token
    known = [token for token in tokens if token is not None]
    tops = [_top(job) for job in jobs]
    for job, token, top, found in zip(jobs, known, tops, scored(logits, known, tops), strict=True):
        if job.prompt_token is not None:
            job.result.prompt_logprobs.append(found)
            continue
        job.row.slot.append(token)
        job.result.token_ids.append(token)
        if top >= 0:
            job.result.logprobs.append(found)


def scored(logits: torch.Tensor, tokens: list[int], tops: list[int]) -> list[TokenLogprobs]:
    """Log-probabilities of a token per row of raw logits [n, vocabulary], with as many alternatives as `tops` says; of
    rows with -1 they are worth nothing."""
    count, device = len(tokens), logits.device
    params = torch.zeros((len(Field), count), dtype=torch.int32)
    params[Field.NUM_TOP] = torch.tensor(tops, dtype=torch.int32)
    nothing = torch.empty(0, dtype=torch.int32)
    state = SamplingState(params.to(device), nothing, nothing)
    slots = torch.arange(count, dtype=torch.int32, device=device)
    own = torch.tensor(tokens, dtype=torch.int32, device=device)
    # Always as many alternatives: the kernel is then the same for all.
    found = token_logprobs(logits, own, slots, state, MAX_TOP)
    columns = (found.logprobs, found.ranks, found.top_ids, found.top_logprobs)
    rows = zip(
        tokens, *(column.tolist() for column in columns), [min(top, logits.shape[1]) for top in tops], strict=True
    )
    return [
        TokenLogprobs(token, logprob, rank, ids[: max(top, 0)], logprobs[: max(top, 0)])
        for token, logprob, rank, ids, logprobs, top in rows
    ]


def _drawn(
    logits: torch.Tensor,
    jobs: list[Job],
    held: list[int],
    kernels: TritonSteps,
    state: SamplingState,
    pool: torch.Tensor,
) -> list[int]:
    if not held:
        return []
    rows = [jobs[at].row for at in held]
    columns = [[row.number for row in rows], [len(row.slot.tokens) for row in rows]]
    at = DrawnRows(*torch.tensor(columns, dtype=torch.int32, device=logits.device))
    edits = any(is_edited(row.slot.sampling) for row in rows)
    return [int(token) for token in kernels.sample(logits[held], at, state, pool, edits).tolist()]


def _is_held(job: Job) -> bool:
    """Whether a slot of the device holds all that the row's sampling asks for."""
    sampling = job.row.slot.sampling
    return not (sampling.masked or sampling.processors) and excess(sampling) is None


def _top(job: Job) -> int:
    sampling = job.row.slot.sampling
    return sampling.logprobs if job.prompt_token is None else sampling.prompt_logprobs
