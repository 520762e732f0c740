"""Random traffic against an asynchronous executor that checks the step contract and what the pages hold."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.fakes import VOCAB_SIZE, FakeExecutor, FakeHandle, expected_completion
from tests.seeds import SEED
from tokenspeed.cache.groups import FULL_ONLY, GroupSpec
from tokenspeed.cache.keys import root_key
from tokenspeed.cache.manager import CacheManager
from tokenspeed.contracts.errors import MemoryLimitError, PromptError
from tokenspeed.contracts.request import Request, SequenceUpdate
from tokenspeed.contracts.sampling import SamplingParams
from tokenspeed.contracts.step import Pooling, StepPlan
from tokenspeed.scheduler.config import SchedulerConfig
from tokenspeed.scheduler.scheduler import Scheduler

MAX_MODEL_LEN = 48
GROUPS = [
    FULL_ONLY,
    FULL_ONLY,
    (GroupSpec(), GroupSpec(7)),
    (GroupSpec(12),),
    (GroupSpec(5), GroupSpec(), GroupSpec(17)),
]


@dataclass
class Tracked:
    """One sequence that is alive, and what was said of it."""

    request: Request
    index: int
    output: list[int] = field(default_factory=list)
    prompt_logprobs: list[int] = field(default_factory=list)


class Engine:
    """A scheduler, an executor with steps in flight, and a check of every update against a run alone."""

    def __init__(self, rng: random.Random, groups: tuple[GroupSpec, ...], caching: bool, slack: float = 1.0):
        self.random = rng
        page_size = rng.choice([1, 4, 16])
        budget = rng.choice([1, 2, 3, 7, 16, 64])
        self.config = SchedulerConfig(
            max_num_seqs=rng.choice([1, 2, 3, 6]),
            max_num_batched_tokens=budget,
            max_model_len=MAX_MODEL_LEN,
            long_prefill_token_threshold=rng.choice([0, 0, 1, 5]),
            max_draft_tokens=rng.choice([0, 0, 1, 3]),
            target_itl_ms=rng.choice([None, 10.0]),
        )
        least = sum(group.most_pages(MAX_MODEL_LEN * 3 // 4, page_size) for group in groups)
        num_pages = least + rng.randint(0, int(2 * least * slack))
        root = root_key("model", "f32", page_size)
        self.cache = CacheManager(num_pages, page_size, root, groups, enable_prefix_caching=caching)
        self.scheduler = Scheduler(self.config, self.cache)
        self.executor = FakeExecutor(
            num_pages,
            page_size,
            self.config.max_num_seqs,
            budget,
            groups=groups,
            seed=rng.randrange(2**32),
            max_delay=rng.choice([0, 3]),
        )
        self.depth = rng.choice([1, 2, 2, 4])
        self.handles: deque[FakeHandle] = deque()
        self.alive: dict[tuple[str, int], Tracked] = {}
        self.stems = [self.random_tokens(40) for _ in range(2)]
        self.count = 0

    def random_tokens(self, count: int) -> list[int]:
        return [self.random.randrange(VOCAB_SIZE) for _ in range(count)]

    def random_request(self) -> Request:
        """A prompt that shares some of its beginning with others, even most of another's."""
        chance, rng = self.random.random, self.random
        max_tokens = rng.randint(1, 20)
        params = SamplingParams(
            n=rng.choice([1, 1, 1, 2, 5]),
            max_tokens=max_tokens,
            min_tokens=rng.randint(0, max_tokens) if chance() < 0.2 else 0,
            ignore_eos=chance() < 0.3,
            stop_token_ids=self.random_tokens(rng.randrange(2)),
            prompt_logprobs=0 if chance() < 0.2 else None,
            logprobs=0 if chance() < 0.2 else None,
        )
        pooling = Pooling(rng.choice(["embedding", "score"]), mean=chance() < 0.5) if chance() < 0.2 else None
        if pooling is not None:
            params = SamplingParams()
        self.count += 1
        return Request(
            request_id=str(self.count),
            prompt_token_ids=rng.choice(self.stems)[: rng.randint(1, 36)] + self.random_tokens(rng.randrange(4)),
            params=params,
            seed=self.count,
            eos_token_ids=self.random_tokens(rng.randrange(3)),
            cache_salt=rng.choice(["", "", "salt"]),
            priority=rng.choice([0, 0, 0, -1, 1]),
            pooling=pooling,
        )

    def add(self, request: Request) -> None:
        num_prompt, max_tokens = len(request.prompt_token_ids), request.params.max_tokens
        longest = MAX_MODEL_LEN if max_tokens is None else min(MAX_MODEL_LEN, num_prompt + max_tokens)
        longest = longest if request.pooling is None else num_prompt + 1
        if not 0 < num_prompt < MAX_MODEL_LEN + (request.pooling is not None):
            with pytest.raises(PromptError):
                self.scheduler.add(request)
        elif self.cache.most_pages(longest - 1) > self.cache.num_pages:
            with pytest.raises(MemoryLimitError):
                self.scheduler.add(request)
        else:
            self.scheduler.add(request)
            for index in range(request.params.n):
                self.alive[request.request_id, index] = Tracked(request, index)

    def abort(self, request_id: str, index: int | None) -> None:
        updates = self.scheduler.abort(request_id, index)
        expected = [key for key in self.alive if key[0] == request_id and index in (None, key[1])]
        assert [(update.request_id, update.index) for update in updates] == expected
        for update in updates:
            assert (update.finish_reason, update.new_token_ids) == ("abort", [])
            tracked = self.alive.pop((update.request_id, update.index))
            solo, _, _ = expected_completion(tracked.request, MAX_MODEL_LEN, tracked.index)
            assert tracked.output == solo[: len(tracked.output)]
            assert len(tracked.output) < len(solo) or tracked.request.pooling is not None

    def launch(self) -> bool:
        """Plan and launch a step if the depth allows and there is something to run."""
        if len(self.handles) == self.depth or (plan := self.plan()) is None:
            return False
        self.handles.append(self.executor.launch(plan))
        return True

    def plan(self) -> StepPlan | None:
        running = set(self.scheduler._running)
        plan = self.scheduler.schedule()
        if plan is None:
            assert self.handles or not self.alive, "nothing planned, nothing in flight, and requests alive"
            return None
        # Whoever starts comes before all that wait.
        started = [sequence.order for sequence in self.scheduler._running if sequence not in running]
        waiting = [sequence.order for sequence in self.scheduler._waiting]
        if started and waiting and not self.scheduler.record.preempted:
            assert max(started) < waiting[0]
        return plan

    def collect(self) -> None:
        result = self.handles.popleft().result()
        tokens = sum(row.max_tokens for row in self.scheduler._in_flight[0].rows)
        self.take(self.scheduler.update(result))
        self.scheduler.observe(tokens, 0.004 + 0.0005 * tokens)

    def take(self, updates: list[SequenceUpdate]) -> None:
        assert len({(update.request_id, update.index) for update in updates}) == len(updates)
        for update in updates:
            tracked = self.alive[update.request_id, update.index]
            assert update.new_token_ids or update.prompt_logprobs or update.pooled
            tracked.output += update.new_token_ids
            tracked.prompt_logprobs += [item.token_id for item in update.prompt_logprobs]
            wants = tracked.request.params.logprobs is not None
            assert [item.token_id for item in update.logprobs] == (update.new_token_ids if wants else [])
            if update.finish_reason is not None:
                self.check_finished(tracked, update)
                del self.alive[update.request_id, update.index]

    def check_finished(self, tracked: Tracked, update: SequenceUpdate) -> None:
        request = tracked.request
        if request.pooling is not None:
            prompt = bytes(request.prompt_token_ids)
            assert update.pooled == (prompt if request.pooling.mean else prompt[-1:])
        solo = expected_completion(request, MAX_MODEL_LEN, tracked.index)
        assert (tracked.output, update.finish_reason, update.stop_reason) == solo
        wants = request.params.prompt_logprobs is not None and tracked.index == 0
        assert tracked.prompt_logprobs == (request.prompt_token_ids[1:] if wants else [])

    def check(self) -> None:
        stats = self.scheduler.stats()
        assert stats.num_running + stats.num_waiting == len(self.alive)
        assert stats.num_running <= self.config.max_running
        assert stats.num_steps_in_flight == len(self.handles)
        assert stats.pages_held + stats.pages_available == stats.pages_total
        assert stats.budget_used <= 1
        assert self.scheduler.has_work == bool(self.alive)

    def drain(self) -> None:
        """Every step brings the first in order a token at least, so they all end within a bound."""
        for _ in range((len(self.alive) + 1) * MAX_MODEL_LEN * 2):
            self.launch()
            if self.handles and (len(self.handles) == self.depth or self.handles[0].poll()):
                self.collect()
            if not self.alive:
                break
        assert not self.alive, "a request starves"
        while self.handles:
            self.collect()
        assert not self.scheduler.has_work
        assert self.scheduler.schedule() is None
        self.cache.check_idle()
        self.cache.reset()
        assert self.cache.num_available == self.cache.num_pages
        assert self.cache.num_cached_pages == 0


