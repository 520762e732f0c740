"""Figures of a load: latencies, rates, goodput, errors, and what the generator itself took."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

import msgspec
import numpy as np

from tokenspeed.bench.measured import Measured
from tokenspeed.bench.record import Record, Surroundings
from tokenspeed.bench.serve import Run
from tokenspeed.bench.serve_figures import Arrivals, Distribution, PartFigures, arrivals, distribution, part_figures
from tokenspeed.contracts.errors import ConfigError

BUSY = 0.7
"""Above this part of a core the generator's own queueing shows in the figures."""
LATE_MS, LATE_SHARE = 5.0, 0.1
"""Requests sent later than both, the second a part of the mean gap between arrivals, are not the load asked for."""
PILED_UP, PILED_TIMES = 10, 1.5
"""So many more under way at the last arrival, over so many times those at half of them, are no chance."""
METRICS = {
    "ttft": "to the first token",
    "tpot": "per token after it",
    "itl": "between outputs",
    "e2e": "to the last token",
}


class Goodput(msgspec.Struct, frozen=True):
    """Requests within every limit, per second and as a part of all that were sent."""

    limits_ms: dict[str, float]
    requests_per_s: float
    share: float


class Generator(msgspec.Struct, frozen=True):
    """What the load generator took: a part of one core; how late the slowest hundredth of requests was sent, in ms,
    without what --max-concurrency held back."""

    cpu_share: float
    late_p99_ms: float
    events: int


class Report(msgspec.Struct, kw_only=True):
    """A load in figures. Tokens are those that the server counted. `errors`: how often each message came.

    Latencies are None without a request that completed, and where the requests are too different for common ones.
    """

    load: str
    requests: int
    completed: int
    errors: dict[str, int]
    duration_s: float
    requests_per_s: float
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    output_tok_s: float
    total_tok_s: float
    ttft_ms: Distribution | None
    tpot_ms: Distribution | None
    itl_ms: Distribution | None
    e2e_ms: Distribution | None
    goodput: Goodput | None
    arrivals: Arrivals | None
    parts: list[PartFigures]
    generator: Generator


@dataclass(frozen=True)
class Limits:
    """Milliseconds that a good request keeps to."""

    limits_ms: dict[str, float]

    @classmethod
    def parse(cls, text: str) -> Limits:
        """From "ttft:500,tpot:50,e2e:2000". Raises ConfigError."""
        limits: dict[str, float] = {}
        for part in text.split(","):
            match = re.fullmatch(r"\s*(ttft|tpot|e2e):(\d+(?:\.\d+)?)\s*", part)
            if match is None or match[1] in limits:
                raise ConfigError(f"--goodput must look like ttft:500,tpot:50,e2e:2000 (ms), got {text!r}")
            limits[match[1]] = float(match[2])
        return cls(limits)

    def kept_by(self, request: Measured) -> bool:
        """A request of one token has no tpot to miss."""
        figures = {"ttft": request.ttft, "tpot": request.tpot or 0.0, "e2e": request.e2e}
        return request.error is None and all(1e3 * figures[name] <= limit for name, limit in self.limits_ms.items())


def report(run: Run, limits: Limits | None = None) -> Report:
    """The figures of a run: rates over its whole duration, latencies of the requests that completed."""
    good = [request for request in run.requests if request.error is None]
    alike = [] if run.mixed else good
    output = sum(request.output_tokens for request in good)
    prompt = sum(request.prompt_tokens for request in good)
    return Report(
        load=run.load,
        requests=len(run.requests),
        completed=len(good),
        errors=dict(Counter(request.error for request in run.requests if request.error is not None).most_common()),
        duration_s=run.duration,
        requests_per_s=len(good) / run.duration,
        input_tokens=prompt,
        cached_tokens=sum(request.cached_tokens for request in good),
        output_tokens=output,
        output_tok_s=output / run.duration,
        total_tok_s=(prompt + output) / run.duration,
        ttft_ms=distribution([request.ttft for request in alike]),
        tpot_ms=distribution([request.tpot for request in alike if request.tpot is not None]),
        itl_ms=distribution([gap for request in alike for gap in request.gaps]),
        e2e_ms=distribution([request.e2e for request in alike]),
        goodput=_goodput(run, limits) if limits else None,
        arrivals=arrivals(run.requests),
        parts=[part_figures(part) for part in run.parts],
        generator=Generator(
            run.cpu_s / run.duration,
            1e3 * float(np.percentile([request.late - request.waited for request in run.requests], 99)),
            sum(len(request.gaps) + 1 for request in good),
        ),
    )


