"""Which sequences a step feeds, and what its result means for them: one token budget, first come first served."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from tokenspeed.cache.manager import CacheManager
from tokenspeed.contracts.errors import MemoryLimitError, ParameterError, PromptError
from tokenspeed.contracts.request import Request, SequenceUpdate
from tokenspeed.contracts.step import NewSequence, PageGrant, PlanRow, ResultRow, StepDelta, StepPlan, StepResult
from tokenspeed.scheduler.config import SchedulerConfig
from tokenspeed.scheduler.lifecycle import Status
from tokenspeed.scheduler.sequence import Finish, Sequence, sampling_row


@dataclass(slots=True)
class _Step:
    """A step being planned, then in flight."""

    step_id: int
    budget: int
    rows: list[PlanRow] = field(default_factory=list)
    sequences: list[Sequence] = field(default_factory=list)
    new: list[NewSequence] = field(default_factory=list)
    grants: list[PageGrant] = field(default_factory=list)


class Scheduler:
    """Turns requests into step plans and step results into updates.

    There are no phases: a sequence has num_computed < num_tokens, and a step feeds it some of the difference. Running
    sequences come first, then waiting requests in order of arrival. A request is admitted only when the pages of its
    longest possible run are certain, so no sequence is ever taken back, and only from budget that the running ones
    left. Chunks never grow but for the sequence admitted last, so every running sequence is fed at every step.
    Steps are synchronous: each plan is followed by `update` before the next `schedule`.
    """

    def __init__(self, config: SchedulerConfig, cache: CacheManager) -> None:
        self._config = config
        self._cache = cache
        self._waiting: OrderedDict[str, Sequence] = OrderedDict()
        self._running: dict[str, Sequence] = {}
        self._free_slots = list(range(config.max_num_seqs - 1, -1, -1))
        self._freed_slots: list[int] = []
        self._next_step_id = 0
        self._in_flight: _Step | None = None

    @property
    def has_work(self) -> bool:
        return bool(self._running or self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens taken from the prefix cache since the start."""
        return self._cache.stats.hit_tokens

    def add(self, request: Request) -> None:
        """Queue a request. A refused one leaves no trace.

        Raises PromptError (empty, or no room for one token within max_model_len), MemoryLimitError (its longest run
        exceeds the whole cache), ParameterError (the id is in use).
        """
        request_id = request.request_id
        if request_id in self._waiting or request_id in self._running:
            raise ParameterError(f"request id {request_id!r} is in use")
        max_len = self._max_len(request)
        # The last token sampled is never fed, so it needs no place in a page.
        table = self._cache.open(request, max_computed=max_len - 1)
        if table.max_pages > self._cache.num_pages:
            raise MemoryLimitError(
                f"request {request_id!r} may need {table.max_pages * self._cache.page_size} tokens of KV cache "
                f"({table.max_pages} pages), {self._cache.num_pages * self._cache.page_size} tokens "
                f"({self._cache.num_pages} pages) are available: raise --kv-cache-memory-bytes, "
                f"lower --max-model-len ({self._config.max_model_len}) or the request's max_tokens"
            )
        self._waiting[request_id] = Sequence(request, list(request.prompt_token_ids), max_len, table)

    def abort(self, request_id: str) -> SequenceUpdate | None:
        """End a request now. Returns its last update, None when no such request is alive."""
        sequence = self._waiting.get(request_id) or self._running.get(request_id)
        if sequence is None:
            return None
        self._finish(sequence)
        return SequenceUpdate(request_id=request_id, finish_reason="abort", num_cached_tokens=sequence.num_cached)

    def schedule(self) -> StepPlan | None:
        """Plan the next step; None when there is nothing to run."""
        if self._in_flight is not None:
            raise RuntimeError(f"step {self._in_flight.step_id} has no result yet")
        step = _Step(self._next_step_id, self._config.max_num_batched_tokens)
        for sequence in self._running.values():
            self._feed(sequence, step)
        self._admit_waiting(step)
        if not step.rows:
            return None
        delta = StepDelta(freed=self._freed_slots, new=step.new, grants=step.grants)
        self._freed_slots = []
        self._next_step_id += 1
        self._in_flight = step
        return StepPlan(step.step_id, delta, step.rows)

    def update(self, result: StepResult) -> list[SequenceUpdate]:
        """Take in the result of the step in flight. Requests for which it brought nothing to report have no update.

        Raises RuntimeError when the result does not fit the plan.
        """
        step = self._in_flight
        if step is None or step.step_id != result.step_id:
            raise RuntimeError(f"result of step {result.step_id}, in flight: {step.step_id if step else 'none'}")
        if len(result.rows) != len(step.rows):
            raise RuntimeError(f"step {result.step_id}: {len(result.rows)} result rows for {len(step.rows)} planned")
        self._in_flight = None
        updates = []
        for sequence, planned, row in zip(step.sequences, step.rows, result.rows, strict=True):
            if row.slot != planned.slot or not 0 <= row.num_fed <= planned.max_tokens:
                raise RuntimeError(f"step {result.step_id}: planned {planned}, got slot {row.slot} fed {row.num_fed}")
            if sequence.status is Status.RUNNING and (update := self._advance(sequence, row)) is not None:
                updates.append(update)
        return updates

    def _max_len(self, request: Request) -> int:
        num_prompt, limit = len(request.prompt_token_ids), self._config.max_model_len
        if num_prompt == 0:
            raise PromptError(f"request {request.request_id!r}: the prompt is empty")
        if num_prompt >= limit:
            raise PromptError(
                f"request {request.request_id!r}: the prompt has {num_prompt} tokens, "
                f"max_model_len {limit} allows {limit - 1} and one sampled token"
            )
        max_tokens = request.params.max_tokens
        return limit if max_tokens is None else min(num_prompt + max_tokens, limit)

    def _admit_waiting(self, step: _Step) -> None:
        while self._waiting and step.budget and self._free_slots:
            sequence = next(iter(self._waiting.values()))
            num_cached = self._cache.admit(sequence.table, sequence.token_ids)
            if num_cached is None:
                break
            self._start(sequence, num_cached)
            tokens = sequence.token_ids.copy()
            step.new.append(NewSequence(sequence.slot, tokens, num_cached, sampling_row(sequence.request)))
            self._feed(sequence, step)

    def _start(self, sequence: Sequence, num_cached: int) -> None:
        request_id = sequence.request.request_id
        self._running[request_id] = self._waiting.pop(request_id)
        sequence.move(Status.RUNNING)
        sequence.slot = self._free_slots.pop()
        sequence.num_computed = sequence.num_cached = num_cached

    def _feed(self, sequence: Sequence, step: _Step) -> None:
        count = min(sequence.num_uncomputed, step.budget, self._config.max_chunk)
        table = sequence.table
        self._cache.grow(table, sequence.num_computed + count)
        if len(table.pages) > sequence.num_granted:
            step.grants.append(PageGrant(sequence.slot, sequence.num_granted, table.pages[sequence.num_granted :]))
            sequence.num_granted = len(table.pages)
        step.rows.append(PlanRow(sequence.slot, count))
        step.sequences.append(sequence)
        step.budget -= count

    def _advance(self, sequence: Sequence, row: ResultRow) -> SequenceUpdate | None:
        sequence.num_computed += row.num_fed
        if bool(row.token_ids) == bool(sequence.num_uncomputed):
            raise RuntimeError(
                f"slot {row.slot}: {len(row.token_ids)} tokens sampled, {sequence.num_uncomputed} known ones not fed"
            )
        self._cache.commit(sequence.table, sequence.token_ids, sequence.num_computed)
        new_token_ids, finish = sequence.accept(row.token_ids)
        if finish is not None:
            self._finish(sequence)
        elif not new_token_ids and not row.prompt_logprobs:
            return None
        return _update(sequence, row, new_token_ids, finish)

    def _finish(self, sequence: Sequence) -> None:
        request_id = sequence.request.request_id
        if sequence.status is Status.RUNNING:
            self._cache.free(sequence.table)
            self._free_slots.append(sequence.slot)
            self._freed_slots.append(sequence.slot)
            del self._running[request_id]
        else:
            del self._waiting[request_id]
        sequence.move(Status.FINISHED)


def _update(sequence: Sequence, row: ResultRow, new_token_ids: list[int], finish: Finish | None) -> SequenceUpdate:
    return SequenceUpdate(
        request_id=sequence.request.request_id,
        new_token_ids=new_token_ids,
        logprobs=row.logprobs[: len(new_token_ids)],
        prompt_logprobs=row.prompt_logprobs,
        finish_reason=finish.reason if finish else None,
        stop_reason=finish.stop_reason if finish else None,
        num_cached_tokens=sequence.num_cached,
    )
