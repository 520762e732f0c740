"""Plans and results of one engine step: plain data, small ints, no tensor. They cross process borders as msgpack.

Device lengths are the truth. A plan names upper bounds; the executor feeds min(max_tokens, tokens known - tokens
computed) tokens of a sequence, and samples one token whenever that reaches the end of what is known.
"""

from __future__ import annotations

import msgspec


class SamplingRow(msgspec.Struct, array_like=True, frozen=True):
    """The numbers the sampler needs of one sequence. `logprobs`, `prompt_logprobs`: alternatives to report, -1 for
    none."""

    temperature: float
    top_k: int
    top_p: float
    seed: int
    logprobs: int = -1
    prompt_logprobs: int = -1


class NewSequence(msgspec.Struct, array_like=True, frozen=True):
    """A sequence enters a slot: its known tokens, how many of them are already in its first pages, how to sample."""

    slot: int
    token_ids: list[int]
    num_computed: int
    sampling: SamplingRow


class PageGrant(msgspec.Struct, array_like=True, frozen=True):
    """Pages appended to a slot's block table, starting at entry `first`."""

    slot: int
    first: int
    pages: list[int]


class StepDelta(msgspec.Struct, array_like=True, frozen=True):
    """What changed since the step before. Applied in this order: freed, new, grants."""

    freed: list[int] = []
    new: list[NewSequence] = []
    grants: list[PageGrant] = []


class PlanRow(msgspec.Struct, array_like=True, frozen=True):
    """One sequence of a step: its slot and the most tokens it may feed; pages for them are already granted."""

    slot: int
    max_tokens: int


class StepPlan(msgspec.Struct, array_like=True, frozen=True):
    """One step: the delta first, then the rows."""

    step_id: int
    delta: StepDelta
    rows: list[PlanRow]


class TokenLogprobs(msgspec.Struct, array_like=True, frozen=True):
    """Log-probability of one token under the raw logits, its rank (1 is the argmax), and the best alternatives in
    order."""

    token_id: int
    logprob: float
    rank: int
    top_ids: list[int]
    top_logprobs: list[float]


class ResultRow(msgspec.Struct, array_like=True, frozen=True):
    """What a step gave one slot: tokens fed, tokens sampled, and the log-probabilities that were asked for.

    `prompt_logprobs[i]` belongs to the known token at position `fed_from + 1 + i`, as far as it is a prompt token.
    """

    slot: int
    num_fed: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs] = []
    prompt_logprobs: list[TokenLogprobs] = []


class StepResult(msgspec.Struct, array_like=True, frozen=True):
    """Rows in the order of the plan's."""

    step_id: int
    rows: list[ResultRow]
