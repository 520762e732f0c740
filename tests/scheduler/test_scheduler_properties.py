"""Random traffic against a fake executor that checks the step contract and what the pages hold."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.fakes import VOCAB_SIZE, FakeExecutor, expected_completion
from tokenspeed.cache.keys import root_key
from tokenspeed.cache.manager import CacheManager
from tokenspeed.contracts.errors import MemoryLimitError, PromptError
from tokenspeed.contracts.request import Request, SequenceUpdate
from tokenspeed.contracts.sampling import SamplingParams
from tokenspeed.contracts.step import StepPlan
from tokenspeed.scheduler.config import SchedulerConfig
from tokenspeed.scheduler.scheduler import Scheduler

MAX_MODEL_LEN = 48


@dataclass
class Tracked:
    request: Request
    output: list[int] = field(default_factory=list)
    prompt_logprobs: list[int] = field(default_factory=list)
    cached: int = 0


class Traffic(RuleBasedStateMachine):
    @initialize(
        page_size=st.sampled_from([1, 4, 16]),
        max_num_seqs=st.sampled_from([1, 2, 3, 6]),
        budget=st.sampled_from([1, 2, 3, 7, 16, 64]),
        threshold=st.sampled_from([0, 0, 1, 5]),
        caching=st.sampled_from([True, True, True, False]),
        seed=st.integers(0, 2**32 - 1),
    )
    def start(self, page_size, max_num_seqs, budget, threshold, caching, seed):
        self.random = random.Random(seed)
        num_pages = self.random.randint(MAX_MODEL_LEN * 3 // 4, MAX_MODEL_LEN * 3) // page_size
        self.config = SchedulerConfig(max_num_seqs, budget, MAX_MODEL_LEN, threshold)
        self.cache = CacheManager(num_pages, page_size, root_key("model", "f32", page_size), caching)
        self.scheduler = Scheduler(self.config, self.cache)
        self.executor = FakeExecutor(num_pages, page_size, max_num_seqs, budget)
        self.stems = [self.random_tokens(40) for _ in range(2)]
        self.alive: dict[str, Tracked] = {}
        self.queue: deque[str] = deque()
        self.count = 0
        self.parents: dict[bytes, bytes] = {}

    def random_tokens(self, count: int) -> list[int]:
        return [self.random.randrange(VOCAB_SIZE) for _ in range(count)]

    @rule(count=st.integers(1, 4))
    def arrive(self, count):
        for _ in range(count):
            self.add(self.random_request())

    @rule(
        length=st.integers(0, MAX_MODEL_LEN + 1),
        max_tokens=st.one_of(st.none(), st.integers(1, MAX_MODEL_LEN)),
    )
    def arrive_at_a_limit(self, length, max_tokens):
        request = self.random_request()
        request.prompt_token_ids = self.random_tokens(length)
        request.params.max_tokens = max_tokens
        self.add(request)

    def random_request(self) -> Request:
        """A prompt that shares some of its beginning with others, even most of another's; its seed is its number."""
        chance = self.random.random
        stem = self.random.choice(self.stems)
        params = SamplingParams(
            max_tokens=self.random.randint(1, 20),
            ignore_eos=chance() < 0.3,
            stop_token_ids=self.random_tokens(self.random.randrange(2)),
            prompt_logprobs=0 if chance() < 0.2 else None,
        )
        self.count += 1
        return Request(
            request_id=str(self.count),
            prompt_token_ids=stem[: self.random.randint(1, 36)] + self.random_tokens(self.random.randrange(4)),
            params=params,
            seed=self.count,
            eos_token_ids=self.random_tokens(self.random.randrange(3)),
        )

    def add(self, request: Request) -> None:
        num_prompt, max_tokens = len(request.prompt_token_ids), request.params.max_tokens
        longest = MAX_MODEL_LEN if max_tokens is None else min(MAX_MODEL_LEN, num_prompt + max_tokens)
        if not 0 < num_prompt < MAX_MODEL_LEN:
            with pytest.raises(PromptError):
                self.scheduler.add(request)
        elif longest - 1 > self.cache.num_pages * self.cache.page_size:
            with pytest.raises(MemoryLimitError):
                self.scheduler.add(request)
        else:
            self.scheduler.add(request)
            self.alive[request.request_id] = Tracked(request)
            self.queue.append(request.request_id)

    @precondition(lambda self: self.alive)
    @rule(data=st.data(), while_in_flight=st.booleans())
    def abort(self, data, while_in_flight):
        request_id = data.draw(st.sampled_from(sorted(self.alive)))
        plan = self.plan() if while_in_flight else None
        update = self.scheduler.abort(request_id)
        assert update is not None
        assert update.finish_reason == "abort"
        tracked = self.alive.pop(request_id)
        assert self.is_prefix_of_solo_run(tracked)
        if request_id in self.queue:
            self.queue.remove(request_id)
        if plan is not None:
            self.take(self.scheduler.update(self.executor.launch(plan).result()))

    @rule()
    def reset_prefix_cache(self):
        self.cache.reset_prefix_cache()

    @rule(most=st.sampled_from([1, 4, 16]))
    def step(self, most):
        for _ in range(most):
            plan = self.plan()
            if plan is not None:
                self.take(self.scheduler.update(self.executor.launch(plan).result()))

    def plan(self) -> StepPlan | None:
        """Schedule, checking that requests are admitted in order of arrival (a request's seed is its number)."""
        plan = self.scheduler.schedule()
        assert (plan is not None) == bool(self.alive)
        assert plan is None or len(plan.rows) == self.scheduler.num_running
        self.note_chains()
        for new in plan.delta.new if plan else ():
            assert new.sampling.seed == int(self.queue.popleft())
            tracked = self.alive[str(new.sampling.seed)]
            assert new.token_ids == tracked.request.prompt_token_ids
            tracked.cached = new.num_computed
            if tracked.request.params.prompt_logprobs is not None:
                assert new.num_computed == 0
        return plan

    def take(self, updates: list[SequenceUpdate]) -> None:
        assert len({update.request_id for update in updates}) == len(updates)
        for update in updates:
            tracked = self.alive[update.request_id]
            tracked.output += update.new_token_ids
            tracked.prompt_logprobs += [item.token_id for item in update.prompt_logprobs]
            assert update.num_cached_tokens == tracked.cached
            if update.finish_reason is not None:
                self.check_finished(tracked, update)
                del self.alive[update.request_id]
        self.idle_chains_are_whole_and_end_first()

    def check_finished(self, tracked: Tracked, update: SequenceUpdate) -> None:
        solo = expected_completion(tracked.request, MAX_MODEL_LEN)
        assert (tracked.output, update.finish_reason, update.stop_reason) == solo
        wants = tracked.request.params.prompt_logprobs is not None
        assert tracked.prompt_logprobs == (tracked.request.prompt_token_ids[1:] if wants else [])

    def is_prefix_of_solo_run(self, tracked: Tracked) -> bool:
        solo, _, _ = expected_completion(tracked.request, MAX_MODEL_LEN)
        return tracked.output == solo[: len(tracked.output)] and len(tracked.output) < len(solo)

    @invariant()
    def counts_agree(self):
        if not hasattr(self, "scheduler"):
            return
        assert self.scheduler.num_running + self.scheduler.num_waiting == len(self.alive)
        assert self.scheduler.num_waiting == len(self.queue)
        assert self.scheduler.num_running <= min(self.config.max_num_seqs, self.config.max_num_batched_tokens)
        assert self.scheduler.has_work == bool(self.alive)
        assert self.cache.num_available >= 0

    @invariant()
    def idle_chains_are_whole_and_end_first(self):
        """The parent of an idle page is cached, and goes later than it or is held."""
        if not hasattr(self, "cache"):
            return
        pool, prefix = self.cache._pool, self.cache._prefix
        order = {page: index for index, page in enumerate(pool.idle_pages())}
        for key, parent in self.parents.items():
            page, parent_page = prefix._pages.get(key), prefix._pages.get(parent)
            if page in order:
                assert parent_page is not None
                assert order.get(parent_page, len(order)) > order[page]

    def note_chains(self) -> None:
        for sequence in [*self.scheduler._running.values(), *self.scheduler._waiting.values()]:
            if sequence.table.hasher is not None:
                keys = sequence.table.hasher.keys
                self.parents.update(zip(keys[1:], keys, strict=False))

    def teardown(self):
        if not hasattr(self, "scheduler"):
            return
        # Each step feeds at least one token of some sequence, and a sequence has fewer than MAX_MODEL_LEN.
        for _ in range(len(self.alive) * MAX_MODEL_LEN):
            if (plan := self.plan()) is None:
                break
            self.take(self.scheduler.update(self.executor.launch(plan).result()))
        assert not self.alive
        assert not self.scheduler.has_work
        self.cache.check_idle()
        self.cache.reset_prefix_cache()
        assert self.cache.num_available == self.cache.num_pages
        assert self.cache.num_cached_pages == 0


Traffic.TestCase.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
TestTraffic = Traffic.TestCase
