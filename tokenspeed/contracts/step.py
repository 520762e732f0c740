"""Plans and results of one engine step: plain data, small ints, no tensor. They cross process borders as msgpack.

Device lengths are the truth, and several steps may be under way: a plan names upper bounds. The executor feeds a
sequence its known tokens that are not computed, then drafts of its own if it has any, or in further passes what it
sampled, `max_tokens` at most and never past `num_reserved` positions; whenever that reaches the end of what is known it
samples, one token per fed row that it accepts.
"""

from __future__ import annotations

from typing import Literal

import msgspec


class SamplingRow(msgspec.Struct, array_like=True, frozen=True):
    """What the sampler needs of one sequence; the fields of SamplingParams, resolved.

    `stop_ids`: eos and stop ids, which cannot be sampled before `min_tokens`. `logprobs`, `prompt_logprobs`: how many
    alternatives to report, -1 for none. `masked`: a mask of allowed ids comes with each step. `bad_words`: token
    sequences whose last token cannot follow the others where these were sampled. `processors`: the number under which
    the executor's own process has callables that change the logits first, 0 for none.
    """

    temperature: float
    top_k: int
    top_p: float
    seed: int
    logprobs: int = -1
    prompt_logprobs: int = -1
    sample_index: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    stop_ids: list[int] = []
    logit_bias: list[tuple[int, float]] = []
    allowed_ids: list[int] | None = None
    banned_ids: list[int] = []
    masked: bool = False
    bad_words: list[list[int]] = []
    processors: int = 0


class Pooling(msgspec.Struct, array_like=True, frozen=True):
    """What a sequence gives in place of tokens, once its prompt is computed. float32.

    embedding: the hidden state after the final norm, of the last token or, with `mean`, the mean over all tokens:
    [hidden size]. score: logits of the last token, of `token_ids` in their order, or all that a classification head has
    where there are none: [ids] or [labels].
    """

    kind: Literal["embedding", "score"]
    mean: bool = False
    token_ids: list[int] = []


class NewSequence(msgspec.Struct, array_like=True, frozen=True):
    """A sequence enters a slot: its known tokens, of which the first `num_prompt` are its prompt and the first
    `num_computed` are in its pages already, and how to sample it, or what it gives instead."""

    slot: int
    token_ids: list[int]
    num_computed: int
    num_prompt: int
    sampling: SamplingRow
    pooling: Pooling | None = None


class PageGrant(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Pages appended to a slot's block table of one group, starting at entry `first`. -1 stands for a page outside the
    group's window that was never taken."""

    slot: int
    group: int
    first: int
    pages: list[int]


class CopyPlan(msgspec.Struct, array_like=True, frozen=True):
    """Pages to copy whole, as (from, to) ids. Tier 0 is the arena that steps compute in."""

    pages: list[tuple[int, int]]
    source_tier: int = 0
    target_tier: int = 0


class StepDelta(msgspec.Struct, array_like=True, frozen=True):
    """What changed since the step before. Applied in this order: freed, copies, new, grants."""

    freed: list[int] = []
    copies: list[CopyPlan] = []
    new: list[NewSequence] = []
    grants: list[PageGrant] = []


class PlanRow(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """One sequence of a step: its slot, the most tokens it may feed, and how many positions have pages by now."""

    slot: int
    max_tokens: int
    num_reserved: int


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


class ResultRow(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """What a step gave one slot: positions that are now computed for good, tokens sampled or accepted, and the
    log-probabilities that were asked for.

    A step that did not reach the end of what is known has no tokens. One that did has k >= 1, and its computed
    positions end one before the last of them. `prompt_logprobs[i]` belongs to the token at position
    `first computed + 1 + i`, as far as it is a prompt token. Of a sequence that pools the end brings `pooled`
    (float32, little-endian) and no token.
    """

    slot: int
    num_computed: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs] = []
    prompt_logprobs: list[TokenLogprobs] = []
    pooled: bytes = b""


class StepResult(msgspec.Struct, array_like=True, frozen=True):
    """Rows in the order of the plan's. `num_passes`: how often the model was run."""

    step_id: int
    rows: list[ResultRow]
    num_passes: int = 1
