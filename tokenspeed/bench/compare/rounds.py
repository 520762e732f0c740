"""Rounds of a comparison: every engine does the same work by turns, and only ratios within a round are claimed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from statistics import median
from time import perf_counter

from tokenspeed.bench.arrivals import Load
from tokenspeed.bench.compare.clocks import clocks
from tokenspeed.bench.compare.engines import Engine, ask
from tokenspeed.bench.compare.figures import WITH_SAMPLES, Outcome, differences, outcome
from tokenspeed.bench.compare.workloads import COLD, OVERLOAD, TIMES_CAPACITY, TRANSLATION, Step
from tokenspeed.bench.record import Record, Surroundings
from tokenspeed.bench.serve import Run, Sender, first_model, send_all
from tokenspeed.bench.sse_client import Client, Endpoint
from tokenspeed.bench.stats import calibration_loop, median_interval
from tokenspeed.bench.workload import Lengths
from tokenspeed.contracts.errors import ConfigError

WARM_UP_SEED, CAPACITY_SEED = 1_000_003, 2_000_003
"""Prompts that no round has."""
WARM_UP_LEN = 512
"""The most tokens of a prompt that warms up."""


@dataclass(frozen=True)
class Plan:
    """How a comparison is made. restart: start each engine for each of its runs, so that one is there at a time."""

    rounds: int = 7
    warmup: int = 2
    restart: bool = False
    timeout: float = 600.0
    ready_s: float = 900.0
    api_key: str | None = None

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.warmup < 0 or not (self.timeout > 0 and self.ready_s > 0):
            raise ConfigError("--rounds must be at least 1, --warmup at least 0, the timeouts above 0")


@dataclass
class Comparison:
    """A step, with the outcomes of each engine, round by round. differences: why there are no ratios."""

    step: Step
    outcomes: dict[str, list[Outcome]] = field(default_factory=dict)
    differences: list[str] = field(default_factory=list)


class Engines:
    """All sides, running for as long as this does, or each for its own runs alone."""

    def __init__(self, engines: Sequence[Engine], plan: Plan, stack: ExitStack) -> None:
        self.engines, self.plan = engines, plan
        self._urls = {} if plan.restart else {each.name: stack.enter_context(self._start(each)) for each in engines}

    @contextmanager
    def at_work(self, engine: Engine) -> Iterator[str]:
        """Its address."""
        if engine.name in self._urls:
            yield self._urls[engine.name]
            return
        with self._start(engine) as url:
            yield url

    @contextmanager
    def _start(self, engine: Engine) -> Iterator[str]:
        with engine.running(self.plan.ready_s) as url:
            yield url


def compare(engines: Engines, step: Step) -> Comparison:
    """All rounds of a step. Raises ConfigError where an engine does not start or its warm-up fails."""
    if step.workload == OVERLOAD:
        step = step.at_rate(TIMES_CAPACITY * max(_capacity(engines, step, each) for each in engines.engines))
    found = Comparison(step, {engine.name: [] for engine in engines.engines})
    if not engines.plan.restart and step.workload != COLD:
        for engine in engines.engines:
            _measured(engines, engine, step, WARM_UP_SEED, warm_only=True)
    for number in range(engines.plan.rounds):
        this: dict[str, Outcome] = {}
        for engine in engines.engines if number % 2 == 0 else reversed(engines.engines):
            calibration, speed = calibration_loop(), clocks()
            if step.workload == COLD:
                this[engine.name] = _cold(engines, engine, step, number, calibration, speed)
            else:
                run = _measured(engines, engine, step, number, warm_only=False)
                this[engine.name] = outcome(step, run, calibration, speed)
        for engine in engines.engines:
            found.outcomes[engine.name].append(this[engine.name])
        found.differences += [each for each in differences(this) if each not in found.differences]
    return found


def records(found: Comparison, engines: Sequence[Engine], around: Surroundings) -> list[Record]:
    """A record for each figure of each engine, with its ratio to the last one's.

    Raises ConfigError where the engines did other work than the same: such figures are no result.
    """
    if found.differences:
        raise ConfigError(f"{found.step.id}: not the same work, so no ratio: {'; '.join(found.differences)}")
    *_, last = engines
    made = []
    for engine in engines:
        runs, peers = found.outcomes[engine.name], found.outcomes[last.name]
        for name in _shared(found):
            unit = runs[0].figures[name][1]
            a, b = ([each.figures[name][0] for each in side] for side in (runs, peers))
            samples = {"a": a, "calibration_a": [each.calibration_s for each in runs]}
            if name in WITH_SAMPLES:
                samples[WITH_SAMPLES[name]] = [value for each in runs for value in each.samples[WITH_SAMPLES[name]]]
            record = Record(
                id=f"{found.step.id}.{engine.name}.{name}",
                value=median(a),
                unit=unit,
                samples=samples,
                settings=found.step.settings() | {"engine": engine.name, "engine_version": engine.version},
                **around,
            )
            made.append(record if engine is last else _against(record, last, b, peers))
    return made


def _against(record: Record, last: Engine, b: list[float], peers: Sequence[Outcome]) -> Record:
    record.peer, record.peer_value = f"{last.name} ({last.version})", median(b)
    record.samples |= {"b": b, "calibration_b": [each.calibration_s for each in peers]}
    if min(b) > 0:
        record.ratio = median_interval([mine / its for mine, its in zip(record.samples["a"], b, strict=True)])
    return record


def _shared(found: Comparison) -> list[str]:
    """Figures that every run of every engine has."""
    first, *others = [each for runs in found.outcomes.values() for each in runs]
    return [name for name in first.figures if all(name in other.figures for other in others)]


def _measured(engines: Engines, engine: Engine, step: Step, seed: int, *, warm_only: bool) -> Run:
    with engines.at_work(engine) as url:
        return asyncio.run(_drive(engines.plan, engine, url, step, seed, warm_only or engines.plan.restart, warm_only))


async def _drive(
    plan: Plan, engine: Engine, url: str, step: Step, seed: int, warm: bool, warm_only: bool = False
) -> Run:
    endpoint = Endpoint.parse(url, plan.api_key)
    # A connection for each request: llama-server ends them unannounced.
    client = Client(replace(endpoint, headers=(*endpoint.headers, "Connection: close")))
    try:
        if not engine.told:
            engine.told = await ask(client)
        model = await first_model(client)
        work = step.work(model, engine.extra, seed)
        sender = Sender(client, work.path, plan.timeout, keep_answers=step.workload == TRANSLATION)
        if warm:
            short = Lengths(*[min(WARM_UP_LEN, step.shape.input_len)] * 2)
            bodies = replace(work, seed=WARM_UP_SEED, input_len=short).bodies(plan.warmup)
            warmed = await send_all(sender, bodies, Load(concurrency=1)) if plan.warmup else Run("", [], 0.0, 0.0)
            for request in warmed.requests:
                if request.error is not None:
                    raise ConfigError(f"{engine.name}: the warm-up failed: {request.error}")
            if warm_only:
                return warmed
        return await step.job(work).run(sender)
    finally:
        client.close()


def _capacity(engines: Engines, step: Step, engine: Engine) -> float:
    """Requests per second of a closed loop. Raises ConfigError where one fails."""
    run = _measured(engines, engine, step, CAPACITY_SEED, warm_only=False)
    for request in run.requests:
        if request.error is not None:
            raise ConfigError(f"{engine.name}: a request for its capacity failed: {request.error}")
    return len(run.requests) / run.duration


def _cold(
    engines: Engines, engine: Engine, step: Step, seed: int, calibration: float, speed: dict[str, str | float]
) -> Outcome:
    """From starting the process to its first token."""
    if engine.url is not None:
        raise ConfigError(f"--workload {COLD} has to start engine {engine.name}, which is a URL")
    started = perf_counter()
    with engine.running(engines.plan.ready_s) as url:
        ready = perf_counter() - started
        run = asyncio.run(_drive(engines.plan, engine, url, step, seed, warm=False))
    found = outcome(step, run, calibration, speed)
    first = [request.first - started for request in run.requests if request.first is not None]
    figures = {"ready.s": (ready, "s"), "first_token.s": (min(first, default=float("inf")), "s")}
    return replace(found, figures=figures)