class Traffic(RuleBasedStateMachine):
    @initialize(
        groups=st.sampled_from(GROUPS), caching=st.sampled_from([True, True, False]), seed=st.integers(0, 2**32 - 1)
    )
    def start(self, groups, caching, seed):
        self.engine = Engine(random.Random(seed), groups, caching)

    @rule(count=st.integers(1, 4))
    def arrive(self, count):
        for _ in range(count):
            self.engine.add(self.engine.random_request())

    @rule(
        length=st.integers(0, MAX_MODEL_LEN + 1),
        max_tokens=st.one_of(st.none(), st.integers(1, MAX_MODEL_LEN)),
    )
    def arrive_at_a_limit(self, length, max_tokens):
        request = self.engine.random_request()
        request.prompt_token_ids = self.engine.random_tokens(length)
        request.params.max_tokens = max_tokens
        request.params.min_tokens = 0
        self.engine.add(request)

    @precondition(lambda self: self.engine.alive)
    @rule(data=st.data(), one=st.booleans())
    def abort(self, data, one):
        request_id, index = data.draw(st.sampled_from(sorted(self.engine.alive)))
        self.engine.abort(request_id, index if one else None)

    @rule()
    def reset_prefix_cache(self):
        self.engine.cache.reset()

    @rule(most=st.sampled_from([1, 4, 16]))
    def step(self, most):
        for _ in range(most):
            self.engine.launch()
            if self.engine.handles and self.engine.handles[0].poll():
                self.engine.collect()

    @rule()
    def wait_for_the_oldest_step(self):
        if self.engine.handles:
            self.engine.collect()

    @invariant()
    def counts_agree(self):
        if hasattr(self, "engine"):
            self.engine.check()

    def teardown(self):
        if hasattr(self, "engine"):
            self.engine.drain()


Traffic.TestCase.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
TestTraffic = Traffic.TestCase


@pytest.mark.parametrize("seed", [SEED + i for i in range(6)])
def test_thousands_of_requests(seed):
    """Long traffic in small pools: many preemptions, every request ends as it would alone."""
    rng = random.Random(seed)
    engines = preemptions = 0
    while engines < 8 or (not preemptions and engines < 80):
        engines += 1
        engine = Engine(rng, rng.choice(GROUPS), caching=rng.random() < 0.7, slack=0.3)
        while engine.count < 40:
            if rng.random() < 0.3:
                engine.add(engine.random_request())
            if engine.alive and rng.random() < 0.02:
                request_id, index = rng.choice(sorted(engine.alive))
                engine.abort(request_id, rng.choice([None, index]))
            engine.launch()
            if engine.handles and engine.handles[0].poll():
                engine.collect()
            engine.check()
        engine.drain()
        preemptions += engine.scheduler.stats().num_preemptions
    assert preemptions > 0
