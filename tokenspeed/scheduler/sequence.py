"""A request on its way through the engine: its sequences, what is known of each, and when one ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from tokenspeed.cache.table import BlockTable, Hit
from tokenspeed.contracts.lifecycle import Status, check_transition
from tokenspeed.contracts.request import Request, SequenceUpdate
from tokenspeed.contracts.sampling import to_row
from tokenspeed.contracts.step import CopyPlan, ResultRow, SamplingRow, TokenLogprobs


class Order(NamedTuple):
    """The place in the queue, lower first; it never changes, so a heap or a sorted list can hold it."""

    rank: int
    """Arrival, in steps, plus the priority's worth of steps."""
    arrival: int
    sample: int


class Finish(NamedTuple):
    """Why a sequence ended, in the terms of SequenceUpdate."""

    reason: str
    stop_reason: int | None = None


class LiveRequest:
    """A request and its n sequences. `unforked`: those that wait for the first one to compute the prompt they share."""

    def __init__(self, request: Request, max_len: int) -> None:
        """`max_len`: tokens, prompt included, at which a sequence ends with "length"."""
        params = request.params
        self.request = request
        self.request_id = request.request_id
        self.max_len = max_len
        self.num_prompt = len(request.prompt_token_ids)
        self.min_len = self.num_prompt + params.min_tokens
        self.eos_ids: frozenset[int] = frozenset(() if params.ignore_eos else request.eos_token_ids)
        self.end_ids = self.eos_ids.union(params.stop_token_ids)
        self.sequences: list[Sequence] = []
        self.unforked: list[Sequence] = []

    @property
    def alive(self) -> list[Sequence]:
        return [sequence for sequence in self.sequences if sequence.status is not Status.FINISHED]


@dataclass(slots=True, eq=False)
class Sequence:
    """Known tokens (prompt, then sampled ones), of which the first `num_computed` have their KV in the pages.

    That is what the host knows. Rows in flight will compute up to `ahead` positions more, so the next row is planned
    from `planned`, an upper bound, which is exact as long as no row in flight reaches the end of what is known.
    """

    live: LiveRequest
    index: int
    order: Order
    token_ids: list[int]
    table: BlockTable
    status: Status = Status.WAITING
    slot: int = -1
    num_computed: int = 0
    ahead: int = 0
    planned: int = 0
    num_cached: int = 0
    """Prompt tokens found in the prefix cache when it first started."""
    started: bool = False
    num_scored: int = 0
    """Prompt positions whose log-probabilities have been reported."""
    num_granted: int = 0
    """Entries of `table` that the executor knows."""
    entered: bool = False
    """Whether a plan has named its slot."""
    prompt_step: int = -1
    """The step that computes the last of its prompt but one token: from the next step on it can be forked."""
    last_step: int = -1
    """The last step that names it: its fence."""
    copies: CopyPlan | None = None
    """Copies that its first row needs."""
    refused: tuple[int, Hit] | None = None
    """The forecast, by number, that had no room for it, and what the cache held of it."""

    @property
    def num_uncomputed(self) -> int:
        """Known tokens that no row has been planned for; 1 or less when it decodes."""
        return len(self.token_ids) - self.planned

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.live.num_prompt

    @property
    def scores_prompt(self) -> bool:
        """Whether log-probabilities of its prompt are still to be reported, so that every position must be computed."""
        wanted = self.index == 0 and self.live.request.params.prompt_logprobs is not None
        return wanted and self.num_scored < self.live.num_prompt - 1

    @property
    def computes_all(self) -> bool:
        """Whether every position of its prompt must be computed, so that cached prefixes are of no use: their hidden
        states are not kept."""
        pooling = self.live.request.pooling
        return self.scores_prompt or (pooling is not None and pooling.mean)

    def move(self, status: Status) -> None:
        check_transition(self.status, status)
        self.status = status

    def start(self, slot: int, num_computed: int) -> None:
        """Run in a slot, from `num_computed` tokens that the pages hold or will hold by its first step."""
        self.move(Status.RUNNING)
        self.slot = slot
        self.num_computed = self.planned = num_computed
        self.started, self.refused = True, None

    def restart(self) -> None:
        """Wait anew, with all tokens known so far, for a slot and pages."""
        self.move(Status.WAITING)
        self.slot = self.prompt_step = self.last_step = -1
        self.num_computed = self.ahead = self.planned = self.num_granted = 0
        self.entered = False

    def advance(self, row: ResultRow, max_tokens: int) -> tuple[list[int], Finish | None]:
        """Take in the oldest row in flight. Returns the tokens it appended, and why it ended or None.

        Raises RuntimeError when the row does not fit the plan.
        """
        num_new, known, before = len(row.token_ids), len(self.token_ids), self.num_computed
        end = known + num_new - 1 if num_new else before + max_tokens
        gives = row.token_ids if self.live.request.pooling is None else row.pooled
        if row.num_computed != end or not before < end <= before + max_tokens or (end >= known) != bool(gives):
            raise RuntimeError(
                f"slot {row.slot}: {num_new} tokens and {row.num_computed} positions computed, after {known} tokens, "
                f"{before} positions and a row of at most {max_tokens}"
            )
        self.num_computed = end
        self.ahead -= max_tokens
        self.planned = end + self.ahead
        return self.accept(row.token_ids) if num_new else ([], None)

    def accept(self, token_ids: list[int]) -> tuple[list[int], Finish | None]:
        """Append sampled tokens up to the one that ends it. Returns those appended, and why it ended or None."""
        known, end_ids, max_len = self.token_ids, self.live.end_ids, self.live.max_len
        for count, token_id in enumerate(token_ids, start=1):
            known.append(token_id)
            if (token_id in end_ids or len(known) >= max_len) and (finish := self._finish_at(token_id)):
                return token_ids[:count], finish
        return token_ids, None

    def new_scores(self, scores: list[TokenLogprobs], start: int) -> list[TokenLogprobs]:
        """Of the prompt log-probabilities of a row whose first position was `start`, those not reported before: after a
        preemption the prompt is computed again."""
        scores = scores[self.num_scored - start :]
        self.num_scored += len(scores)
        return scores

    def update(self, new_token_ids: list[int], finish: Finish | None = None) -> SequenceUpdate:
        """What to report; log-probabilities aside."""
        update = SequenceUpdate(
            request_id=self.live.request_id,
            index=self.index,
            new_token_ids=new_token_ids,
            num_cached_tokens=self.num_cached,
        )
        if finish is not None:
            update.finish_reason, update.stop_reason = finish
        return update

    def sampling_row(self) -> SamplingRow:
        request = self.live.request
        row = to_row(request.params, request.seed, request.eos_token_ids, self.index, request.processors)
        return row if self.scores_prompt else msgspec.structs.replace(row, prompt_logprobs=-1)

    def _finish_at(self, token_id: int) -> Finish | None:
        """The order is vLLM's: eos, stop ids, length."""
        live, length = self.live, len(self.token_ids)
        if token_id in live.end_ids and length >= live.min_len:
            return Finish("stop") if token_id in live.eos_ids else Finish("stop", token_id)
        return Finish("length") if length >= live.max_len else None
