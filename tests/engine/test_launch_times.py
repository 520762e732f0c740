"""When a request's first step was launched: told once, with its first update."""

from __future__ import annotations

import time

import pytest

from tests.engine.null_core import NullCore
from tokenspeed.config.engine import EngineConfig
from tokenspeed.contracts.request import Request, SequenceUpdate
from tokenspeed.contracts.sampling import SamplingParams


def request(name: str, num_prompt: int, n: int = 1) -> Request:
    params = SamplingParams(n=n, max_tokens=5, temperature=1.0)
    return Request(request_id=name, prompt_token_ids=list(range(num_prompt)), params=params, seed=1)


def run(core: NullCore) -> list[tuple[SequenceUpdate, float]]:
    """Updates, and when they came."""
    found = []
    while core.has_work:
        found += [(update, time.perf_counter()) for update in core.step()]
    return found


@pytest.mark.parametrize("num_prompt", [1, 3, 70])
@pytest.mark.parametrize("n", [1, 3])
def test_a_request_that_waits_is_launched_later(num_prompt: int, n: int) -> None:
    core = NullCore(EngineConfig(max_num_seqs=1, max_num_batched_tokens=16))
    before = time.perf_counter()
    core.add(request("first", num_prompt, n))
    core.add(request("second", num_prompt))
    updates = run(core)
    told = {name: [(u.launched, at) for u, at in updates if u.request_id == name] for name in ("first", "second")}
    for found in told.values():
        assert [launched is not None for launched, _ in found] == [True] + [False] * (len(found) - 1)
    (first, _), (second, came) = told["first"][0], told["second"][0]
    assert first is not None
    assert second is not None
    assert before <= first < second <= came
    assert second >= told["first"][-2][1]  # one step is planned ahead
    assert core._queued == set()
    assert core._launched == {}


def test_nothing_is_kept_of_what_was_aborted() -> None:
    core = NullCore(EngineConfig(max_num_seqs=1, max_num_batched_tokens=16))
    core.add(request("running", 40))
    core.add(request("waiting", 4))
    core.step()
    core.abort("waiting")
    core.abort("running")
    run(core)
    assert core._queued == set()
    assert core._launched == {}
