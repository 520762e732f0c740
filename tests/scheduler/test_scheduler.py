from __future__ import annotations

import pytest

from tests.fakes import FakeExecutor, expected_completion
from tokenspeed.cache.keys import root_key
from tokenspeed.cache.manager import CacheManager
from tokenspeed.contracts.errors import ConfigError, MemoryLimitError, ParameterError, PromptError
from tokenspeed.contracts.request import Request, SequenceUpdate
from tokenspeed.contracts.sampling import SamplingParams
from tokenspeed.contracts.step import PlanRow, ResultRow, StepPlan, StepResult
from tokenspeed.scheduler.config import SchedulerConfig
from tokenspeed.scheduler.scheduler import Scheduler


def counting(tokens: list[int], sample_index: int) -> int:
    return 1000 * (1 + sample_index) + len(tokens)


class Engine:
    """A scheduler on a fake executor whose sampled tokens count up: 1000, 1001, ... by position."""

    def __init__(self, num_pages=64, page_size=4, seqs=8, budget=64, max_len=64, threshold=0, caching=True, **config):
        self.cache = CacheManager(
            num_pages, page_size, root_key("model", "f32", page_size), enable_prefix_caching=caching
        )
        self.config = SchedulerConfig(seqs, budget, max_len, threshold, **config)
        self.scheduler = Scheduler(self.config, self.cache)
        self.executor = FakeExecutor(num_pages, page_size, seqs, budget, next_token=counting)
        self.plans: list[StepPlan] = []

    def add(self, request_id: str, prompt: int | list[int], eos=(), salt="", priority=0, **params) -> Request:
        tokens = list(range(prompt)) if isinstance(prompt, int) else prompt
        request = Request(
            request_id=request_id,
            prompt_token_ids=tokens,
            params=SamplingParams(**params),
            seed=0,
            eos_token_ids=list(eos),
            cache_salt=salt,
            priority=priority,
        )
        self.scheduler.add(request)
        return request

    def plan(self, rows: list[ResultRow] | None = None) -> StepPlan:
        """Schedule; with `rows`, take them for the result at once."""
        plan = self.scheduler.schedule()
        assert plan is not None
        if rows is not None:
            self.scheduler.update(StepResult(plan.step_id, rows))
        return plan

    def step(self) -> list[SequenceUpdate]:
        plan = self.scheduler.schedule()
        assert plan is not None
        self.plans.append(plan)
        return self.scheduler.update(self.executor.launch(plan).result())

    def drain(self) -> list[SequenceUpdate]:
        updates = []
        while self.scheduler.has_work:
            updates += self.step()
        self.cache.check_idle()
        return updates

    def fed(self) -> list[list[tuple[int, int]]]:
        return [[(row.slot, row.max_tokens) for row in plan.rows] for plan in self.plans]


def tokens_of(updates: list[SequenceUpdate], request_id: str) -> list[int]:
    return [token for update in updates if update.request_id == request_id for token in update.new_token_ids]


def test_one_request_runs_to_its_length():
    engine = Engine()
    engine.add("a", 10, max_tokens=3)
    updates = engine.drain()
    assert [update.new_token_ids for update in updates] == [[1010], [1011], [1012]]
    assert [update.finish_reason for update in updates] == [None, None, "length"]
    assert engine.fed() == [[(0, 10)], [(0, 1)], [(0, 1)]]
    assert engine.scheduler.schedule() is None
    assert not engine.scheduler.has_work


def test_prompts_are_fed_in_chunks_within_the_budget_left_by_running_sequences():
    engine = Engine(budget=7)
    engine.add("a", 10, max_tokens=4)
    engine.add("b", [50, *range(9)], max_tokens=1)
    engine.drain()
    assert engine.fed() == [[(0, 7)], [(0, 3), (1, 4)], [(0, 1), (1, 6)], [(0, 1)], [(0, 1)]]


def test_a_chunk_without_a_token_brings_no_update():
    engine = Engine(budget=4)
    engine.add("a", 10, max_tokens=1)
    assert [engine.step() for _ in range(2)] == [[], []]
    assert tokens_of(engine.step(), "a") == [1010]


def test_the_threshold_bounds_one_sequence_not_the_step():
    engine = Engine(budget=64, threshold=3)
    engine.add("a", 5, max_tokens=1)
    engine.add("b", [50, 51, 52, 53], max_tokens=1)
    engine.drain()
    assert engine.fed() == [[(0, 3), (1, 3)], [(1, 1), (0, 2)]]


