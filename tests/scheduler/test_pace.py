from __future__ import annotations

import random

import pytest

from tests.seeds import SEED
from tokenspeed.bench.simulate import simulate_interference
from tokenspeed.scheduler.pace import FIRST_TOKENS, REACH, StepPace


def seconds(num_tokens: int) -> float:
    return 0.004 + 0.00002 * num_tokens


def test_it_is_careful_before_two_sizes_were_seen():
    pace = StepPace(0.020)
    assert pace.max_tokens() == FIRST_TOKENS
    for _ in range(5):
        pace.observe(32, seconds(32))
        assert seconds(pace.max_tokens()) < 0.020
        assert pace.max_tokens() <= REACH * 32
    pace.observe(64, seconds(64))
    assert pace.max_tokens() == REACH * 64


@pytest.mark.parametrize("seed", [SEED, SEED + 1])
def test_the_fit_finds_the_model_and_forgets_an_old_one(seed):
    rng, pace = random.Random(seed), StepPace(0.020)
    for per_token in (1e-5, 4e-5):
        for _ in range(400):
            num_tokens = rng.randint(20, 900)
            pace.observe(num_tokens, 0.004 + per_token * num_tokens)
        assert pace.model() == pytest.approx((0.004, per_token), rel=0.05)
    assert pace.max_tokens() == pytest.approx(400, rel=0.05)


def test_a_target_that_no_step_meets_allows_none():
    pace = StepPace(0.020)
    for num_tokens in (32, 64):
        pace.observe(num_tokens, 0.030 + 1e-5 * num_tokens)
    assert pace.max_tokens() == 0


def test_noise_never_makes_the_model_absurd():
    rng, pace = random.Random(SEED), StepPace(0.020)
    for _ in range(500):
        pace.observe(rng.choice([32, 33]), rng.uniform(0.001, 0.030))
        fixed, per_token = pace.model()
        assert fixed >= 0
        assert per_token > 0
        assert 0 <= pace.max_tokens() <= REACH * 33


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_a_long_prompt_beside_decoding_keeps_the_pace(depth):
    found = simulate_interference(depth=depth)
    assert found.slowest_ms <= 20
    assert found.prefill_share >= 0.8


def test_without_a_target_it_would_not():
    assert simulate_interference(target_ms=1000).slowest_ms > 100
