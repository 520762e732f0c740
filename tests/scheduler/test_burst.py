"""Steps of several decode passes: how many, and when none."""

from __future__ import annotations

import pytest

from tests.scheduler.test_scheduler import Engine, tokens_of
from tokenspeed.contracts.step import PlanRow, ResultRow
from tokenspeed.scheduler.burst import LONGEST_S, Burst


def test_passes_fill_the_time_and_no_more() -> None:
    burst = Burst(8)
    assert burst.num_passes() == 1, "nothing is known yet"
    for seconds, expected in ((LONGEST_S / 3.5, 3), (LONGEST_S / 1.5, 1), (LONGEST_S / 100, 8), (0.0, 8)):
        for passes in (1, 2, 3, 4, 1, 2, 3, 4):
            burst.observe(passes, passes * seconds)
        assert burst.num_passes() == expected


def test_a_wanted_pace_bounds_the_time() -> None:
    engine = Engine(max_passes=8, target_itl_ms=10.0)
    for _ in range(20):
        engine.scheduler.observe_decode(1, 1, 0.0045)
    engine.add("a", 4, max_tokens=30)
    engine.plan([ResultRow(0, 4, [5])])
    assert engine.plan().rows == [PlanRow(0, 2, 6)]


def quick(engine: Engine) -> Engine:
    for _ in range(20):
        engine.scheduler.observe_decode(1, 1, LONGEST_S / 100)
    return engine


def test_decoding_rows_get_several_passes_up_to_their_length() -> None:
    engine = quick(Engine(max_passes=4))
    engine.add("a", 4, max_tokens=7)
    engine.plan([ResultRow(0, 4, [5])])
    assert engine.plan([ResultRow(0, 8, [6, 7, 8, 9])]).rows == [PlanRow(0, 4, 8)]
    assert engine.plan([ResultRow(0, 10, [10, 11])]).rows == [PlanRow(0, 2, 10)]
    engine.cache.check_idle()


@pytest.mark.parametrize("given", [1, 2, 4])
def test_fewer_tokens_than_planned_are_taken(given: int) -> None:
    engine = quick(Engine(max_passes=4))
    engine.add("a", 4, max_tokens=30)
    engine.plan([ResultRow(0, 4, [5])])
    engine.plan([ResultRow(0, 4 + given, list(range(6, 6 + given)))])
    assert engine.plan().rows == [PlanRow(0, 4, 8 + given)]


def test_prompts_and_those_that_wait_are_not_held_up() -> None:
    engine = quick(Engine(max_passes=4, budget=8, seqs=2))
    engine.add("a", 4, max_tokens=30)
    engine.plan([ResultRow(0, 4, [5])])
    engine.add("b", list(range(50, 62)), max_tokens=2)
    assert engine.plan([ResultRow(0, 5, [6]), ResultRow(1, 7, [])]).rows == [PlanRow(0, 1, 5), PlanRow(1, 7, 7)]
    assert engine.plan([ResultRow(0, 6, [7]), ResultRow(1, 12, [8])]).rows == [PlanRow(0, 1, 6), PlanRow(1, 5, 12)]
    engine.add("c", [70, 71, 72], max_tokens=2)
    assert engine.plan([ResultRow(0, 7, [8]), ResultRow(1, 13, [9])]).rows == [PlanRow(0, 1, 7), PlanRow(1, 1, 13)]


def test_tokens_are_those_of_single_passes() -> None:
    engines = [quick(Engine(max_passes=passes)) for passes in (1, 5)]
    found = []
    for engine in engines:
        engine.add("a", 9, max_tokens=17)
        engine.add("b", 5, max_tokens=9, stop_token_ids=[1010])
        updates = engine.drain()
        found.append([tokens_of(updates, name) for name in "ab"])
    assert found[0] == found[1]
