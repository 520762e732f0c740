"""Which sequences a step feeds, and what its result means for them: one token budget, several steps in flight."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterable

from tokenspeed.cache.manager import CacheManager
from tokenspeed.cache.table import Hit
from tokenspeed.contracts.errors import MemoryLimitError, ParameterError, PromptError
from tokenspeed.contracts.lifecycle import Status
from tokenspeed.contracts.request import Request, SequenceUpdate
from tokenspeed.contracts.step import ResultRow, StepPlan, StepResult
from tokenspeed.scheduler.admission import AdmissionPolicy, ForecastAdmission
from tokenspeed.scheduler.burst import LONGEST_S, Burst
from tokenspeed.scheduler.config import SchedulerConfig
from tokenspeed.scheduler.pace import StepPace
from tokenspeed.scheduler.queue import OrderedSequences, order_of
from tokenspeed.scheduler.records import SchedulerStats, StepRecord
from tokenspeed.scheduler.sequence import Finish, LiveRequest, Sequence
from tokenspeed.scheduler.step import Step


class Scheduler:
    """Turns requests into step plans and step results into updates.

    There are no phases: a sequence has num_computed < num_tokens, and a step feeds it some of the difference. Those
    with one token to feed come first, each gets a row; then longer remainders in order, then waiting sequences in
    order, as far as budget, slots and the admission policy allow. The first that must wait holds back those after it.

    `schedule` may be called again before `update`: plans use upper bounds. Results are taken in the order of launches.
    Pages and slots that a launched step names are given back only when the last such step has retired (its fence).
    """

    def __init__(self, config: SchedulerConfig, cache: CacheManager, admission: AdmissionPolicy | None = None) -> None:
        self._config = config
        self._cache = cache
        self._admission = admission or ForecastAdmission(cache)
        target_s = math.inf if config.target_itl_ms is None else config.target_itl_ms / 1000
        self._pace = StepPace(target_s) if math.isfinite(target_s) else None
        self._burst = Burst(config.max_passes, min(LONGEST_S, target_s))
        self._requests: dict[str, LiveRequest] = {}
        self._waiting = OrderedSequences()
        self._running = OrderedSequences()
        self._free_slots = list(range(config.max_num_seqs - 1, -1, -1))
        self._freed_slots: list[int] = []
        self._in_flight: deque[Step] = deque()
        self._fenced: defaultdict[int, list[Sequence | list[int]]] = defaultdict(list)
        self._pages_due = 0
        self._next_step_id = 0
        self._retired = -1
        self._arrivals = 0
        self._num_alive = 0
        self._num_preemptions = 0
        self._preempted: list[str] = []
        self._record = StepRecord(-1, [], 0, 0, [])

    @property
    def has_work(self) -> bool:
        """Whether a request is alive. Steps may be in flight without one: their results must still be taken."""
        return bool(self._requests)

    @property
    def num_requests(self) -> int:
        """Requests that are alive."""
        return len(self._requests)

    def is_alive(self, request_id: str) -> bool:
        """Whether a request waits or runs."""
        return request_id in self._requests

    @property
    def request_ids(self) -> list[str]:
        """Ids of the requests that are alive."""
        return list(self._requests)

    @property
    def num_running(self) -> int:
        """Sequences that have a slot and were not preempted."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait, for their fence after preemption too."""
        return self._num_alive - len(self._running)

    @property
    def num_in_flight(self) -> int:
        """Steps planned whose results have not been taken."""
        return len(self._in_flight)

    @property
    def record(self) -> StepRecord:
        """Of the step planned last."""
        return self._record

    def stats(self) -> SchedulerStats:
        """A snapshot for metrics."""
        cache, prefix = self._cache, self._cache.stats
        return SchedulerStats(
            num_running=len(self._running),
            num_waiting=self.num_waiting,
            num_steps_in_flight=len(self._in_flight),
            num_preemptions=self._num_preemptions,
            pages_total=cache.num_pages,
            pages_held=cache.num_held,
            pages_cached=cache.num_cached_pages,
            pages_available=cache.num_available,
            prefix_queries=prefix.queries,
            prefix_queried_tokens=prefix.queried_tokens,
            prefix_hit_tokens=prefix.hit_tokens,
            budget_used=self._record.num_tokens / self._config.max_num_batched_tokens,
        )

    def add(self, request: Request) -> None:
        """Queue a request. A refused one leaves no trace.

        Raises PromptError (empty, or no room for one token within max_model_len), MemoryLimitError (its longest run
        exceeds the whole cache), ParameterError (the id is in use).
        """
        if request.request_id in self._requests:
            raise ParameterError(f"request id {request.request_id!r} is in use")
        live = LiveRequest(request, self._max_len(request))
        self._check_memory(live)
        self._arrivals += 1
        for index in range(request.params.n):
            order = order_of(request.priority, self._next_step_id, self._arrivals, index)
            table = self._cache.open(request.cache_salt)
            live.sequences.append(Sequence(live, index, order, list(request.prompt_token_ids), table))
        live.unforked = live.sequences[1:]
        self._num_alive += len(live.sequences)
        self._requests[request.request_id] = live
        self._waiting.add(live.sequences[0])

    def abort(self, request_id: str, index: int | None = None) -> list[SequenceUpdate]:
        """End a request, or one sequence of it, now. Returns their last updates; none for what is not alive."""
        live = self._requests.get(request_id)
        ended = [] if live is None else [s for s in live.alive if index is None or s.index == index]
        for sequence in ended:
            self._finish(sequence, cut=False)
        return [sequence.update([], Finish("abort")) for sequence in ended]

    def observe(self, num_tokens: int, seconds: float) -> None:
        """A step that fed `num_tokens` took `seconds`; prefill beside decode is paced by that."""
        if self._pace is not None:
            self._pace.observe(num_tokens, seconds)

    def observe_decode(self, num_tokens: int, num_passes: int, seconds: float) -> None:
        """A step that only decoded, `num_tokens` in all its passes, took `seconds`."""
        self._burst.observe(num_passes, seconds)
        self.observe(max(1, num_tokens // num_passes), seconds / num_passes)

    def forget_prefixes(self) -> int:
        """Drop what the cache holds of sequences that ended; how many pages that were. RuntimeError while a request is
        alive or a step in flight."""
        if self._requests or self._in_flight:
            raise RuntimeError(f"{len(self._requests)} requests and {len(self._in_flight)} steps use the cache")
        return self._cache.reset()

    def schedule(self) -> StepPlan | None:
        """Plan the next step. None when there is nothing to run, at least until a step in flight has retired."""
        step = Step(self._next_step_id, self._config.max_num_batched_tokens)
        self._plan_running(step)
        self._admit_waiting(step)
        for sequence in step.forked:
            self._running.add(sequence)
        if not step.rows:
            return None
        plan = step.plan(self._freed_slots)
        self._record = step.record(self._preempted)
        self._freed_slots, self._preempted = [], []
        self._next_step_id += 1
        self._in_flight.append(step)
        return plan

    def update(self, result: StepResult) -> list[SequenceUpdate]:
        """Take in the result of the oldest step in flight. Sequences for which it brought nothing have no update.

        Raises RuntimeError when the result does not fit the plan.
        """
        step = self._in_flight[0] if self._in_flight else None
        if step is None or step.step_id != result.step_id:
            raise RuntimeError(f"result of step {result.step_id}, in flight: {step.step_id if step else 'none'}")
        if len(result.rows) != len(step.rows):
            raise RuntimeError(f"step {result.step_id}: {len(result.rows)} result rows for {len(step.rows)} planned")
        updates = []
        for sequence, planned, row in zip(step.sequences, step.rows, result.rows, strict=True):
            if row.slot != planned.slot:
                raise RuntimeError(f"step {result.step_id}: planned slot {planned.slot}, got {row.slot}")
            if sequence.status is Status.FINISHED:
                continue
            if (update := self._advance(sequence, planned.max_tokens, row)) is not None:
                updates.append(update)
        self._in_flight.popleft()
        self._retire(step.step_id)
        return updates

    def _max_len(self, request: Request) -> int:
        num_prompt, limit = len(request.prompt_token_ids), self._config.max_model_len
        if num_prompt == 0:
            raise PromptError(f"request {request.request_id!r}: the prompt is empty")
        if request.pooling is not None and num_prompt <= limit:
            return num_prompt + 1  # as if one were sampled: it is never fed
        if num_prompt >= limit:
            raise PromptError(
                f"request {request.request_id!r}: the prompt has {num_prompt} tokens, "
                f"max_model_len {limit} allows {limit - 1} and one sampled token, or {limit} and none"
            )
        max_tokens = request.params.max_tokens
        return limit if max_tokens is None else min(num_prompt + max_tokens, limit)

    def _check_memory(self, live: LiveRequest) -> None:
        """The last token sampled is never fed, so it needs no place in a page."""
        cache = self._cache
        num_pages = cache.most_pages(live.max_len - 1)
        if num_pages > cache.num_pages:
            raise MemoryLimitError(
                f"request {live.request_id!r} may need {num_pages * cache.page_size} tokens of KV cache "
                f"({num_pages} pages), {cache.num_pages * cache.page_size} tokens "
                f"({cache.num_pages} pages) are available: raise --kv-cache-memory-bytes, "
                f"lower --max-model-len ({self._config.max_model_len}) or the request's max_tokens"
            )

    def _plan_running(self, step: Step) -> None:
        decoding: list[Sequence] = []
        prefilling: list[Sequence] = []
        for sequence in self._running:
            if len(sequence.token_ids) - sequence.planned > 1:  # num_uncomputed; this loop is the hottest
                prefilling.append(sequence)
            else:
                decoding.append(sequence)
        if decoding:
            # Each sequence must find a token, so drafts get no more than a fair share of what is left over.
            share = (step.budget - len(prefilling)) // len(decoding)
            passes = 1 if prefilling or len(self._waiting) else self._burst.num_passes()
            most = min(max(1 + self._config.max_draft_tokens, passes), share)
            for sequence in decoding:
                self._decode(sequence, most, step)
            self._pace_prefill(step)
        for sequence in prefilling:
            self._prefill(sequence, step)

    def _pace_prefill(self, step: Step) -> None:
        """Leave of the budget what keeps the step within its time, but a page's worth at least: prompts must go on."""
        if self._pace is not None:
            allowed = max(self._cache.page_size, self._pace.max_tokens() - step.num_tokens)
            step.budget = min(step.budget, allowed)

    def _decode(self, sequence: Sequence, most: int, step: Step) -> None:
        """A row for a sequence that reaches the end of its known tokens. If the rows in flight might complete it, their
        results must come first."""
        want = min(most, sequence.live.max_len - 1 - sequence.planned)
        if want > 0 and sequence.status is Status.RUNNING:
            self._feed(sequence, want, step)

    def _prefill(self, sequence: Sequence, step: Step) -> None:
        """A chunk of a sequence that has more than one token to feed, within the budget."""
        count = min(sequence.num_uncomputed, step.budget, self._config.max_chunk)
        if count < sequence.num_uncomputed:
            count = self._cache.next_boundary(sequence.planned, sequence.planned + count) - sequence.planned
        if count < 1 or sequence.status is not Status.RUNNING:
            return
        step.num_prefill_tokens += self._feed(sequence, count, step)

    def _feed(self, sequence: Sequence, want: int, step: Step) -> int:
        """Add a row of `want` tokens, or of as many as there are pages for. Returns how many."""
        if sequence.planned + want > sequence.table.num_positions:
            want = self._find_pages(sequence, want)
            if not want:
                return 0
        if sequence.copies is not None and sequence.copies.pages:
            self._fenced[step.step_id].append([source for source, _ in sequence.copies.pages])
        step.add(sequence, want)
        if sequence.prompt_step < 0 and sequence.planned >= sequence.live.num_prompt - 1:
            sequence.prompt_step = step.step_id
            if sequence.live.unforked:
                self._fork_siblings(sequence, step)
        return want

    def _find_pages(self, sequence: Sequence, want: int) -> int:
        """Give a sequence pages for `want` more tokens, or for fewer but one. 0 when there are none yet.

        On a miss the sequence that is last in order is preempted, unless pages are due anyway from an earlier one. The
        last itself just keeps what it holds: whoever is before it may take that, and nobody else needs it.
        """
        while (count := min(want, self._cache.room(sequence.table) - sequence.planned)) < 1:
            if self._pages_due or self._running.last is sequence:
                return 0
            self._preempt(self._running.last)
        self._cache.grow(sequence.table, sequence.planned + count)
        return count

    def _preempt(self, sequence: Sequence) -> None:
        self._num_preemptions += 1
        self._preempted.append(sequence.live.request_id)
        self._running.remove(sequence)
        sequence.move(Status.PREEMPTED)
        self._release_behind_fence(sequence, sequence)

    def _admit_waiting(self, step: Step) -> None:
        while len(self._waiting) and step.budget > 0 and self._may_start(step):
            sequence = self._waiting.first
            if not self._admit(sequence, step):
                break
            self._waiting.remove(sequence)
            self._running.add(sequence)
            self._prefill(sequence, step)

    def _may_start(self, step: Step) -> bool:
        has_place = len(self._running) + len(step.forked) < self._config.max_running
        return has_place and bool(self._free_slots)

    def _admit(self, sequence: Sequence, step: Step) -> bool:
        """Start a waiting sequence: from the pages of a running sibling, or from what the cache holds of it."""
        self._admission.refresh(self._running, step.step_id)
        if sequence.refused is not None:
            version, earlier = sequence.refused
            if version == self._admission.version and not self._cache.may_find_more(
                sequence.table, sequence.token_ids, earlier
            ):
                return False
        siblings = (s for s in sequence.live.sequences if s.status is Status.RUNNING)
        source = next((s for s in siblings if 0 <= s.prompt_step < step.step_id), None)
        if source is not None and not sequence.num_output and self._fork(sequence, source, step):
            return True
        hit = Hit() if sequence.computes_all else self._cache.find(sequence.table, sequence.token_ids)
        if not self._admission.admits(sequence, hit.num_held, self._running, step.step_id):
            sequence.refused = self._admission.version, hit
            return False
        self._cache.take(sequence.table, hit)
        if not sequence.started:
            sequence.num_cached = hit.num_tokens
            if not sequence.computes_all:
                self._cache.count_query(len(sequence.token_ids), hit.num_tokens)
        sequence.start(self._free_slots.pop(), hit.num_tokens)
        return True

    def _fork_siblings(self, leader: Sequence, step: Step) -> None:
        """The rows planned so far compute the whole prompt: let the others share it, from the next step on."""
        siblings, leader.live.unforked = leader.live.unforked, []
        for sequence in siblings:
            overtakes = len(self._waiting) and self._waiting.first.order < sequence.order
            if not overtakes and self._may_start(step) and self._fork(sequence, leader, step):
                step.forked.append(sequence)
            else:
                self._waiting.add(sequence)

    def _fork(self, sequence: Sequence, source: Sequence, step: Step) -> bool:
        """Start a sequence from all of a sibling's prompt but the last token, which gives it its first sample."""
        cache, num_tokens = self._cache, sequence.live.num_prompt - 1
        if not cache.can_fork(source.table, num_tokens) or cache.fork_pages(num_tokens) > cache.num_available:
            return False
        num_shared = num_tokens // cache.page_size * len(cache.groups)
        if not self._admission.admits(sequence, num_shared, self._running, step.step_id):
            return False
        sequence.table, sequence.copies = cache.fork(source.table, num_tokens)
        sequence.num_cached = source.num_cached
        sequence.start(self._free_slots.pop(), num_tokens)
        return True

    def _advance(self, sequence: Sequence, max_tokens: int, row: ResultRow) -> SequenceUpdate | None:
        """What a result row means for a sequence that is alive; one that was preempted has computed rightly, too."""
        start = sequence.num_computed
        new_token_ids, finish = sequence.advance(row, max_tokens)
        table = sequence.table
        if sequence.num_computed >= (table.num_full + 1) * self._cache.page_size:
            num_known = min(sequence.num_computed, len(sequence.token_ids))
            if dead := self._cache.commit(table, sequence.token_ids, num_known):
                self._release_behind_fence(sequence, dead)
        scores = sequence.new_scores(row.prompt_logprobs, start) if row.prompt_logprobs else None
        if row.pooled:
            finish = Finish("stop")
        elif not new_token_ids and not scores:
            return None
        update = sequence.update(new_token_ids, finish)
        if scores:
            update.prompt_logprobs = scores
        if row.logprobs:
            update.logprobs = row.logprobs[: len(new_token_ids)]
        update.pooled = row.pooled
        if finish is not None:
            self._finish(sequence, cut=finish.reason == "length")
        return update

    def _finish(self, sequence: Sequence, cut: bool) -> None:
        live, status = sequence.live, sequence.status
        sequence.move(Status.FINISHED)
        self._num_alive -= 1
        if status is Status.RUNNING:
            self._running.remove(sequence)
            self._release_behind_fence(sequence, sequence)
        elif sequence in live.unforked:
            live.unforked.remove(sequence)
        elif status is Status.WAITING:
            self._waiting.remove(sequence)
        self._admission.ended(sequence.num_output, cut)
        if not live.alive:
            del self._requests[live.request_id]
            live.sequences.clear()  # each refers to `live`: without this cycle they are freed at once
        elif live.unforked and len(live.unforked) == len(live.alive):
            self._waiting.add(live.unforked.pop(0))

    def _release_behind_fence(self, sequence: Sequence, item: Sequence | list[int]) -> None:
        """Give back a whole sequence, or some of its pages, once no step in flight names the sequence."""
        if sequence.last_step <= self._retired:
            self._release(item)
            return
        self._fenced[sequence.last_step].append(item)
        self._pages_due += _num_pages([item])

    def _retire(self, step_id: int) -> None:
        self._retired = step_id
        items = self._fenced.pop(step_id, ())
        for item in items:
            self._release(item)
        self._pages_due = _num_pages(item for fenced in self._fenced.values() for item in fenced)

    def _release(self, item: Sequence | list[int]) -> None:
        if isinstance(item, list):
            self._cache.release(item)
            return
        self._admission.changed()
        if item.copies is not None:
            self._cache.release([source for source, _ in item.copies.pages])
            item.copies = None
        self._cache.free(item.table, item.token_ids)
        self._free_slots.append(item.slot)
        if item.entered:
            self._freed_slots.append(item.slot)
        if item.status is Status.PREEMPTED:
            item.restart()
            self._waiting.add(item)


def _num_pages(items: Iterable[Sequence | list[int]]) -> int:
    return sum(len(item) if isinstance(item, list) else item.table.num_held for item in items)