def text(report: Report) -> str:
    """The report as lines for a terminal."""
    lines = [
        f"{report.completed} of {report.requests} requests completed in {report.duration_s:.2f} s, {report.load}",
        f"{report.requests_per_s:.2f} req/s, {report.output_tok_s:.1f} tok/s out, {report.total_tok_s:.1f} in all",
        f"input {report.input_tokens} tokens ({report.cached_tokens} cached), output {report.output_tokens}",
        *_latencies(report),
        *_parts(report.parts),
    ]
    if report.goodput is not None:
        limits = ", ".join(f"{name} {limit:g} ms" for name, limit in report.goodput.limits_ms.items())
        lines += ["", f"goodput {report.goodput.requests_per_s:.2f} req/s, {report.goodput.share:.1%} within {limits}"]
    lines += ["", *_remarks(report)]
    return "\n".join(lines)


def _latencies(report: Report) -> list[str]:
    rows = []
    for name, found in _distributions(report).items():
        if found is not None:
            figures = (found.mean, found.p50, found.p90, found.p99, found.max)
            rows.append(f"{name.upper() + ' ' + METRICS[name]:<26}" + "".join(f"{figure:>10.2f}" for figure in figures))
    head = f"{'ms':<26}{'mean':>10}{'p50':>10}{'p90':>10}{'p99':>10}{'max':>10}"
    return ["", head, *rows] if rows else []


def _parts(parts: list[PartFigures]) -> list[str]:
    if not parts:
        return []
    counts = f"{'ms':<10}{'requests':>9}{'input':>9}{'cached':>8}"
    rows = [f"{counts}{'TTFT p50':>11}{'p99':>10}{'ITL p50':>10}{'p99':>10}{'max':>10}"]
    for part in parts:
        ttft, itl = part.ttft_ms, part.itl_ms
        counts = f"{part.requests or '-':>9}{_cell(part.input_tokens, '.0f'):>9}{_cell(part.cached_share, '.1%'):>8}"
        first = (ttft.p50, ttft.p99) if ttft else (None, None)
        later = (itl.p50, itl.p99, itl.max) if itl else (None, None, None)
        rows.append(f"{part.name:<10}{counts} " + "".join(f"{_cell(figure):>10}" for figure in first + later))
    return ["", *rows]


def _cell(figure: float | None, form: str = ".2f") -> str:
    return "-" if figure is None else format(figure, form)


