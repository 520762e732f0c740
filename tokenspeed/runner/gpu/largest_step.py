"""The step that takes most memory, run before the KV cache is sized: the cache gets what this leaves."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tokenspeed.contracts.errors import MemoryLimitError
from tokenspeed.contracts.executor import Executor
from tokenspeed.contracts.step import NewSequence, PageGrant, PlanRow, Pooling, SamplingRow, StepDelta, StepPlan
from tokenspeed.program.plan import BUCKETS, bucket_of
from tokenspeed.runner.gpu.graphs import RUNS_BEFORE_CAPTURE
from tokenspeed.runner.jobs import jobs_at_once
from tokenspeed.runner.layout import PageLayout

SAMPLED = SamplingRow(temperature=1.0, top_k=50, top_p=0.9, seed=0, logit_bias=[(0, 0.0)])
"""Edited logits are a copy."""
MEAN = Pooling("embedding", mean=True)
"""What a classifier, which draws no tokens, is asked for."""
SCORED = SamplingRow(temperature=0.0, top_k=0, top_p=1.0, seed=0, logprobs=0, prompt_logprobs=0)


@dataclass(frozen=True)
class StepLimits:
    """rows: most sequences of a step. tokens: most tokens, of all. length: most tokens of one sequence, its last one,
    which is never fed, included."""

    rows: int
    tokens: int
    length: int

    @property
    def most_tokens(self) -> int:
        """Tokens that a step can really have."""
        return min(self.tokens, self.rows * (self.length - 1))

    def counts(self) -> list[int]:
        """Tokens of each row of the largest step."""
        rows = min(self.rows, self.most_tokens)
        each, more = divmod(self.most_tokens, rows)
        return [each + (row < more) for row in range(rows)]


def run_largest_steps(
    executor: Executor, limits: StepLimits, layout: PageLayout, page_size: int, vocab_size: int, classifies: bool
) -> None:
    """The largest step eagerly, then captured and replayed; then one that scores as many prompt tokens as are scored
    at once. Of a classifier the largest one alone. All of it in one page, whose content is worth nothing. The executor
    is of no use afterwards.

    Raises MemoryLimitError where the device has too little memory for a step.
    """
    scored = min(limits.tokens, limits.length - 1, jobs_at_once(vocab_size) + 1)
    steps = [(limits.counts(), SAMPLED)] * (RUNS_BEFORE_CAPTURE + 1) + [([scored], SCORED)]
    steps = steps[:1] if classifies else steps
    pooling = MEAN if classifies else None
    before = 0
    for number, (counts, sampling) in enumerate(steps):
        plan = _step(number, counts, sampling, pooling, before, layout, page_size)
        try:
            executor.launch(plan).result()
        except torch.OutOfMemoryError as error:
            raise MemoryLimitError(
                f"a step of {sum(counts)} tokens of {len(counts)} sequences does not fit beside the weights: lower "
                f"--max-num-batched-tokens ({limits.tokens}) or --max-num-seqs ({limits.rows}); {error}"
            ) from None
        before = len(counts)


def _step(
    number: int,
    counts: list[int],
    sampling: SamplingRow,
    pooling: Pooling | None,
    before: int,
    layout: PageLayout,
    page_size: int,
) -> StepPlan:
    new = [NewSequence(slot, [0] * count, 0, count, sampling, pooling) for slot, count in enumerate(counts)]
    pages = [-(-count // page_size) for count in counts]
    grants = [
        PageGrant(slot, group, 0, [0] * count)
        for slot, count in enumerate(pages)
        for group in range(len(layout.windows))
    ]
    rows = [PlanRow(slot, count, pages[slot] * page_size) for slot, count in enumerate(counts)]
    return StepPlan(number, StepDelta(freed=list(range(before)), new=new, grants=grants), rows)


def later_bytes(limits: StepLimits, vocab_size: int, itemsize: int) -> int:
    """Bytes kept free for graphs captured later, which share one pool: as if those of all buckets had logits [rows,
    vocabulary] of their own, for mixed steps and for decoding ones; and the counts of requests with penalties.
    itemsize: bytes of a logit."""
    mixed = [min(bucket, limits.rows) for bucket in BUCKETS if bucket <= bucket_of(limits.most_tokens)]
    decoding = [min(bucket, limits.rows) for bucket in BUCKETS if bucket <= bucket_of(limits.rows)]
    counts = 4 * limits.rows
    return ((sum(mixed) + sum(decoding)) * itemsize + counts) * vocab_size
