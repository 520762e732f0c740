"""What the step loop notes of itself: waiting requests, step times, and the device's idle time."""

from __future__ import annotations

import time

import pytest

from tests.engine.null_core import null_core
from tokenspeed.config.engine import EngineConfig
from tokenspeed.contracts.errors import EngineBusyError
from tokenspeed.contracts.request import Request
from tokenspeed.contracts.sampling import SamplingParams

LONG_S = 30.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that `time.perf_counter` says: one more at every look."""
    now = [100.0]

    def perf_counter() -> float:
        now[0] += 1.0
        return now[0]

    monkeypatch.setattr(time, "perf_counter", perf_counter)
    return now


def request(name: str, max_tokens: int, n: int = 1) -> Request:
    return Request(
        request_id=name, prompt_token_ids=[1, 2, 3], params=SamplingParams(max_tokens=max_tokens, n=n), seed=0
    )


def test_requests_are_told_when_they_are_first_fed(clock: list[float]) -> None:
    core = null_core(EngineConfig(max_num_seqs=1))
    for name in ("a", "b", "c", "d"):
        core.add(request(name, 2))
    core.abort("b")
    core.abort("c", 0)
    told = []
    while core.has_work:
        core.step()
        told.append(core.started)
    assert [[name for name, _ in started] for started in told] == [["a"], [], ["d"], []]
    (_, first), (_, last) = told[0][0], told[2][0]
    assert 0 < first < last
    assert core._queued == {}


def test_a_request_of_several_samples_is_told_once(clock: list[float]) -> None:
    core = null_core(EngineConfig())
    core.add(request("a", 3, n=4))
    names = []
    while core.has_work:
        core.step()
        names += [name for name, _ in core.started]
    assert names == ["a"]


def test_the_device_is_idle_only_between_steps_of_work_left(clock: list[float]) -> None:
    core = null_core(EngineConfig())
    core.add(request("a", 3))
    core.step()
    assert core.idle_s == 0
    clock[0] += LONG_S
    core.step()
    assert core.idle_s is not None
    assert LONG_S < core.idle_s < LONG_S + 5
    idle_s = core.idle_s
    core.abort("a")
    while core.has_work:
        core.step()
    clock[0] += LONG_S
    core.add(request("b", 1))
    core.step()
    assert core.idle_s == idle_s, "nobody wanted anything"
    assert core.step_times.count == core.num_steps == 3


def test_where_the_host_cannot_see_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    core = null_core(EngineConfig())
    monkeypatch.setattr(core.executor, "max_in_flight", 2)
    assert core.idle_s is None


def test_prefixes_are_not_forgotten_while_they_are_used() -> None:
    core = null_core(EngineConfig())
    core.add(request("a", 3))
    with pytest.raises(EngineBusyError, match=r"1 requests are under way.*before the prefix cache is reset"):
        core.forget_prefixes()
    while core.has_work:
        core.step()
    core.forget_prefixes()