def records(report: Report, run: Run, prefix: str, surroundings: Surroundings) -> list[Record]:
    """One record per figure, ids below `prefix`. Raises ConfigError where a request failed: such a run is no result."""
    if report.errors or not report.completed:
        failed = report.requests - report.completed
        raise ConfigError(f"{failed} of {report.requests} requests failed: nothing is recorded")
    made = [
        Record(id=f"{prefix}.output.tok_s", value=report.output_tok_s, unit="tok/s", **surroundings),
        Record(id=f"{prefix}.requests.per_s", value=report.requests_per_s, unit="req/s", **surroundings),
    ]
    if report.goodput is not None:
        value = report.goodput.requests_per_s
        made.append(Record(id=f"{prefix}.goodput.per_s", value=value, unit="req/s", **surroundings))
    samples = {
        "ttft": [1e3 * request.ttft for request in run.requests],
        "tpot": [1e3 * request.tpot for request in run.requests if request.tpot is not None],
        "e2e": [1e3 * request.e2e for request in run.requests],
    }
    gaps = [1e3 * gap for request in run.requests for gap in request.gaps]
    if gaps:  # There may be millions: their percentiles from 0 to 100 are kept.
        samples["itl"] = np.percentile(gaps, range(101)).tolist()
    for name, found in _distributions(report).items():
        if found is not None:
            each = {f"{name}_ms": samples[name]} if name in samples else {}
            made.append(Record(id=f"{prefix}.{name}.p50", value=found.p50, unit="ms", samples=each, **surroundings))
            made.append(Record(id=f"{prefix}.{name}.p99", value=found.p99, unit="ms", **surroundings))
    if report.arrivals is not None and report.arrivals.wait_ms is not None:
        value = report.arrivals.wait_ms.p99
        made.append(Record(id=f"{prefix}.wait.p99", value=value, unit="ms", **surroundings))
    return made + [record for part in report.parts for record in _part_records(part, prefix, surroundings)]


def _part_records(part: PartFigures, prefix: str, surroundings: Surroundings) -> list[Record]:
    figures: dict[str, tuple[float, str]] = {}
    if part.cached_share is not None:
        figures["cached"] = 100 * part.cached_share, "%"
    if part.ttft_ms is not None:
        figures |= {"ttft.p50": (part.ttft_ms.p50, "ms"), "ttft.p99": (part.ttft_ms.p99, "ms")}
    if part.itl_ms is not None:
        itl = part.itl_ms
        figures |= {"itl.p50": (itl.p50, "ms"), "itl.p99": (itl.p99, "ms"), "itl.max": (itl.max, "ms")}
    return [
        Record(id=f"{prefix}.{part.name}.{name}", value=value, unit=unit, **surroundings)
        for name, (value, unit) in figures.items()
    ]


def _distributions(report: Report) -> dict[str, Distribution | None]:
    return {"ttft": report.ttft_ms, "tpot": report.tpot_ms, "itl": report.itl_ms, "e2e": report.e2e_ms}


def _goodput(run: Run, limits: Limits) -> Goodput:
    good = sum(limits.kept_by(request) for request in run.requests)
    return Goodput(limits.limits_ms, good / run.duration, good / len(run.requests))


def _remarks(report: Report) -> list[str]:
    own = report.generator
    lines = _arrival_remarks(report.arrivals) if report.arrivals else []
    lines.append(
        f"generator: {own.cpu_share:.0%} of a core, {own.events} events, requests at most {own.late_p99_ms:.1f} ms late"
    )
    if own.cpu_share > BUSY:
        lines.append("warning: the generator was busy, its own queueing is in these figures")
    per_s = report.arrivals.due_per_s if report.arrivals else None
    if own.late_p99_ms > max(LATE_MS, LATE_SHARE * 1e3 / per_s if per_s else 0.0):
        lines.append("warning: the generator sent requests late, these are not the arrivals that were asked for")
    return lines + [f"failed {count} times: {message}" for message, count in report.errors.items()]


def _arrival_remarks(found: Arrivals) -> list[str]:
    half, last = found.under_way_at_half, found.under_way_at_last
    due = "" if found.due_per_s is None else f"{found.due_per_s:.2f} req/s due; "
    lines = [f"arrivals: {due}under way {half} when half were due, {last} at the last, {found.most_under_way} at most"]
    if found.wait_ms is not None:
        wait = f"p50 {found.wait_ms.p50:.1f}, p99 {found.wait_ms.p99:.1f} ms"
        lines.append(f"waiting: {found.waited} were held back by --max-concurrency, {wait}; no latency counts that")
    if last > half * PILED_TIMES + PILED_UP:
        lines.append("warning: requests piled up, the server did not keep up with the rate")
    return lines
