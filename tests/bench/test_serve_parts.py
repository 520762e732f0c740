"""Parts of a load, arrivals that were not kept up with, and what the report warns of."""

from __future__ import annotations

import random

import pytest

from tests.seeds import SEED
from tokenspeed.bench.measured import Measured
from tokenspeed.bench.record import surroundings
from tokenspeed.bench.serve import Part, Run
from tokenspeed.bench.serve_figures import arrivals, part_figures
from tokenspeed.bench.serve_report import records, report, text


def request(due: float | None, late: float, took: float, *, waited: float = 0.0, cached: int | None = None) -> Measured:
    """Its first token comes after half of what it took, its second and last at the end."""
    sent = (due or 0.0) + late
    first = sent + took / 2
    return Measured(
        sent=sent,
        due=due,
        waited=waited,
        first=first,
        last=sent + took,
        ended=sent + took,
        gaps=[took / 2],
        prompt_tokens=10,
        cached_tokens=cached or 0,
        tells_cached=cached is not None,
        output_tokens=2,
    )


def failed(due: float | None) -> Measured:
    found = request(due, 0.0, 50.0, cached=9)
    found.error = "it broke"
    return found


def test_figures_of_a_part() -> None:
    good = [request(None, 0, 0.2, cached=0), request(None, 0, 0.4, cached=6)]
    found = part_figures(Part.of("turn2", [*good, failed(None)]))
    assert (found.name, found.requests, found.input_tokens, found.cached_share) == ("turn2", 3, 10, 0.3)
    assert found.ttft_ms is not None
    assert found.itl_ms is not None
    assert (found.ttft_ms.p50, found.ttft_ms.max) == pytest.approx((150, 200))
    assert (found.itl_ms.p50, found.itl_ms.max) == pytest.approx((150, 200))


def test_a_part_may_hold_gaps_alone() -> None:
    found = part_figures(Part("during", [], [0.25]))
    assert (found.requests, found.input_tokens, found.cached_share, found.ttft_ms) == (0, None, None, None)
    assert found.itl_ms is not None
    assert found.itl_ms.p99 == 250
    assert part_figures(Part("after", [], [])).itl_ms is None


def test_cached_tokens_that_nobody_told_of() -> None:
    told, untold = request(None, 0, 1, cached=0), request(None, 0, 1)
    assert part_figures(Part.of("a", [untold])).cached_share is None
    assert part_figures(Part.of("a", [told])).cached_share == 0.0


@pytest.mark.parametrize("seed", [SEED, SEED + 1])
def test_arrivals_as_by_hand(seed: int) -> None:
    generator = random.Random(seed)
    requests = [
        request(generator.uniform(0, 10), generator.uniform(0, 1), generator.uniform(0, 4))
        for _ in range(generator.randint(2, 60))
    ]
    found = arrivals([*requests, request(None, 0, 5)])
    assert found is not None
    due = sorted(each.due or 0.0 for each in requests)
    under_way = [sum((each.due or 0.0) <= at < each.ended for each in requests) for at in due]
    assert found.under_way_at_last == under_way[-1]
    assert found.under_way_at_half == under_way[(len(requests) - 1) // 2]
    assert found.most_under_way == max(under_way)
    assert found.due_per_s == pytest.approx((len(due) - 1) / (due[-1] - due[0]))


def test_a_closed_loop_has_no_arrivals() -> None:
    assert arrivals([request(None, 0, 1)]) is None
    one = arrivals([request(1.0, 0, 1)])
    assert one is not None
    assert (one.due_per_s, one.under_way_at_last) == (None, 1)


def shown(requests: list[Measured], cpu_s: float = 0.1) -> str:
    return text(report(Run("so many", requests, 10.0, cpu_s)))


def test_requests_that_pile_up_are_warned_of() -> None:
    backlog = shown([request(0.1 * number, 0, 100) for number in range(60)])
    assert "10.00 req/s due; under way 30 when half were due, 60 at the last, 60 at most" in backlog
    assert "warning: requests piled up" in backlog
    assert "warning" not in shown([request(0.1 * number, 0, 0.5) for number in range(60)])


def test_waiting_is_not_lateness_of_the_generator() -> None:
    held = shown([request(0.1 * number, 2.0, 0.2, waited=2.0) for number in range(9)])
    assert "waiting: 9 were held back by --max-concurrency, p50 2000.0, p99 2000.0 ms" in held
    assert "0.0 ms late" in held
    assert "sent requests late" not in held
    late = shown([request(0.1 * number, 2.0, 0.2) for number in range(9)])
    assert "waiting" not in late
    assert "2000.0 ms late" in late
    assert "warning: the generator sent requests late" in late
    assert "sent requests late" not in shown([request(0.1 * number, 0.009, 0.2) for number in range(9)])
    assert "sent requests late" in shown([request(0.1 * number, 0.011, 0.2) for number in range(9)])


def test_a_busy_generator_is_warned_of_with_every_workload() -> None:
    run = Run("so many", [request(None, 0, 1)], 10.0, 7.5, [Part("during", [], [1.0])], mixed=True)
    shown = text(report(run))
    assert "75% of a core" in shown
    assert "warning: the generator was busy" in shown


def test_records_of_parts() -> None:
    good = [request(0.0, 0.1, 0.2, waited=0.1, cached=5), request(1.0, 0, 0.4, cached=0)]
    run = Run("x", good, 10.0, 0.1, [Part.of("turn1", good), Part("during", [], [0.5, 0.1])])
    made = {each.id: each for each in records(report(run), run, "serve.tiny", surroundings("make x"))}
    assert (made["serve.tiny.turn1.cached"].value, made["serve.tiny.turn1.cached"].unit) == (25.0, "%")
    assert made["serve.tiny.turn1.ttft.p50"].value == pytest.approx(150)
    assert made["serve.tiny.during.itl.max"].value == pytest.approx(500)
    assert made["serve.tiny.wait.p99"].value == pytest.approx(99)
    assert "serve.tiny.during.ttft.p50" not in made
    assert "serve.tiny.during.cached" not in made
    mixed = Run("x", good, 10.0, 0.1, run.parts, mixed=True)
    left = {each.id for each in records(report(mixed), mixed, "serve.tiny", surroundings("make x"))}
    assert set(made) - left == {
        f"serve.tiny.{name}.{at}" for name in ("ttft", "tpot", "itl", "e2e") for at in ("p50", "p99")
    }
