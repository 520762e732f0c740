"""Several steps in flight: upper bounds, fences, preemption, forks."""

from __future__ import annotations

from collections import deque

import pytest

from tests.fakes import FakeExecutor, FakeHandle
from tokenspeed.cache.groups import FULL_ONLY, GroupSpec
from tokenspeed.cache.keys import root_key
from tokenspeed.cache.manager import CacheManager
from tokenspeed.contracts.request import Request, SequenceUpdate
from tokenspeed.contracts.sampling import SamplingParams
from tokenspeed.contracts.step import StepPlan, StepResult
from tokenspeed.scheduler.admission import ForecastAdmission
from tokenspeed.scheduler.config import SchedulerConfig
from tokenspeed.scheduler.scheduler import Scheduler


def counting(tokens: list[int], sample_index: int) -> int:
    return 1000 * (1 + sample_index) + len(tokens)


class Engine:
    """Steps are launched and collected by hand; page size 4. `risk` far below 0 admits whatever fits now."""

    def __init__(self, num_pages=64, seqs=8, budget=64, drafts=0, groups=FULL_ONLY, caching=True, risk=-1e9):
        root = root_key("model", "f32", 4)
        self.cache = CacheManager(num_pages, 4, root, groups, enable_prefix_caching=caching)
        config = SchedulerConfig(seqs, budget, 128, max_draft_tokens=drafts)
        self.scheduler = Scheduler(config, self.cache, ForecastAdmission(self.cache, risk))
        self.executor = FakeExecutor(num_pages, 4, seqs, budget, counting, groups, seed=drafts)
        self.handles: deque[FakeHandle] = deque()
        self.plans: list[StepPlan] = []
        self.outputs: dict[tuple[str, int], list[int]] = {}
        self.ends: dict[tuple[str, int], str | None] = {}

    def add(self, request_id: str, prompt: int, first: int = 0, eos=(), **params) -> None:
        tokens = [first, *range(1, prompt)]
        sampling = SamplingParams(**params)
        self.scheduler.add(
            Request(request_id=request_id, prompt_token_ids=tokens, params=sampling, seed=0, eos_token_ids=list(eos))
        )

    def launch(self) -> StepPlan | None:
        plan = self.scheduler.schedule()
        if plan is not None:
            self.plans.append(plan)
            self.handles.append(self.executor.launch(plan))
        return plan

    def collect(self) -> list[SequenceUpdate]:
        updates = self.scheduler.update(self.handles.popleft().result())
        for update in updates:
            key = update.request_id, update.index
            self.outputs.setdefault(key, []).extend(update.new_token_ids)
            self.ends[key] = update.finish_reason
        return updates

    def drain(self, depth: int = 2) -> None:
        while self.scheduler.has_work or self.handles:
            while len(self.handles) < depth and self.launch():
                pass
            self.collect()
        self.cache.check_idle()

    @property
    def preemptions(self) -> int:
        return self.scheduler.stats().num_preemptions


def rows(plan: StepPlan | None) -> list[tuple[int, int, int]]:
    assert plan is not None
    return [(row.slot, row.max_tokens, row.num_reserved) for row in plan.rows]


def test_steps_are_planned_ahead_of_their_results():
    engine = Engine(budget=6)
    engine.add("a", 10, max_tokens=3)
    assert [rows(engine.launch()) for _ in range(4)] == [[(0, 6, 6)], [(0, 4, 10)], [(0, 1, 11)], [(0, 1, 12)]]
    # The third token ends it, whatever it is: no row after the one that samples it.
    assert engine.launch() is None
    assert engine.scheduler.num_in_flight == 4
    assert [len(engine.collect()) for _ in range(4)] == [0, 1, 1, 1]
    assert engine.outputs == {("a", 0): [1010, 1011, 1012]}
    engine.cache.check_idle()


def test_drafts_are_planned_from_upper_bounds_that_results_lower():
    engine = Engine(drafts=3)
    engine.add("a", 4, max_tokens=20)
    assert [rows(engine.launch()) for _ in range(3)] == [[(0, 4, 4)], [(0, 4, 8)], [(0, 4, 12)]]
    engine.collect()
    accepted = len(engine.collect()[0].new_token_ids)
    assert rows(engine.launch()) == [(0, 4, 4 + accepted + 4 + 4)]
    engine.drain()
    assert engine.outputs["a", 0] == list(range(1004, 1024))


