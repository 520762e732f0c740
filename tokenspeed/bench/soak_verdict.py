"""From what the soak has seen to its verdict: figures per minute, and what they have to be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from tokenspeed.bench.record import Record, Surroundings, Target
from tokenspeed.bench.soak_clients import Outcome
from tokenspeed.bench.soak_watch import Sample
from tokenspeed.contracts.errors import ConfigError

SETTLED = 4
"""The fifth minute: by then every page of the KV cache has been touched, and every kind of request has come."""
MOST_GROWTH = 3.0
"""Per cent of the memory of the settled minute."""
MOST_CHANGE = 1.5
"""p99 of the last third over that of the first. Clients and bursts are drawn at random, and the machine is shared."""


@dataclass(frozen=True)
class Minute:
    """Figures of one interval: medians of memory, most of files and pages, percentiles in ms."""

    server_mib: float
    engine_mib: float
    files: float
    pages: float
    ttft_p50: float
    ttft_p99: float
    itl_p50: float
    itl_p99: float
    labels: dict[str, int]
    """How requests ended."""
    tokens: int
    unexpected: int


def minutes_of(samples: Sequence[Sample], outcomes: Sequence[Outcome], start: float, interval: float) -> list[Minute]:
    """Figures per interval; those without a sample, or without an answer that came in parts, are left out, and what is
    less than half of one at the end."""
    found = []
    last = max((sample.at for sample in samples), default=start)
    for number in range(round((last - start) / interval)):
        begin, end = start + number * interval, start + (number + 1) * interval
        seen = [sample for sample in samples if begin <= sample.at < end]
        ended = [outcome for outcome in outcomes if begin <= outcome.ended < end]
        ttfts = [outcome.ttft * 1e3 for outcome in ended if outcome.ttft is not None]
        gaps = [gap * 1e3 for outcome in ended for gap in outcome.gaps]
        if seen and ttfts and gaps:
            found.append(_minute(seen, ended, ttfts, gaps))
    return found


def _minute(seen: list[Sample], ended: list[Outcome], ttfts: list[float], gaps: list[float]) -> Minute:
    (ttft_p50, ttft_p99), (itl_p50, itl_p99) = (np.percentile(each, (50, 99)) for each in (ttfts, gaps))
    return Minute(
        server_mib=median(sample.server_mib for sample in seen),
        engine_mib=median(sample.engine_mib for sample in seen),
        files=max(sample.files for sample in seen),
        pages=max(sample.pages_held for sample in seen),
        ttft_p50=float(ttft_p50),
        ttft_p99=float(ttft_p99),
        itl_p50=float(itl_p50),
        itl_p99=float(itl_p99),
        labels=dict(Counter(outcome.label for outcome in ended)),
        tokens=sum(outcome.tokens for outcome in ended),
        unexpected=sum(outcome.unexpected is not None for outcome in ended),
    )


def settled(count: int) -> int:
    """Index of the interval that later ones are held against: the fifth, or a quarter in where there are fewer."""
    return min(SETTLED, (count - 1) // 4)


def growth(series: Sequence[float]) -> float:
    """Per cent by which the last one lies above the settled one."""
    before = series[settled(len(series))]
    return 100 * (series[-1] / before - 1)


def trend(series: Sequence[float]) -> float:
    """Per cent of the settled one by which a line through it and those after it rises from end to end (least
    squares)."""
    rest = series[settled(len(series)) :]
    if len(rest) < 2:
        return 0.0
    slope = float(np.polyfit(np.arange(len(rest)), rest, 1)[0])
    return 100 * slope * (len(rest) - 1) / rest[0]


def change(series: Sequence[float]) -> float:
    """Median of the last third over that of the first."""
    third = max(1, len(series) // 3)
    return median(series[-third:]) / median(series[:third])


def verdict(
    minutes: Sequence[Minute], unexpected: int, left: dict[str, float], surroundings: Surroundings
) -> list[Record]:
    """The records: each has its figure per minute as samples, and a target. Raises ConfigError for a run that is too
    short to tell.

    unexpected: requests that ended in a way that they should not. left: what was held after the end, by name.
    """
    if len(minutes) < 3:
        raise ConfigError(f"{len(minutes)} intervals with answers are too few for a verdict, 3 are needed")
    made = []
    for name in ("server", "engine"):
        series = [minute.server_mib if name == "server" else minute.engine_mib for minute in minutes]
        for id, value in ((f"server.soak.memory.{name}", growth(series)), (f"server.soak.trend.{name}", trend(series))):
            target, samples = Target(at_most=MOST_GROWTH), {f"{name}_mib": series}
            made.append(Record(id=id, value=value, unit="%", target=target, samples=samples, **surroundings))
    for name in ("ttft", "itl"):
        p50 = [minute.ttft_p50 if name == "ttft" else minute.itl_p50 for minute in minutes]
        p99 = [minute.ttft_p99 if name == "ttft" else minute.itl_p99 for minute in minutes]
        id, target = f"server.soak.{name}.p99.change", Target(at_most=MOST_CHANGE)
        samples = {"p50_ms": p50, "p99_ms": p99}
        made.append(Record(id=id, value=change(p99), unit="x", target=target, samples=samples, **surroundings))
    counts = {
        "server.soak.unexpected": (float(unexpected), {"per_minute": [float(each.unexpected) for each in minutes]}),
        "server.soak.left": (sum(left.values()), {name: [value] for name, value in left.items()}),
    }
    for id, (value, samples) in counts.items():
        target = Target(at_most=0)
        made.append(Record(id=id, value=value, unit="count", target=target, samples=samples, **surroundings))
    return [*made, _work(minutes, surroundings)]


def _work(minutes: Sequence[Minute], surroundings: Surroundings) -> Record:
    labels = sorted({label for minute in minutes for label in minute.labels})
    samples = {f"ended.{label}": [float(minute.labels.get(label, 0)) for minute in minutes] for label in labels}
    samples |= {
        "tokens": [float(minute.tokens) for minute in minutes],
        "files": [minute.files for minute in minutes],
        "pages": [minute.pages for minute in minutes],
    }
    requests = sum(sum(minute.labels.values()) for minute in minutes)
    return Record(id="server.soak.requests", value=float(requests), unit="count", samples=samples, **surroundings)
