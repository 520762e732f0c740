"""Groups of requests that begin alike."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise

import pytest

from tests.bench.stub_server import Remembering, done, flat, running
from tests.seeds import SEED
from tokenspeed.bench.arrivals import Load
from tokenspeed.bench.measured import Measured
from tokenspeed.bench.serve_report import report
from tokenspeed.bench.shared_prefix import SharedPrefix
from tokenspeed.bench.workload import ApiName, Lengths, Workload

GROUPS, SIZE, PREFIX, SUFFIX = 3, 5, 41, 7


def shared(api: ApiName, load: Load, seed: int) -> SharedPrefix:
    work = Workload(api, "m", Lengths(1, 1), Lengths(2, 2), seed)
    return SharedPrefix(work, load, GROUPS, SIZE, Lengths(PREFIX, PREFIX), Lengths(SUFFIX, SUFFIX))


@pytest.mark.parametrize("seed", [SEED])
@pytest.mark.parametrize("api", ["completions", "chat"])
def test_groups_take_turns_and_share_their_beginning_alone(api: ApiName, seed: int) -> None:
    bodies = [json.loads(body) for body in shared(api, Load(concurrency=1), seed).bodies()]
    heads = 1 if api == "chat" else 0
    prompts = [flat(body)[heads:] for body in bodies]
    assert {len(prompt) for prompt in prompts} == {PREFIX + SUFFIX}
    prefixes = [tuple(prompt[:PREFIX]) for prompt in prompts]
    assert set(Counter(prefixes).values()) == {SIZE}
    assert len(set(map(tuple, prompts))) == GROUPS * SIZE
    assert all(earlier != later for earlier, later in pairwise(prefixes))


@pytest.mark.parametrize("seed", [SEED])
@pytest.mark.parametrize("api", ["completions", "chat"])
def test_the_rest_of_a_group_finds_its_prefix(api: ApiName, seed: int) -> None:
    stub = Remembering()
    with running(stub) as url:
        run = done(shared(api, Load(concurrency=1), seed), url)
    counted = [stub.counted[id(body)] for body in stub.bodies]
    first, rest = report(run).parts
    assert [(first.name, first.requests), (rest.name, rest.requests)] == [("first", 3), ("rest", 12)]
    for figures, found in ((first, counted[:3]), (rest, counted[3:])):
        assert figures.cached_share == pytest.approx(sum(c for _, c in found) / sum(p for p, _ in found))
    assert all(cached >= PREFIX for _, cached in counted[3:])
    assert all(cached < PREFIX for _, cached in counted[:3])


def test_no_request_is_lost_at_any_load() -> None:
    stub = Remembering()
    with running(stub) as url:
        run = done(shared("completions", Load(rate=500.0), SEED), url)
    assert {request.error for request in run.requests} == {None}
    assert sum(len(part.requests) for part in run.parts) == GROUPS * SIZE == len(stub.bodies)


def test_those_that_came_too_early_are_told_apart() -> None:
    """Two groups: in one, the second to be sent comes before the first has its token; in the other it comes after."""
    times = [(0.0, 5.0), (1.0, 2.0), (4.0, 6.0), (3.0, 9.0), (7.0, 8.0), (0.5, 8.0)]
    requests = [Measured(sent=sent, first=first, last=first) for sent, first in times]
    load = Load(concurrency=1)
    job = SharedPrefix(Workload("chat", "m", Lengths(1, 1), Lengths(1, 1)), load, 2, 3, Lengths(1, 1), Lengths(1, 1))
    found = {part.name: [requests.index(request) for request in part.requests] for part in job.parts(requests)}
    assert found == {"first": [0, 5], "early": [2, 1, 3], "rest": [4]}
