"""What long prompts do to steady streams, told from gaps, and against a server that stalls while it reads one."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from tests.bench.stub_server import Stalling, done, running
from tests.seeds import SEED
from tokenspeed.bench.arrivals import Load
from tokenspeed.bench.interference import Interference, phases
from tokenspeed.bench.measured import Measured
from tokenspeed.bench.serve_report import report, text
from tokenspeed.bench.workload import Lengths, Workload
from tokenspeed.contracts.errors import ConfigError

LONG = 100


def stream(*arrivals: float) -> Measured:
    gaps = [later - earlier for earlier, later in pairwise(arrivals)]
    return Measured(sent=arrivals[0], first=arrivals[0], last=arrivals[-1], gaps=gaps)


def prompt(sent: float, first: float) -> Measured:
    return Measured(sent=sent, first=first, last=first)


def test_gaps_by_what_they_overlap() -> None:
    steady = [stream(0, 1, 3, 6, 10, 15, 21, 28, 36)]
    injected = [prompt(11, 12), prompt(4, 5.5), prompt(22, 27), prompt(26, 30)]
    found = phases(steady, injected, (1, 36))
    assert found == {"before": [2], "during": [3, 5, 7, 8], "between": [4, 6], "after": []}
    assert phases(steady, injected[:2], (0, 30))["after"] == [6, 7]
    assert phases(steady, [], (0, 40)) == {"before": [1, 2, 3, 4, 5, 6, 7, 8], "during": [], "between": [], "after": []}


def test_edges() -> None:
    """A gap that ends as a prompt is sent was before; one that begins with its first token is after."""
    assert phases([stream(0, 2, 4, 5)], [prompt(2, 4)], (0, 9)) == {
        "before": [2],
        "during": [2],
        "between": [],
        "after": [1],
    }


def test_streams_and_prompts_that_failed_do_not_count() -> None:
    broken = stream(0, 1, 2)
    broken.error = "cut"
    assert not any(phases([broken], [Measured(sent=0.5)], (0, 9)).values())
    assert phases([stream(0, 1)], [Measured(sent=0.5)], (0, 9))["before"] == [1]


@pytest.mark.parametrize("seed", [SEED, SEED + 1])
def test_phases_as_by_hand(seed: int) -> None:
    generator = random.Random(seed)
    steady = [stream(*sorted(generator.sample(range(1000), 40))) for _ in range(5)]
    injected = [prompt(start, start + generator.randint(1, 60)) for start in generator.choices(range(300, 700), k=7)]
    spans = [(each.sent, each.first or 0.0) for each in injected]
    expected: dict[str, list[float]] = {"before": [], "during": [], "between": [], "after": []}
    for each in steady:
        for begin, end in pairwise(each.arrivals()):
            if any(begin < b and end > a for a, b in spans):
                name = "during"
            elif all(end <= a for a, _ in spans):
                name = "before"
            else:
                name = "after" if all(begin >= b for _, b in spans) else "between"
            expected[name].append(end - begin)
    assert phases(steady, injected, (0, 1000)) == expected


def job(model: str = "plain", *, streams: int = 3, settle_s: float = 0.1) -> Interference:
    work = Workload("completions", model, Lengths(5, 9), Lengths(80, 80), SEED)
    return Interference(work, streams, Load(rate=40.0), 4, Lengths(LONG, LONG + 20), Lengths(1, 1), settle_s)


def test_a_server_that_stalls_while_it_reads() -> None:
    stub = Stalling(LONG, read_s=0.04, gap_s=0.002, slow=3)
    with running(stub) as url:
        run = done(job(), url)
    parts = {part.name: part for part in run.parts}
    assert list(parts) == ["steady", "before", "during", "between", "after", "injected"]
    steady, injected = parts["steady"].requests, parts["injected"].requests
    assert {request.error for request in run.requests} == {None}
    assert len(run.requests) == len(steady) + len(injected) == len(stub.bodies)
    lengths = [len(body["prompt"]) for body in stub.bodies]
    assert sum(length >= LONG for length in lengths) == len(injected) == len(stub.readings) == 4
    assert all(5 <= length <= 9 for length in lengths if length < LONG)
    # Nothing long comes before every stream has decoded.
    begun = max(request.first or 0.0 for request in steady[:3])
    assert min(request.sent for request in injected) >= begun + 0.09
    assert lengths.index(max(lengths)) >= 3
    for begin, end in stub.readings:
        assert any(each.sent <= begin and end <= (each.first or 0.0) for each in injected)
    assert parts["during"].gaps
    counted = sum(len(parts[name].gaps) for name in ("before", "during", "between", "after"))
    assert 0 < counted <= len(parts["steady"].gaps) == sum(len(each.gaps) for each in steady)


def test_the_report_has_no_latency_of_both_kinds() -> None:
    with running(Stalling(LONG, read_s=0.04, gap_s=0.002)) as url:
        found = report(done(job(streams=2), url))
    assert (found.ttft_ms, found.tpot_ms, found.itl_ms, found.e2e_ms) == (None, None, None, None)
    assert found.arrivals is not None
    by_name = {part.name: part for part in found.parts}
    assert by_name["injected"].ttft_ms is not None
    assert by_name["during"].itl_ms is not None
    assert by_name["during"].ttft_ms is None
    assert by_name["injected"].requests == 4
    shown = text(found)
    for name in ("before", "during", "after", "injected", "2 streams and 4 long prompts, 40 req/s, Poisson"):
        assert name in shown
    assert "TPOT" not in shown


@pytest.mark.parametrize("model", ["http-500", "cut"])
def test_a_stream_that_fails_ends_it(model: str) -> None:
    stub = Stalling(LONG, read_s=0.01, gap_s=0.002)
    with running(stub) as url:
        run = done(job(model, streams=2, settle_s=60.0), url)
    assert len(stub.bodies) == 2
    assert report(run).completed == 0


@pytest.mark.parametrize("streams, settle_s, complaint", [(0, 1.0, "--concurrency"), (1, 0.0, "--settle")])
def test_interference_that_is_none(streams: int, settle_s: float, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        job(streams=streams, settle_s=settle_s)
