"""What one run of one engine comes to, and whether runs of several engines did the same work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from tokenspeed.bench.compare.workloads import AGENTIC, INTERFERENCE, OVERLOAD, TRANSLATION, Step
from tokenspeed.bench.measured import Measured
from tokenspeed.bench.serve import Part, Run
from tokenspeed.bench.serve_figures import distribution, part_figures
from tokenspeed.bench.serve_report import BUSY, Report, report

Figures = dict[str, tuple[float, str]]
"""Value and unit by name."""
Work = Counter[tuple[int, int]]
"""How often a prompt and an answer of so many tokens came, by the engine's own count."""
WITH_SAMPLES = {"ttft.p50": "ttft_ms", "tpot.p50": "tpot_ms", "e2e.p50": "e2e_ms"}


@dataclass(frozen=True)
class Outcome:
    """A run of an engine. samples: milliseconds of each request. calibration_s: of the fixed loop right before it."""

    figures: Figures
    work: Work
    faults: list[str]
    calibration_s: float
    clocks: dict[str, str | float] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


def outcome(step: Step, run: Run, calibration_s: float, clocks: dict[str, str | float]) -> Outcome:
    """Of a run of a step."""
    found = report(run)
    good = [request for request in run.requests if request.error is None]
    counted = _counted(step, run)
    samples = {
        "ttft_ms": [1e3 * request.ttft for request in good],
        "tpot_ms": [1e3 * request.tpot for request in good if request.tpot is not None],
        "e2e_ms": [1e3 * request.e2e for request in good],
    }
    busy = found.generator.cpu_share
    remarks = [f"the load generator took {busy:.0%} of a core"] if busy > BUSY else []
    figures = _figures(step, run, found)
    return Outcome(figures, _work(counted), _faults(step, found, counted), calibration_s, clocks, samples, remarks)


def differences(outcomes: dict[str, Outcome]) -> list[str]:
    """Why these runs, of one round, did not do the same work; nothing where they did."""
    found = [f"{name}: {fault}" for name, each in outcomes.items() for fault in each.faults]
    (first, one), *others = outcomes.items()
    for name, other in others:
        if one.work != other.work:
            found.append(f"{first} and {name} counted other tokens: {_sums(one.work)} and {_sums(other.work)}")
    return found


def _counted(step: Step, run: Run) -> list[Measured]:
    # Steady streams go on for as long as the long prompts take: how many there are is no work that was asked for.
    if step.workload == INTERFERENCE:
        return [request for part in run.parts if part.name == "injected" for request in part.requests]
    return run.requests


def _work(requests: Sequence[Measured]) -> Work:
    return Counter((each.prompt_tokens, each.output_tokens) for each in requests if each.error is None)


def _sums(work: Work) -> str:
    prompts, answers = (sum(pair[place] * count for pair, count in work.items()) for place in (0, 1))
    return f"{work.total()} requests of {prompts} prompt and {answers} output tokens"


def _faults(step: Step, found: Report, counted: Sequence[Measured]) -> list[str]:
    faults = [f"{count} requests failed: {message}" for message, count in found.errors.items()]
    due = 1 if step.workload == INTERFERENCE else step.shape.output_len
    others = sorted({each.output_tokens for each in counted if each.error is None} - {due})
    if others:
        faults.append(f"answers of {due} tokens were asked for, and {', '.join(map(str, others))} came")
    return faults


def _figures(step: Step, run: Run, found: Report) -> Figures:
    figures: Figures = {} if run.mixed else _common(found)
    if step.workload == AGENTIC:
        figures |= _agentic(run)
    if step.workload == INTERFERENCE:
        figures |= _interference(run)
    if step.workload == OVERLOAD:
        figures["requests.per_s"] = found.requests_per_s, "req/s"
    if step.workload == TRANSLATION:
        figures |= _words(run)
    return figures


def _common(found: Report) -> Figures:
    figures: Figures = {"output.tok_s": (found.output_tok_s, "tok/s"), "total.tok_s": (found.total_tok_s, "tok/s")}
    latencies = {"ttft": found.ttft_ms, "tpot": found.tpot_ms, "itl": found.itl_ms, "e2e": found.e2e_ms}
    for name, of in latencies.items():
        if of is not None:
            figures |= {f"{name}.p50": (of.p50, "ms"), f"{name}.p99": (of.p99, "ms")}
    if found.tpot_ms is not None and found.tpot_ms.p50 > 0:
        figures["user.tok_s"] = 1e3 / found.tpot_ms.p50, "tok/s"
    return figures


def _agentic(run: Run) -> Figures:
    first, *later = run.parts
    others = Part.of("later_turns", [request for part in later for request in part.requests])
    figures: Figures = {}
    for part in (Part.of("first_turn", first.requests), others):
        of = part_figures(part)
        if of.ttft_ms is not None:
            figures[f"{part.name}.ttft.p50"] = of.ttft_ms.p50, "ms"
            figures[f"{part.name}.ttft.p99"] = of.ttft_ms.p99, "ms"
        if of.cached_share is not None:
            figures[f"{part.name}.cached"] = 100 * of.cached_share, "%"
    return figures


def _interference(run: Run) -> Figures:
    figures: Figures = {}
    for part in map(part_figures, run.parts):
        if part.name == "injected" and part.ttft_ms is not None:
            figures |= {"injected.ttft.p50": (part.ttft_ms.p50, "ms"), "injected.ttft.p99": (part.ttft_ms.p99, "ms")}
        if part.name in ("before", "during") and part.itl_ms is not None:
            itl = part.itl_ms
            figures |= {f"{part.name}.itl.p50": (itl.p50, "ms"), f"{part.name}.itl.p99": (itl.p99, "ms")}
            figures[f"{part.name}.itl.max"] = itl.max, "ms"
    return figures


def _words(run: Run) -> Figures:
    firsts = []
    for request in run.requests:
        word = request.answer.first_word() if request.answer is not None else None
        if request.error is None and word is not None:
            firsts.append(word - request.sent)
    lasts = [request.e2e for request in run.requests if request.error is None]
    figures: Figures = {}
    for name, seconds in (("first_word", firsts), ("last_word", lasts)):
        of = distribution(seconds)
        if of is not None:
            figures |= {f"{name}.p50": (of.p50, "ms"), f"{name}.p99": (of.p99, "ms")}
    return figures
