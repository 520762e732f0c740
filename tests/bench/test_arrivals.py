"""When requests are due, and what a bound on those under way does."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import accumulate, pairwise
from statistics import fmean, pvariance
from typing import Any

import pytest

from tests.bench.stub_server import Stub, done, running
from tests.seeds import SEED
from tokenspeed.bench.arrivals import Load
from tokenspeed.bench.serve_figures import arrivals
from tokenspeed.bench.single_turn import SingleTurn
from tokenspeed.bench.workload import Lengths, Workload
from tokenspeed.contracts.errors import ConfigError

WORK = Workload("completions", "plain", Lengths(3, 3), Lengths(2, 2))


def gaps(load: Load, count: int, seed: int) -> list[float]:
    return [later - earlier for earlier, later in pairwise([0.0, *load.due(count, random.Random(seed))])]


@pytest.mark.parametrize("seed", [SEED])
def test_one_is_poisson(seed: int) -> None:
    generator = random.Random(seed)
    expected = list(accumulate(generator.expovariate(7.0) for _ in range(50)))
    assert list(Load(rate=7.0).due(50, random.Random(seed))) == pytest.approx(expected)


# Fixed seeds: a sample of any seed may be a rare one.
@pytest.mark.parametrize("burstiness, seed", [(0.3, 1), (1.0, 2), (4.0, 3)])
def test_burstiness_is_the_shape_of_a_gamma_distribution(burstiness: float, seed: int) -> None:
    found = gaps(Load(rate=20.0, burstiness=burstiness), 40_000, seed)
    assert fmean(found) == pytest.approx(1 / 20, rel=0.05)
    assert pvariance(found) == pytest.approx(1 / (burstiness * 20**2), rel=0.1)
    assert min(found) >= 0


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"concurrency": 3}, "3 at once"),
        ({"rate": 2.5}, "2.5 req/s, Poisson"),
        ({"rate": 2.0, "burstiness": 0.5}, "2 req/s, gamma with burstiness 0.5"),
        ({"rate": 2.0, "max_concurrency": 4}, "2 req/s, Poisson, at most 4 under way"),
        ({"times": (0.0, 1.0)}, "at given times"),
    ],
)
def test_loads_in_words(settings: dict[str, Any], words: str) -> None:
    assert str(Load(**settings)) == words


@pytest.mark.parametrize(
    "settings, complaint",
    [
        ({"concurrency": 1, "times": (0.0,)}, "one of --concurrency and --rate"),
        ({"rate": 1.0, "times": (0.0,)}, "one of --concurrency and --rate"),
        ({"concurrency": 1, "max_concurrency": 1}, "--max-concurrency bounds --rate and --trace"),
        ({"concurrency": 1, "burstiness": 2.0}, "--burstiness needs --rate"),
        ({"rate": 1.0, "burstiness": 0.0}, "--burstiness must be above 0, got 0.0"),
        ({"rate": float("nan")}, "--rate must be above 0, got nan"),
        ({"rate": 1.0, "max_concurrency": 0}, "--max-concurrency must be at least 1, got 0"),
    ],
)
def test_loads_that_contradict_themselves(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        Load(**settings)


class Full(Stub):
    """Answers nobody before `places` are asking at once."""

    def __init__(self, places: int) -> None:
        super().__init__(0.05, 0.0)
        self.places = places

    async def _read(self, body: Any) -> None:
        while self.most_running < self.places:
            await super()._read(body)
        await super()._read(body)


def test_what_is_due_waits_for_a_place() -> None:
    stub = Full(3)
    with running(stub) as url:
        run = done(SingleTurn(WORK, 20, Load(times=(0.0,) * 20, max_concurrency=3)), url)
    assert [request.error for request in run.requests] == [None] * 20
    assert stub.most_running == 3
    sent = [request.sent for request in run.requests]
    assert sent == sorted(sent), "in the order in which they were due"
    assert any(request.waited for request in run.requests)
    assert all(0 <= request.waited <= request.late for request in run.requests)
    found = arrivals(run.requests)
    assert found is not None
    assert found.waited == sum(request.waited > 0 for request in run.requests)
    assert found.wait_ms is not None
    assert found.wait_ms.max == pytest.approx(1e3 * max(request.waited for request in run.requests))


def test_without_a_bound_all_may_be_under_way() -> None:
    stub = Full(20)
    with running(stub) as url:
        run = done(SingleTurn(replace(WORK, seed=1), 20, Load(rate=400.0, burstiness=0.4)), url)
    assert stub.most_running == 20
    assert not any(request.waited for request in run.requests)
    found = arrivals(run.requests)
    assert found is not None
    assert (found.waited, found.wait_ms) == (0, None)
    assert (found.under_way_at_last, found.most_under_way) == (20, 20)
