"""Figures of a load: latencies, rates, goodput, errors, and what the generator itself took."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from tokenspeed.bench.record import Record, Surroundings
from tokenspeed.bench.serve import Measured, Run
from tokenspeed.contracts.errors import ConfigError

BUSY = 0.7
"""Above this part of a core the generator's own queueing shows in the figures."""
METRICS = {
    "ttft": "to the first token",
    "tpot": "per token after it",
    "itl": "between outputs",
    "e2e": "to the last token",
}


class Distribution(msgspec.Struct, frozen=True):
    """Milliseconds. Percentiles interpolate between neighbours."""

    mean: float
    p50: float
    p90: float
    p99: float


class Goodput(msgspec.Struct, frozen=True):
    """Requests within every limit, per second and as a part of all that were sent."""

    limits_ms: dict[str, float]
    requests_per_s: float
    share: float


class Generator(msgspec.Struct, frozen=True):
    """What the load generator took: a part of one core; how late the slowest hundredth of requests was sent, in ms."""

    cpu_share: float
    late_p99_ms: float
    events: int


class Report(msgspec.Struct, kw_only=True):
    """A load in figures. Tokens are those that the server counted. `errors`: how often each message came."""

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
    output = sum(request.output_tokens for request in good)
    prompt = sum(request.prompt_tokens for request in good)
    return Report(
        load=str(run.load),
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
        ttft_ms=_distribution([request.ttft for request in good]),
        tpot_ms=_distribution([request.tpot for request in good if request.tpot is not None]),
        itl_ms=_distribution([gap for request in good for gap in request.gaps]),
        e2e_ms=_distribution([request.e2e for request in good]),
        goodput=_goodput(run, limits) if limits else None,
        generator=Generator(
            run.cpu_s / run.duration,
            1e3 * float(np.percentile([request.late for request in run.requests], 99)),
            sum(len(request.gaps) + 1 for request in good),
        ),
    )


def text(report: Report) -> str:
    """The report as lines for a terminal."""
    lines = [
        f"{report.completed} of {report.requests} requests completed in {report.duration_s:.2f} s, {report.load}",
        f"{report.requests_per_s:.2f} req/s, {report.output_tok_s:.1f} tok/s out, {report.total_tok_s:.1f} in all",
        f"input {report.input_tokens} tokens ({report.cached_tokens} cached), output {report.output_tokens}",
        "",
        f"{'ms':<26}{'mean':>10}{'p50':>10}{'p90':>10}{'p99':>10}",
    ]
    for name, found in _distributions(report).items():
        if found is not None:
            figures = (found.mean, found.p50, found.p90, found.p99)
            lines.append(
                f"{name.upper() + ' ' + METRICS[name]:<26}" + "".join(f"{figure:>10.2f}" for figure in figures)
            )
    if report.goodput is not None:
        limits = ", ".join(f"{name} {limit:g} ms" for name, limit in report.goodput.limits_ms.items())
        lines += ["", f"goodput {report.goodput.requests_per_s:.2f} req/s, {report.goodput.share:.1%} within {limits}"]
    lines += ["", *_remarks(report)]
    return "\n".join(lines)


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
    for name, found in _distributions(report).items():
        if found is not None:
            each = {f"{name}_ms": samples[name]} if name in samples else {}
            made.append(Record(id=f"{prefix}.{name}.p50", value=found.p50, unit="ms", samples=each, **surroundings))
            made.append(Record(id=f"{prefix}.{name}.p99", value=found.p99, unit="ms", **surroundings))
    return made


def _distributions(report: Report) -> dict[str, Distribution | None]:
    return {"ttft": report.ttft_ms, "tpot": report.tpot_ms, "itl": report.itl_ms, "e2e": report.e2e_ms}


def _distribution(seconds: Sequence[float]) -> Distribution | None:
    if not seconds:
        return None
    p50, p90, p99 = np.percentile(seconds, (50, 90, 99)) * 1e3
    return Distribution(1e3 * float(np.mean(seconds)), float(p50), float(p90), float(p99))


def _goodput(run: Run, limits: Limits) -> Goodput:
    good = sum(limits.kept_by(request) for request in run.requests)
    return Goodput(limits.limits_ms, good / run.duration, good / len(run.requests))


def _remarks(report: Report) -> list[str]:
    own = report.generator
    lines = [
        f"generator: {own.cpu_share:.0%} of a core, {own.events} events, requests at most {own.late_p99_ms:.1f} ms late"
    ]
    if own.cpu_share > BUSY:
        lines.append("warning: the generator was busy, its own queueing is in these figures")
    lines += [f"failed {count} times: {message}" for message, count in report.errors.items()]
    return lines
