"""An executor without tensors: it checks every plan against the contract and simulates what the pages hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from tokenspeed.contracts.request import Request
from tokenspeed.contracts.step import (
    NewSequence,
    PageGrant,
    PlanRow,
    ResultRow,
    SamplingRow,
    StepPlan,
    StepResult,
    TokenLogprobs,
)

VOCAB_SIZE = 50
NextToken = Callable[[list[int]], int]


def hashed_next_token(token_ids: list[int]) -> int:
    """A token that depends on the whole prefix; the same in every process."""
    return hash(tuple(token_ids)) % VOCAB_SIZE


def expected_completion(
    request: Request, max_model_len: int, next_token: NextToken = hashed_next_token
) -> tuple[list[int], str, int | None]:
    """Tokens, finish_reason and stop_reason of a request that runs alone."""
    params, tokens, output = request.params, list(request.prompt_token_ids), []
    while True:
        token = next_token(tokens)
        tokens.append(token)
        output.append(token)
        if not params.ignore_eos and token in request.eos_token_ids:
            return output, "stop", None
        if token in params.stop_token_ids:
            return output, "stop", token
        if len(output) == params.max_tokens or len(tokens) == max_model_len:
            return output, "length", None


@dataclass
class _Slot:
    tokens: list[int]
    num_prompt: int
    computed: int
    sampling: SamplingRow
    pages: list[int] = field(default_factory=list)


@dataclass
class FakeHandle:
    step: StepResult

    def result(self) -> StepResult:
        return self.step


class FakeExecutor:
    """Implements `Executor`. A page entry holds a digest of the whole prefix up to its token, as real KV depends on it.

    Breaches of the contract are AssertionErrors. Plans and results pass through msgpack as between processes.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        next_token: NextToken = hashed_next_token,
    ) -> None:
        self.page_size = page_size
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.slots: dict[int, _Slot] = {}
        self.num_fed_total = 0
        self._contents: list[list[int | None]] = [[None] * page_size for _ in range(num_pages)]
        self._next_token = next_token
        self._last_step = -1

    def launch(self, plan: StepPlan) -> FakeHandle:
        plan = msgspec.msgpack.decode(msgspec.msgpack.encode(plan), type=StepPlan)
        assert plan.step_id > self._last_step
        self._last_step = plan.step_id
        for slot in plan.delta.freed:
            del self.slots[slot]
        for new in plan.delta.new:
            self._enter(new)
        for grant in plan.delta.grants:
            self._grant(grant)
        self._check_rows(plan.rows)
        result = StepResult(plan.step_id, [self._run(row) for row in plan.rows])
        return FakeHandle(msgspec.msgpack.decode(msgspec.msgpack.encode(result), type=StepResult))

    def close(self) -> None:
        self.slots.clear()

    def _enter(self, new: NewSequence) -> None:
        assert new.slot not in self.slots, f"slot {new.slot} reused before it was freed"
        assert 0 <= new.slot < self.max_num_seqs
        assert 0 <= new.num_computed < len(new.token_ids)
        self.slots[new.slot] = _Slot(list(new.token_ids), len(new.token_ids), new.num_computed, new.sampling)

    def _grant(self, grant: PageGrant) -> None:
        slot = self.slots[grant.slot]
        assert grant.first == len(slot.pages)
        assert all(0 <= page < len(self._contents) for page in grant.pages)
        slot.pages += grant.pages
        assert len(set(slot.pages)) == len(slot.pages)

    def _check_rows(self, rows: list[PlanRow]) -> None:
        assert rows
        assert len({row.slot for row in rows}) == len(rows)
        assert all(row.max_tokens > 0 for row in rows)
        assert sum(row.max_tokens for row in rows) <= self.max_num_batched_tokens

    def _run(self, row: PlanRow) -> ResultRow:
        slot = self.slots[row.slot]
        start = slot.computed
        num_fed = min(row.max_tokens, len(slot.tokens) - start)
        self.num_fed_total += num_fed
        self._check_cache_reads(slot, start)
        for position in range(start, start + num_fed):
            self._write(row.slot, position)
        slot.computed += num_fed
        prompt_logprobs = self._prompt_logprobs(slot, start)
        if slot.computed < len(slot.tokens):
            return ResultRow(row.slot, num_fed, [], [], prompt_logprobs)
        token = self._next_token(slot.tokens)
        slot.tokens.append(token)
        logprobs = [_logprob(token)] if slot.sampling.logprobs >= 0 else []
        return ResultRow(row.slot, num_fed, [token], logprobs, prompt_logprobs)

    def _write(self, slot_id: int, position: int) -> None:
        slot = self.slots[slot_id]
        assert position < len(slot.pages) * self.page_size, f"position {position} has no page"
        page = slot.pages[position // self.page_size]
        sharers = [other for other, state in self.slots.items() if page in state.pages]
        assert sharers == [slot_id], f"page {page} written by slot {slot_id}, held by {sharers}"
        self._contents[page][position % self.page_size] = _digest(slot.tokens, position)

    def _check_cache_reads(self, slot: _Slot, length: int) -> None:
        for position in range(length):
            page = slot.pages[position // self.page_size]
            assert self._contents[page][position % self.page_size] == _digest(slot.tokens, position)

    def _prompt_logprobs(self, slot: _Slot, start: int) -> list[TokenLogprobs]:
        if slot.sampling.prompt_logprobs < 0:
            return []
        return [_logprob(token) for token in slot.tokens[start + 1 : min(slot.computed + 1, slot.num_prompt)]]


def _digest(tokens: list[int], position: int) -> int:
    return hash(tuple(tokens[: position + 1]))


def _logprob(token: int) -> TokenLogprobs:
    return TokenLogprobs(token, -0.5, 1, [], [])