def test_no_more_sequences_run_than_slots_or_budget_allow():
    for seqs, budget, most in ((3, 64, 3), (8, 2, 2)):
        engine = Engine(seqs=seqs, budget=budget)
        for index in range(5):
            engine.add(str(index), [index], max_tokens=3)
        engine.step()
        engine.step()
        assert (engine.scheduler.num_running, engine.scheduler.num_waiting) == (most, 5 - most)
        engine.drain()


def test_a_slot_is_named_freed_before_it_is_reused():
    engine = Engine(seqs=1)
    engine.add("a", 3, max_tokens=1)
    engine.add("b", 3, max_tokens=1)
    engine.drain()
    deltas = [plan.delta for plan in engine.plans]
    assert [delta.freed for delta in deltas] == [[], [0]]
    assert [[new.slot for new in delta.new] for delta in deltas] == [[0], [0]]


@pytest.mark.parametrize(
    "eos, params, expected",
    [
        ([1011], {}, (2, "stop", None)),
        ([7, 1011], {}, (2, "stop", None)),
        ([1011], {"ignore_eos": True}, (4, "length", None)),
        ([], {"stop_token_ids": [1012, 1011]}, (2, "stop", 1011)),
        ([1011], {"stop_token_ids": [1011]}, (2, "stop", None)),
        ([1011], {"stop_token_ids": [1011], "ignore_eos": True}, (2, "stop", 1011)),
        ([1013], {}, (4, "stop", None)),
        ([], {"stop_token_ids": [1013]}, (4, "stop", 1013)),
        ([], {"max_tokens": 1}, (1, "length", None)),
        ([], {"max_tokens": None}, (54, "length", None)),
        ([], {"max_tokens": 1000}, (54, "length", None)),
    ],
)
def test_stops(eos, params, expected):
    engine = Engine()
    engine.add("a", 10, eos=eos, **{"max_tokens": 4, **params})
    updates = engine.drain()
    assert (len(tokens_of(updates, "a")), updates[-1].finish_reason, updates[-1].stop_reason) == expected
    assert all(update.finish_reason is None for update in updates[:-1])


def test_several_accepted_tokens_end_at_the_first_stop():
    engine = Engine(max_draft_tokens=3)
    engine.add("a", 4, eos=[8], max_tokens=9)
    engine.plan([ResultRow(0, 4, [5])])
    plan = engine.scheduler.schedule()
    assert plan is not None
    assert plan.rows == [PlanRow(0, 4, 8)]
    (update,) = engine.scheduler.update(StepResult(plan.step_id, [ResultRow(0, 7, [7, 8, 9])]))
    assert (update.new_token_ids, update.finish_reason) == ([7, 8], "stop")
    engine.cache.check_idle()


def test_a_prefix_is_reused_and_reported():
    engine = Engine()
    engine.add("a", 10, max_tokens=2)
    engine.drain()
    engine.add("b", 11, max_tokens=2)
    updates = engine.drain()
    assert [update.num_cached_tokens for update in updates] == [8, 8]
    assert engine.fed()[2] == [(0, 3)]
    assert engine.plans[2].delta.new[0].num_computed == 8
    stats = engine.scheduler.stats()
    assert (stats.prefix_queries, stats.prefix_queried_tokens, stats.prefix_hit_tokens) == (2, 21, 8)


def test_the_last_sampled_token_is_not_in_the_cache():
    """4 + 5 tokens at page size 4: the ninth was sampled, never fed, and so was the eighth of 4 + 4."""
    for max_tokens, cached in ((4, 4), (5, 8)):
        engine = Engine()
        engine.add("a", 4, max_tokens=max_tokens)
        output = tokens_of(engine.drain(), "a")
        engine.add("b", [*range(4), *output, 5, 6], max_tokens=1)
        assert engine.drain()[-1].num_cached_tokens == cached


def test_an_abort_keeps_what_was_computed_and_nothing_else():
    engine = Engine(budget=6)
    engine.add("a", 16, max_tokens=1)
    engine.step()
    assert engine.scheduler.schedule() is not None  # in flight: positions 6 to 11
    (update,) = engine.scheduler.abort("a")
    assert (update.request_id, update.finish_reason, update.new_token_ids) == ("a", "abort", [])
    assert engine.scheduler.update(StepResult(1, [ResultRow(0, 12, [])])) == []
    assert engine.scheduler.abort("a") == []
    engine.cache.check_idle()
    assert engine.cache.num_cached_pages == 1


def test_a_waiting_request_can_be_aborted_and_its_id_reused():
    engine = Engine(seqs=1)
    for request_id in "abc":
        engine.add(request_id, 4, max_tokens=2)
    engine.step()
    (update,) = engine.scheduler.abort("b")
    assert update.finish_reason == "abort"
    engine.add("b", 4, max_tokens=1)
    finished = [update.request_id for update in engine.drain() if update.finish_reason]
    assert finished == ["a", "c", "b"]