def test_a_row_never_reserves_beyond_the_longest_run():
    engine = Engine(drafts=3)
    engine.add("a", 4, max_tokens=8)
    assert [rows(engine.launch()) for _ in range(3)] == [[(0, 4, 4)], [(0, 4, 8)], [(0, 3, 11)]]
    assert engine.launch() is None
    engine.drain()
    assert engine.outputs["a", 0] == list(range(1004, 1012))


def test_what_was_computed_beyond_a_stop_is_dropped():
    engine = Engine()
    engine.add("a", 4, eos=[1005], max_tokens=20)
    for _ in range(5):
        engine.launch()
    engine.drain()
    assert (engine.outputs["a", 0], engine.ends["a", 0]) == ([1004, 1005], "stop")
    assert engine.cache.num_cached_pages == 1


def test_pages_and_slot_come_back_behind_the_fence():
    engine = Engine(seqs=1)
    engine.add("a", 4, max_tokens=20)
    engine.add("b", 4, first=9, max_tokens=1)
    for _ in range(3):
        engine.launch()
    held = engine.cache.num_held
    (update,) = engine.scheduler.abort("a")
    assert update.finish_reason == "abort"
    assert engine.scheduler.num_running == 0
    for _ in range(3):
        assert engine.launch() is None
        assert engine.cache.num_held == held
        assert engine.collect() == []
    assert engine.cache.num_held == 0
    plan = engine.launch()
    assert plan is not None
    assert (plan.delta.freed, [new.slot for new in plan.delta.new]) == ([0], [0])
    engine.drain()


def test_window_pages_come_back_behind_the_fence():
    engine = Engine(groups=(GroupSpec(), GroupSpec(4)), caching=False)
    engine.add("a", 9, max_tokens=20)
    for _ in range(3):
        engine.launch()
    assert engine.cache.num_held == 6
    engine.collect()  # computed 9: positions 0 to 5 are out of the window, but steps in flight name the sequence
    assert engine.cache.num_held == 6
    engine.collect()
    assert engine.cache.num_held == 6
    engine.collect()
    assert engine.cache.num_held == 5
    engine.drain()


def test_the_last_in_order_is_preempted_and_goes_on_with_its_tokens():
    engine = Engine(num_pages=6, caching=False)
    engine.add("a", 8, max_tokens=12)
    engine.add("b", 7, first=9, max_tokens=12)
    engine.drain()
    assert engine.preemptions == 1
    assert engine.outputs["a", 0] == list(range(1008, 1020))
    assert engine.outputs["b", 0] == list(range(1007, 1019))
    again = [new for plan in engine.plans for new in plan.delta.new if new.token_ids[0] == 9][1]
    assert again.num_prompt == 7
    assert again.token_ids[7:] == engine.outputs["b", 0][: len(again.token_ids) - 7]
    assert len(again.token_ids) > 7


def test_a_preempted_sequence_keeps_what_its_steps_in_flight_bring():
    engine = Engine(num_pages=5, caching=False)
    engine.add("a", 8, max_tokens=12)
    engine.add("b", 7, first=9, max_tokens=12)
    while not engine.preemptions:  # "b" waits for a page until "a" needs one, too
        plan = engine.launch()
    assert plan is None
    known = len(engine.outputs.get(("b", 0), []))
    while engine.handles:
        engine.collect()
    assert len(engine.outputs["b", 0]) > known
    engine.drain()
    assert engine.outputs["b", 0] == list(range(1007, 1019))


def test_priority_decides_who_is_preempted():
    engine = Engine(num_pages=6, caching=False)
    engine.scheduler.add(
        Request(request_id="low", prompt_token_ids=[9] * 8, params=SamplingParams(max_tokens=12), seed=0, priority=1)
    )
    engine.add("a", 7, max_tokens=12)
    engine.drain()
    names = {new.token_ids[0] for plan in engine.plans[1:] for new in plan.delta.new}
    assert (engine.preemptions, names) == (1, {9})


def test_a_preempted_prompt_is_scored_once():
    engine = Engine(num_pages=6, budget=4)
    engine.add("a", 4, max_tokens=16)
    engine.add("b", 12, first=9, max_tokens=8, prompt_logprobs=0)
    scores: list[int] = []
    while engine.scheduler.has_work:
        engine.launch()
        scores += [item.token_id for update in engine.collect() for item in update.prompt_logprobs]
    assert engine.preemptions > 0
    assert scores == list(range(1, 12))
    engine.cache.check_idle()


