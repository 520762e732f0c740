"""The executors without a model, under the real scheduler."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from tokenspeed.cache.keys import root_key
from tokenspeed.cache.manager import CacheManager
from tokenspeed.contracts.executor import Executor
from tokenspeed.contracts.request import Request, SequenceUpdate
from tokenspeed.contracts.sampling import SamplingParams
from tokenspeed.runner.null import NullExecutor
from tokenspeed.runner.scripted import ScriptedExecutor
from tokenspeed.scheduler.admission import ForecastAdmission
from tokenspeed.scheduler.config import SchedulerConfig
from tokenspeed.scheduler.scheduler import Scheduler

EOS = 2


def make_scheduler(num_pages: int = 64, seqs: int = 4) -> Scheduler:
    cache = CacheManager(num_pages, 4, root_key("", "", 4), enable_prefix_caching=False)
    return Scheduler(SchedulerConfig(seqs, 16, 64), cache, ForecastAdmission(cache, -1e9))


def request(name: str, prompt: int, seed: int = 0, **params) -> Request:
    sampling = SamplingParams(**params)
    return Request(request_id=name, prompt_token_ids=[7] * prompt, params=sampling, seed=seed, eos_token_ids=[EOS])


def drain(scheduler: Scheduler, executor: Executor) -> dict[tuple[str, int], list[SequenceUpdate]]:
    found: dict[tuple[str, int], list[SequenceUpdate]] = {}
    while scheduler.has_work:
        plan = scheduler.schedule()
        assert plan is not None
        for update in scheduler.update(executor.launch(plan).result()):
            found.setdefault((update.request_id, update.index), []).append(update)
    return found


def tokens(updates: list[SequenceUpdate]) -> list[int]:
    return [token for update in updates for token in update.new_token_ids]


def test_null_samples_positions():
    scheduler = make_scheduler()
    scheduler.add(request("a", 30, max_tokens=4, ignore_eos=True))
    scheduler.add(request("b", 3, max_tokens=4, ignore_eos=True))
    found = drain(scheduler, NullExecutor(vocab_size=32))
    assert tokens(found["a", 0]) == [30, 31, 0, 1]
    assert tokens(found["b", 0]) == [3, 4, 5, 6]


def test_scripts_are_given_in_order_and_end():
    scheduler = make_scheduler()
    for name in "abc":
        scheduler.add(request(name, 5, seed=ord(name), max_tokens=10, logprobs=0, prompt_logprobs=0))
    found = drain(scheduler, ScriptedExecutor([[11, 12, 13], [21]], EOS))
    assert [tokens(found[name, 0]) for name in "abc"] == [[11, 12, 13, EOS], [21, EOS], [EOS]]
    assert [item.token_id for update in found["a", 0] for item in update.logprobs] == [11, 12, 13, EOS]
    assert [item.token_id for update in found["c", 0] for item in update.prompt_logprobs] == [7] * 4


def test_each_sample_has_a_script():
    scheduler = make_scheduler()
    scheduler.add(request("a", 5, n=2, max_tokens=10))
    found = drain(scheduler, ScriptedExecutor([[11], [21, 22]], EOS))
    assert [tokens(found["a", index]) for index in range(2)] == [[11, EOS], [21, 22, EOS]]


def test_equal_requests_have_scripts_of_their_own():
    scheduler = make_scheduler()
    for name in "ab":
        scheduler.add(request(name, 5, max_tokens=10))
    found = drain(scheduler, ScriptedExecutor([[11], [21]], EOS))
    assert [tokens(found[name, 0]) for name in "ab"] == [[11, EOS], [21, EOS]]


def test_a_preempted_sequence_goes_on_with_its_script():
    scheduler = make_scheduler(num_pages=6)
    scripts = [[100 + i for i in range(11)], [200 + i for i in range(11)]]
    for seed, name in enumerate("ab"):
        scheduler.add(request(name, 8, seed=seed, max_tokens=12))
    found = drain(scheduler, ScriptedExecutor(scripts, EOS))
    assert scheduler.stats().num_preemptions > 0
    assert [tokens(found[name, 0]) for name in "ab"] == [[*script, EOS] for script in scripts]


@pytest.mark.parametrize("in_flight", [1, 3])
def test_steps_take_their_time_one_after_the_other(in_flight):
    scheduler, executor = make_scheduler(), ScriptedExecutor([], 5, delay_s=0.02)
    scheduler.add(request("a", 3, max_tokens=10))
    start = time.monotonic()
    handles = [executor.launch(plan) for _ in range(in_flight) if (plan := scheduler.schedule()) is not None]
    assert time.monotonic() - start < 0.02
    for handle in handles:
        scheduler.update(handle.result())
    assert time.monotonic() - start >= 0.02 * in_flight


def test_both_load_without_torch():
    code = "import sys, tokenspeed.runner.null, tokenspeed.runner.scripted; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