def test_prompt_logprobs_cover_the_prompt_whatever_is_cached():
    engine = Engine(budget=4)
    engine.add("a", 11, max_tokens=1)
    engine.drain()
    engine.add("b", 11, max_tokens=2, prompt_logprobs=0, logprobs=1)
    updates = engine.drain()
    assert [item.token_id for update in updates for item in update.prompt_logprobs] == list(range(1, 11))
    assert [item.token_id for update in updates for item in update.logprobs] == [1011, 1012]
    assert updates[0].num_cached_tokens == 0


def test_who_does_not_fit_holds_back_only_those_after_it():
    engine = Engine(num_pages=8, max_len=32)
    engine.add("a", 20, max_tokens=4)  # 5 pages, then 6
    engine.add("b", [2] * 14, max_tokens=4)  # 4 pages: must wait
    engine.add("c", [3], max_tokens=2)  # 1 page: would fit, but came later
    engine.add("d", [4], max_tokens=2, priority=-1)
    engine.step()
    assert (engine.scheduler.num_running, engine.scheduler.num_waiting) == (2, 2)
    finished = [update.request_id for update in engine.drain() if update.finish_reason]
    assert finished == ["d", "a", "c", "b"]


def test_requests_that_can_never_run_are_refused_and_leave_no_trace():
    engine = Engine(num_pages=4, max_len=32)
    with pytest.raises(PromptError, match="empty"):
        engine.add("a", 0)
    with pytest.raises(PromptError, match=r"the prompt has 32 tokens, max_model_len 32 allows 31"):
        engine.add("a", 32)
    with pytest.raises(MemoryLimitError, match=r"\(5 pages\).*\(4 pages\).*--kv-cache-memory-bytes.*--max-model-len"):
        engine.add("a", 10, max_tokens=8)
    with pytest.raises(MemoryLimitError):
        engine.add("a", 1, max_tokens=None)
    engine.add("a", 10, max_tokens=7)  # feeds 16 tokens: exactly the pool
    with pytest.raises(ParameterError, match="'a' is in use"):
        engine.add("a", 1)
    engine.step()
    with pytest.raises(ParameterError, match="'a' is in use"):
        engine.add("a", 1)
    assert len(tokens_of(engine.drain(), "a")) == 6
    assert not engine.scheduler.has_work


def test_a_prompt_one_short_of_the_limit_gets_one_token():
    engine = Engine(max_len=9)
    engine.add("a", 8, max_tokens=None)
    (update,) = engine.drain()
    assert (update.new_token_ids, update.finish_reason) == ([1008], "length")


@pytest.mark.parametrize(
    "rows",
    [
        [ResultRow(1, 4, [9])],
        [ResultRow(0, 5, [9])],
        [ResultRow(0, 5, [9, 9])],
        [ResultRow(0, 3, [9])],
        [ResultRow(0, 3, [])],
        [ResultRow(0, 4, [])],
        [],
    ],
    ids=["slot", "too far", "more than planned", "sampled early", "short", "no token at the end", "too few rows"],
)
def test_results_that_do_not_fit_the_plan_raise(rows):
    engine = Engine()
    engine.add("a", 4)
    plan = engine.scheduler.schedule()
    assert plan is not None
    assert plan.rows == [PlanRow(0, 4, 4)]
    with pytest.raises(RuntimeError, match="in flight: 0"):
        engine.scheduler.update(StepResult(1, [ResultRow(0, 4, [9])]))
    with pytest.raises(RuntimeError):
        engine.scheduler.update(StepResult(0, rows))


def test_a_result_without_a_step_raises():
    with pytest.raises(RuntimeError, match="in flight: none"):
        Engine().scheduler.update(StepResult(0, []))


@pytest.mark.parametrize("name", ["max_num_seqs", "max_num_batched_tokens", "max_model_len"])
def test_config_limits(name):
    values = {"max_num_seqs": 1, "max_num_batched_tokens": 1, "max_model_len": 2}
    SchedulerConfig(**values)
    with pytest.raises(ConfigError, match=name):
        SchedulerConfig(**{**values, name: values[name] - 1})


def test_equals_a_model_that_runs_alone_for_one_request():
    engine = Engine()
    request = engine.add("a", 7, eos=[1009], max_tokens=20)
    alone = expected_completion(request, engine.config.max_model_len, 0, counting)
    updates = engine.drain()
    assert (tokens_of(updates, "a"), updates[-1].finish_reason, updates[-1].stop_reason) == alone