@pytest.mark.parametrize("prompt", [1, 4, 9, 10])
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("caching", [True, False])
def test_n_samples_compute_the_prompt_once(prompt, depth, caching):
    engine = Engine(caching=caching, budget=7)
    engine.add("a", prompt, max_tokens=3, n=3)
    engine.drain(depth)
    assert engine.outputs == {("a", index): [1000 * (1 + index) + prompt + i for i in range(3)] for index in range(3)}
    # The prompt, its last token for each sibling, and two samples fed for each of the three.
    assert engine.executor.num_fed_total == prompt + 2 + 6
    indices = [new.sampling.sample_index for plan in engine.plans for new in plan.delta.new]
    assert indices == [0, 1, 2]


def test_samples_enter_from_a_running_sibling_when_slots_come_free():
    engine = Engine(caching=False, seqs=2)
    engine.add("a", 10, max_tokens=3, n=4)
    engine.drain()
    assert engine.executor.num_fed_total < 2 * (10 + 2) + 3 * 4
    assert [len(engine.outputs["a", index]) for index in range(4)] == [3] * 4


def test_forked_samples_survive_the_first_one():
    engine = Engine(caching=False)
    engine.add("a", 10, max_tokens=4, n=3)
    engine.launch()
    engine.scheduler.abort("a", 0)
    engine.drain()
    assert sorted(engine.outputs) == [("a", 1), ("a", 2)]


def test_another_sample_takes_over_when_the_first_ends_before_its_prompt():
    engine = Engine(caching=False, budget=4)
    engine.add("a", 10, max_tokens=4, n=3)
    engine.launch()
    assert [update.index for update in engine.scheduler.abort("a", 0)] == [0]
    assert [update.index for update in engine.scheduler.abort("a", 2)] == [2]
    engine.drain()
    assert engine.outputs == {("a", 1): [2010, 2011, 2012, 2013]}


def test_abort_ends_all_samples():
    engine = Engine(budget=4)
    engine.add("a", 10, n=3)
    engine.launch()
    assert [(update.index, update.finish_reason) for update in engine.scheduler.abort("a")] == [
        (0, "abort"),
        (1, "abort"),
        (2, "abort"),
    ]
    assert engine.scheduler.abort("a") == []
    engine.drain()
    assert engine.launch() is None


def test_waiting_makes_up_for_priority():
    engine = Engine(seqs=1)
    engine.add("busy", 1, max_tokens=None)
    engine.scheduler.add(
        Request(request_id="old", prompt_token_ids=[1], params=SamplingParams(max_tokens=1), seed=0, priority=1)
    )
    order = []
    for number in range(1700):
        if number % 100 == 0:
            engine.add(f"new{number}", 1, max_tokens=100)
        engine.launch()
        order += [update.request_id for update in engine.collect() if update.finish_reason]
    assert "old" in order
    assert 5 < order.index("old") < len(order) - 1


def test_step_records():
    engine = Engine(num_pages=6, caching=False)
    engine.add("a", 8, max_tokens=12)
    engine.add("b", 7, first=9, max_tokens=12)
    records = []
    while engine.scheduler.has_work:
        engine.launch()
        records.append(engine.scheduler.record)
        engine.collect()
    assert (records[0].request_ids, records[0].num_tokens, records[0].num_prefill_tokens) == (["a", "b"], 15, 15)
    assert records[1].num_prefill_tokens == 0
    assert [name for record in records for name in record.preempted] == ["b"]
    assert [record.step_id for record in records] == list(range(len(records)))


def test_results_are_taken_in_order():
    engine = Engine()
    engine.add("a", 4, max_tokens=20)
    engine.launch()
    engine.launch()
    with pytest.raises(RuntimeError, match="result of step 1, in flight: 0"):
        engine.scheduler.update(StepResult(1, []))


def test_pages_that_are_due_spare_the_next_victim():
    """Two sequences miss a page in one step while the victim's pages are behind their fence: one victim is enough."""
    engine = Engine(num_pages=8, caching=False)
    for first, prompt in enumerate((7, 7, 14)):
        engine.add("abc"[first], prompt, first=first, max_tokens=6)
    plans = [engine.launch() for _ in range(3)]
    assert [len(rows(plan)) for plan in plans[:2]] == [3, 3]
    assert engine.preemptions == 1
    assert engine.launch() is None
    assert engine.preemptions == 1
    engine.drain()
    assert engine.preemptions == 1


def test_a_victim_does_not_come_back_before_there_is_room():
    engine = Engine(num_pages=4, caching=False)
    engine.add("a", 8, max_tokens=9)
    engine.add("b", 7, first=9, max_tokens=9)
    while not engine.preemptions:
        engine.launch()
        engine.collect()
    # "b" gave up two pages and would fit into one of them again at once.
    assert (engine.scheduler.num_running, engine.scheduler.num_waiting) == (1, 1)
    engine.drain()
