"""An asynchronous executor without tensors: it checks every plan against the contract and simulates what pages hold."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from tokenspeed.cache.groups import FULL_ONLY, GroupSpec
from tokenspeed.contracts.request import Request
from tokenspeed.contracts.step import (
    CopyPlan,
    NewSequence,
    PageGrant,
    PlanRow,
    Pooling,
    ResultRow,
    SamplingRow,
    StepPlan,
    StepResult,
    TokenLogprobs,
)

VOCAB_SIZE = 50
NextToken = Callable[[list[int], int], int]
"""Tokens and sample index to the next token."""


def hashed_next_token(token_ids: list[int], sample_index: int) -> int:
    """A token that depends on the whole prefix; the same in every process."""
    return hash((sample_index, *token_ids)) % VOCAB_SIZE


def expected_completion(
    request: Request, max_model_len: int, sample_index: int = 0, next_token: NextToken = hashed_next_token
) -> tuple[list[int], str, int | None]:
    """Tokens, finish_reason and stop_reason of one sequence of a request that runs alone."""
    params, tokens, output = request.params, list(request.prompt_token_ids), []
    if request.pooling is not None:
        return [], "stop", None
    while True:
        token = next_token(tokens, sample_index)
        tokens.append(token)
        output.append(token)
        may_stop = len(output) >= params.min_tokens
        if may_stop and not params.ignore_eos and token in request.eos_token_ids:
            return output, "stop", None
        if may_stop and token in params.stop_token_ids:
            return output, "stop", token
        if len(output) == params.max_tokens or len(tokens) == max_model_len:
            return output, "length", None


@dataclass
class _Slot:
    tokens: list[int]
    num_prompt: int
    computed: int
    sampling: SamplingRow
    tables: list[list[int]]
    shared_entries: int
    """Entries it may not write: they were computed before it entered."""
    pooling: Pooling | None
    pooled: list[int] = field(default_factory=list)
    """Tokens it was fed since it entered."""


@dataclass
class _Launched:
    result: bytes
    slots: set[int]
    touched: set[int]
    """Pages that the step may read or write."""
    polls: int
    """How often it is asked before it is ready."""


@dataclass
class FakeHandle:
    """A launched step. `poll` says whether it is over; `result` waits, and takes it off the device."""

    executor: FakeExecutor
    step: _Launched

    def poll(self) -> bool:
        self.step.polls -= 1
        return self.step.polls < 0

    def result(self) -> StepResult:
        assert self.executor.in_flight[0] is self.step, "results taken out of order"
        self.executor.in_flight.popleft()
        return msgspec.msgpack.decode(self.step.result, type=StepResult)


@dataclass
class FakeExecutor:
    """Implements `Executor`. An entry of a page holds its group and a digest of the whole prefix, on which KV depends.

    Breaches of the contract are AssertionErrors. Plans and results pass through msgpack as between processes. A row
    that reaches the end feeds and accepts a random number of drafts within its plan; a step is ready after a random
    number of polls.
    """

    num_pages: int
    page_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    next_token: NextToken = hashed_next_token
    groups: Sequence[GroupSpec] = FULL_ONLY
    seed: int = 0
    max_delay: int = 0
    slots: dict[int, _Slot] = field(default_factory=dict)
    in_flight: deque[_Launched] = field(default_factory=deque)
    num_fed_total: int = 0
    last_step: int = -1

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._contents: list[list[object]] = [[None] * self.page_size for _ in range(self.num_pages)]
        self._touched: set[int] = set()
        self._copied: set[int] = set()

    def launch(self, plan: StepPlan) -> FakeHandle:
        plan = msgspec.msgpack.decode(msgspec.msgpack.encode(plan), type=StepPlan)
        assert plan.step_id == self.last_step + 1
        self.last_step = plan.step_id
        self._touched, self._copied = set(), set()
        for slot in plan.delta.freed:
            self._free(slot)
        for copies in plan.delta.copies:
            self._copy(copies)
        for new in plan.delta.new:
            self._enter(new)
        for grant in plan.delta.grants:
            self._grant(grant)
        self._check_rows(plan.rows)
        result = StepResult(plan.step_id, [self._run(row) for row in plan.rows])
        launched = _Launched(
            msgspec.msgpack.encode(result),
            {row.slot for row in plan.rows},
            self._touched,
            self._random.randint(0, self.max_delay),
        )
        self.in_flight.append(launched)
        return FakeHandle(self, launched)

    def sleep(self) -> None:
        assert not self.in_flight
        self._contents = [[None] * self.page_size for _ in range(self.num_pages)]

    def wake(self) -> None:
        pass

    def close(self) -> None:
        self.slots.clear()

    def _free(self, number: int) -> None:
        del self.slots[number]
        assert all(number not in step.slots for step in self.in_flight), f"slot {number} freed before its fence"

    def _copy(self, plan: CopyPlan) -> None:
        assert plan.pages
        assert (plan.source_tier, plan.target_tier) == (0, 0)
        for source, target in plan.pages:
            self._check_fresh(target)
            self._contents[target] = list(self._contents[source])
            self._touched |= {source, target}
            self._copied.add(target)

    def _enter(self, new: NewSequence) -> None:
        assert new.slot not in self.slots, f"slot {new.slot} reused before it was freed"
        assert 0 <= new.slot < self.max_num_seqs
        assert 0 <= new.num_computed < len(new.token_ids)
        assert 1 <= new.num_prompt <= len(new.token_ids)
        tables: list[list[int]] = [[] for _ in self.groups]
        shared = new.num_computed // self.page_size
        tokens = list(new.token_ids)
        pooling = new.pooling
        self.slots[new.slot] = _Slot(tokens, new.num_prompt, new.num_computed, new.sampling, tables, shared, pooling)

    def _grant(self, grant: PageGrant) -> None:
        slot = self.slots[grant.slot]
        table = slot.tables[grant.group]
        assert grant.first == len(table)
        for page in grant.pages:
            live = len(table) >= self._first_live(grant.group, slot.computed)
            assert (page == -1) <= (not live), f"entry {len(table)} is within the window and has no page"
            if page != -1 and len(table) >= slot.shared_entries and page not in self._copied:
                self._check_fresh(page)
            table.append(page)
        pages = [page for group, _ in enumerate(slot.tables) for page in self._live(slot, group) if page != -1]
        assert len(set(pages)) == len(pages), "a page has two places in one sequence"

    def _check_fresh(self, page: int) -> None:
        """A page that is going to be written: nobody holds it, and no step in flight may still touch it."""
        assert 0 <= page < self.num_pages
        assert all(page not in step.touched for step in self.in_flight), f"page {page} reused before its fence"
        assert not self._holders(page), f"page {page} granted while slots {self._holders(page)} hold it"

    def _holders(self, page: int) -> list[int]:
        """Slots for which the page is live; outside a window it may belong to another by now."""
        return [
            number
            for number, slot in self.slots.items()
            for group, _ in enumerate(slot.tables)
            if page in self._live(slot, group)
        ]

    def _live(self, slot: _Slot, group: int) -> list[int]:
        return slot.tables[group][self._first_live(group, slot.computed) :]

    def _first_live(self, group: int, position: int) -> int:
        return self.groups[group].first_live(position, self.page_size)

    def _check_rows(self, rows: list[PlanRow]) -> None:
        assert rows
        assert len({row.slot for row in rows}) == len(rows)
        assert all(row.max_tokens > 0 for row in rows)
        assert sum(row.max_tokens for row in rows) <= self.max_num_batched_tokens
        for row in rows:
            slot = self.slots[row.slot]
            assert row.num_reserved > slot.computed
            assert all(row.num_reserved <= len(table) * self.page_size for table in slot.tables)

    def _run(self, row: PlanRow) -> ResultRow:
        slot = self.slots[row.slot]
        start, known = slot.computed, len(slot.tokens)
        most = min(row.max_tokens, row.num_reserved - start)
        self._read(slot, start)
        num_known = min(most, known - start)
        at_end = start + num_known == known
        num_new = self._random.randint(1, most - num_known + 1) if at_end and slot.pooling is None else 0
        num_fed = self._random.randint(num_known + num_new - 1, most) if num_new else num_known
        for _ in range(num_new):
            slot.tokens.append(self.next_token(slot.tokens, slot.sampling.sample_index))
        slot.computed = start + num_known + max(0, num_new - 1)
        self.num_fed_total += num_fed
        for position in range(start, start + num_fed):
            self._write(row.slot, position)
        new = slot.tokens[known:]
        logprobs = [_logprob(token) for token in new] if slot.sampling.logprobs >= 0 else []
        pooled = self._pooled(slot, start) if slot.pooling is not None else b""
        return ResultRow(row.slot, slot.computed, new, logprobs, self._prompt_logprobs(slot, start), pooled)

    def _write(self, number: int, position: int) -> None:
        slot = self.slots[number]
        index, offset = divmod(position, self.page_size)
        assert index >= slot.shared_entries, f"position {position} of slot {number} is shared"
        right = position < slot.computed
        for group, table in enumerate(slot.tables):
            page = table[index]
            others = [holder for holder in self._holders(page) if holder != number]
            assert not others, f"page {page} written by slot {number}, held by {others}"
            self._contents[page][offset] = (group, _digest(slot.tokens, position)) if right else "rejected draft"
            self._touched.add(page)

    def _read(self, slot: _Slot, start: int) -> None:
        """A query at `start` reads what each group's window shows of the positions before it."""
        for group, table in enumerate(slot.tables):
            window = self.groups[group].window
            for position in range(max(0, start - window + 1) if window else 0, start):
                page = table[position // self.page_size]
                found = self._contents[page][position % self.page_size]
                assert found == (group, _digest(slot.tokens, position)), f"page {page}, position {position}: {found}"
                self._touched.add(page)

    def _pooled(self, slot: _Slot, start: int) -> bytes:
        """A mean is of all tokens fed since it entered; everything else of the last token."""
        assert slot.pooling is not None
        slot.pooled += slot.tokens[start : slot.computed]
        if slot.computed < len(slot.tokens):
            return b""
        return bytes(slot.pooled if slot.pooling.mean else slot.pooled[-1:])

    def _prompt_logprobs(self, slot: _Slot, start: int) -> list[TokenLogprobs]:
        if slot.sampling.prompt_logprobs < 0:
            return []
        return [_logprob(token) for token in slot.tokens[start + 1 : min(slot.computed + 1, slot.num_prompt)]]


def _digest(tokens: list[int], position: int) -> int:
    return hash(tuple(tokens[: position + 1]))


def _logprob(token: int) -> TokenLogprobs:
    return TokenLogprobs(token, -0.5, 1, [], [])
