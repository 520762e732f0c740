from __future__ import annotations

import math
import random

import numpy as np
import pytest

from tests.seeds import SEED
from tokenspeed.bench.simulate import Workload, simulate_admission
from tokenspeed.cache.keys import root_key
from tokenspeed.cache.manager import CacheManager
from tokenspeed.contracts.request import Request
from tokenspeed.contracts.sampling import SamplingParams
from tokenspeed.scheduler.admission import ForecastAdmission
from tokenspeed.scheduler.lengths import PRIOR_SCALE, OutputLengths
from tokenspeed.scheduler.queue import order_of
from tokenspeed.scheduler.sequence import LiveRequest, Sequence


def survival(lengths: OutputLengths, length: float, more: float) -> float:
    return float(lengths.survival(np.array([length]), np.array([more]))[0, 0])


def test_the_prior_is_scale_free():
    lengths = OutputLengths()
    assert survival(lengths, 0, PRIOR_SCALE) == pytest.approx(0.5, abs=0.06)
    assert survival(lengths, 50_000, 51_000) == pytest.approx(0.5, abs=0.06)
    assert survival(lengths, 7, 0) == 1


@pytest.mark.parametrize("seed", [SEED, SEED + 1])
def test_outputs_that_were_cut_do_not_bias_the_distribution(seed):
    """Exponential lengths of mean 300, each watched for a random time: survival is exp(-t / 300), at bucket borders."""
    rng, lengths = random.Random(seed), OutputLengths()
    for _ in range(3000):
        length, watched = math.ceil(rng.expovariate(1 / 300)), rng.randint(1, 600)
        lengths.add(min(length, watched), cut=watched < length)
    lengths.fit(np.zeros(0))
    for begin, more in ((0, 128), (0, 256), (128, 128)):
        assert survival(lengths, begin, more) == pytest.approx(math.exp(-more / 300), abs=0.1)


def test_long_runs_are_learned_before_any_ends():
    lengths = OutputLengths()
    before = survival(lengths, 0, 500)
    lengths.fit(np.full(64, 500.0))
    assert survival(lengths, 0, 500) > 0.9 > before
    assert survival(lengths, 500, 700) < 0.85


def test_a_workload_of_one_length_is_learned():
    lengths = OutputLengths()
    for _ in range(100):
        lengths.add(128, cut=False)
    lengths.fit(np.zeros(0))
    assert survival(lengths, 0, 100) > 0.9
    assert survival(lengths, 0, 160) < 0.1


def test_a_change_of_workload_is_followed():
    lengths = OutputLengths()
    for length in (50, 400):
        for _ in range(3000):
            lengths.add(length, cut=False)
        lengths.fit(np.zeros(0))
    assert survival(lengths, 0, 300) > 0.85


def make(cache: CacheManager, prompt: int, max_tokens: int, output: int = 0) -> Sequence:
    request = Request(
        request_id="r", prompt_token_ids=[0] * prompt, params=SamplingParams(max_tokens=max_tokens), seed=0
    )
    live = LiveRequest(request, prompt + max_tokens)
    sequence = Sequence(live, 0, order_of(0, 0, 0, 0), [0] * (prompt + output), cache.open())
    live.sequences.append(sequence)
    return sequence


def test_a_limit_close_ahead_is_certain():
    """Sequences that are known to grow by 16 tokens at most fit side by side; unbounded ones do not."""
    for max_tokens, fits in ((16, True), (32_000, False)):
        cache = CacheManager(100, 16, root_key("", "", 16))
        running = [make(cache, 160, max_tokens) for _ in range(8)]
        for sequence in running:
            cache.grow(sequence.table, 160)
        policy = ForecastAdmission(cache, 0.0)
        assert policy.admits(make(cache, 160, max_tokens), 0, running, 0) is fits


def test_an_empty_engine_takes_anyone_and_a_full_one_nobody():
    cache = CacheManager(10, 16, root_key("", "", 16))
    policy = ForecastAdmission(cache)
    large = make(cache, 150, 10_000)
    assert policy.admits(large, 0, [], 0)
    cache.grow(large.table, 160)
    assert not policy.admits(make(cache, 1, 1), 0, [large], 1)
    # What others hold already costs nothing.
    assert cache.num_available == 0


def test_shared_pages_cost_nothing():
    cache = CacheManager(24, 16, root_key("", "", 16))
    holder = make(cache, 160, 16)
    cache.grow(holder.table, 160)
    for num_shared, fits in ((0, False), (10, True)):
        policy = ForecastAdmission(cache)
        assert policy.admits(make(cache, 240, 16), num_shared, [holder], 0) is fits


@pytest.mark.parametrize("seed", [SEED % 1000, SEED % 1000 + 1])
def test_a_small_pool_is_filled_without_knowing_the_lengths(seed):
    """A reduced `tokenspeed.bench.simulate`: a quarter of the pool, 200 requests, cold start included."""
    workload = Workload(num_requests=200, concurrency=64, pool_requests=16, output_mean=250, output_p99=1000)
    oracle = simulate_admission(workload, seed, None)
    found = simulate_admission(workload, seed)
    assert oracle.preemptions == 0
    assert found.mean_running >= 0.85 * oracle.mean_running
    assert found.preemptions <= 0.02
