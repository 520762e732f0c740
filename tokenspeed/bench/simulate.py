"""Simulations of the scheduler, without a model and without waiting: `python -m tokenspeed.bench.simulate`.

admission: 2,000 requests in a closed loop of 256, prompts uniform in 100..4,000, outputs lognormal (mean 500, 99 % are
below 2,000) under max_tokens 32k, pages for 64 average requests, nothing known at the start. How many sequences run at
once, against a policy that knows every length, and how many are preempted, for several margins.

interference: steps of 4 ms + 20 us per token; 32 sequences decode while a prompt of 100k tokens arrives, target 20 ms.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Collection
from dataclasses import dataclass, field
from statistics import median

import msgspec
import numpy as np

from tokenspeed.bench.record import Record, Target, surroundings, write
from tokenspeed.cache.keys import root_key
from tokenspeed.cache.manager import CacheManager
from tokenspeed.contracts.request import Request
from tokenspeed.contracts.sampling import SamplingParams
from tokenspeed.contracts.step import ResultRow, StepPlan, StepResult
from tokenspeed.runner.null import NullExecutor
from tokenspeed.scheduler.admission import RISK, AdmissionPolicy, ForecastAdmission
from tokenspeed.scheduler.config import SchedulerConfig
from tokenspeed.scheduler.scheduler import Scheduler
from tokenspeed.scheduler.sequence import Sequence

PAGE_SIZE = 16
EOS = 1
WARM_STEPS = 8
"""Until the long prompt arrives."""
QUANTILE_99 = 2.3263
"""Of the standard normal distribution."""


@dataclass(frozen=True)
class Workload:
    """A closed loop. Lengths in tokens; outputs lognormal with that mean and 99th percentile."""

    num_requests: int = 2000
    concurrency: int = 256
    prompt: tuple[int, int] = (100, 4000)
    output_mean: float = 500
    output_p99: float = 2000
    max_tokens: int = 32768
    pool_requests: int = 64
    """The pool holds so many requests of mean prompt and output."""
    budget: int = 8192

    @property
    def num_pages(self) -> int:
        return int(self.pool_requests * (sum(self.prompt) / 2 + self.output_mean) / PAGE_SIZE)

    def lengths(self, seed: int) -> list[tuple[int, int]]:
        """Prompt and output of each request."""
        rng = random.Random(seed)
        sigma = QUANTILE_99 - math.sqrt(QUANTILE_99**2 - 2 * math.log(self.output_p99 / self.output_mean))
        mu = math.log(self.output_mean) - sigma**2 / 2
        outputs = (max(1, min(self.max_tokens, round(rng.lognormvariate(mu, sigma)))) for _ in range(self.num_requests))
        return [(rng.randint(*self.prompt), output) for output in outputs]


class Outcome(msgspec.Struct, frozen=True):
    """mean_running: sequences at once, over all steps. preemptions: as a part of the requests."""

    mean_running: float
    preemptions: float
    steps: int


class OracleAdmission:
    """Knows every length (by the request's seed): admits while the pages of all stay within the pool to the end."""

    def __init__(self, cache: CacheManager, outputs: list[int]) -> None:
        self.version = 0
        self._cache = cache
        self._outputs = outputs

    def admits(self, newcomer: Sequence, num_shared: int, running: Collection[Sequence], step_id: int) -> bool:
        """The peak is just before one of the ends."""
        sequences = [*running, newcomer]
        tokens = np.array([len(s.token_ids) for s in sequences])
        left = np.array([self._outputs[s.live.request.seed] - s.num_output for s in sequences])
        pages = np.ceil((tokens[:, None] + left) / self._cache.page_size)
        return bool((pages * (left[:, None] >= left)).sum(axis=0).max() <= self._cache.num_pages)

    def refresh(self, running: Collection[Sequence], step_id: int) -> None:
        """The future is known."""

    def ended(self, num_output: int, cut: bool) -> None:
        """It was known."""

    def changed(self) -> None:
        """Another try may succeed."""
        self.version += 1


@dataclass
class LengthExecutor:
    """Samples 0, and EOS where the request (its seed is its number) has its length."""

    outputs: list[int]
    _slots: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Slot to (known tokens not computed, tokens until the end)."""
    _computed: dict[int, int] = field(default_factory=dict)

    def launch(self, plan: StepPlan) -> StepResult:
        """Run the step to its end."""
        for new in plan.delta.new:
            left = self.outputs[new.sampling.seed] - (len(new.token_ids) - new.num_prompt)
            self._slots[new.slot] = len(new.token_ids) - new.num_computed, left
            self._computed[new.slot] = new.num_computed
        rows = []
        for row in plan.rows:
            uncomputed, left = self._slots[row.slot]
            fed = min(row.max_tokens, uncomputed)
            self._computed[row.slot] += fed
            ends = fed == uncomputed
            self._slots[row.slot] = (1, left - 1) if ends else (uncomputed - fed, left)
            tokens = ([EOS] if left == 1 else [0]) if ends else []
            rows.append(ResultRow(row.slot, self._computed[row.slot], tokens))
        return StepResult(plan.step_id, rows)


def simulate_admission(workload: Workload, seed: int, risk: float | None = RISK) -> Outcome:
    """Run a workload to its end; `risk` None takes the oracle."""
    lengths = workload.lengths(seed)
    outputs = [output for _, output in lengths]
    cache = CacheManager(workload.num_pages, PAGE_SIZE, root_key("", "", PAGE_SIZE), enable_prefix_caching=False)
    policy: AdmissionPolicy = OracleAdmission(cache, outputs) if risk is None else ForecastAdmission(cache, risk)
    limits = SchedulerConfig(workload.concurrency, workload.budget, workload.prompt[1] + workload.max_tokens)
    scheduler = Scheduler(limits, cache, policy)
    executor = LengthExecutor(outputs)
    running = sent = alive = steps = 0
    while scheduler.has_work or sent < workload.num_requests:
        while alive < workload.concurrency and sent < workload.num_requests:
            scheduler.add(_request(sent, lengths[sent][0], workload.max_tokens))
            sent, alive = sent + 1, alive + 1
        plan = scheduler.schedule()
        assert plan is not None
        running += scheduler.stats().num_running
        steps += 1
        updates = scheduler.update(executor.launch(plan))
        alive -= sum(update.finish_reason is not None for update in updates)
    return Outcome(running / steps, scheduler.stats().num_preemptions / workload.num_requests, steps)


class Interference(msgspec.Struct, frozen=True):
    """slowest_ms: the slowest step while both were there. prefill_share: prompt tokens per step beside the decoding
    sequences, over what the cap gives a prompt alone."""

    slowest_ms: float
    prefill_share: float
    steps: int


def simulate_interference(
    prompt: int = 100_000,
    decoding: int = 32,
    target_ms: float = 20.0,
    fixed_ms: float = 4.0,
    token_ms: float = 0.02,
    depth: int = 2,
) -> Interference:
    """A long prompt arrives while others decode; `depth` steps are in flight, so step times are known late."""
    cache = CacheManager(
        prompt // PAGE_SIZE + 4096, PAGE_SIZE, root_key("", "", PAGE_SIZE), enable_prefix_caching=False
    )
    limits = SchedulerConfig(decoding + 1, 8192, prompt + 1000, target_itl_ms=target_ms)
    scheduler, executor = Scheduler(limits, cache), NullExecutor()
    for number in range(decoding):
        scheduler.add(_request(number, 32, 900))
    in_flight: list[tuple[StepResult, int]] = []
    times: list[float] = []
    left = prompt
    while left:
        if scheduler.record.step_id == WARM_STEPS:
            scheduler.add(_request(decoding, prompt, 900))
        plan = scheduler.schedule()
        assert plan is not None
        fed = scheduler.record.num_tokens
        in_flight.append((executor.launch(plan).result(), fed))
        if plan.step_id > WARM_STEPS:
            times.append(fixed_ms + token_ms * fed)
            left -= scheduler.record.num_prefill_tokens
        if len(in_flight) == depth:
            result, fed = in_flight.pop(0)
            scheduler.update(result)
            scheduler.observe(fed, (fixed_ms + token_ms * fed) / 1000)
    alone = (target_ms - fixed_ms) / token_ms
    return Interference(max(times), prompt / len(times) / alone, len(times))


def _request(number: int, prompt: int, max_tokens: int) -> Request:
    params = SamplingParams(max_tokens=max_tokens)
    return Request(
        request_id=str(number), prompt_token_ids=[0] * prompt, params=params, seed=number, eos_token_ids=[EOS]
    )


RESULTS = "benchmarks/results/scheduling.json"


def main() -> None:
    """Print and record both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="workloads per margin")
    parser.add_argument("--risks", type=float, nargs="+", default=[1.0, 1.5, RISK, 3.0])
    parser.add_argument("--output", default=RESULTS, help=f"file to merge the records into (default {RESULTS})")
    options = parser.parse_args()
    found = simulate_interference()
    print(found)
    write(options.output, interference_records(found) + admission_records(options.seeds, options.risks))


def interference_records(found: Interference) -> list[Record]:
    """The slowest step, and the prefill rate as a part of what the cap gives alone."""
    around = surroundings("python -m tokenspeed.bench.simulate")
    slowest = Record(
        id="sim.interference.step", value=found.slowest_ms, unit="ms", target=Target(at_most=20.0), **around
    )
    share = Record(
        id="sim.interference.prefill", value=100 * found.prefill_share, unit="%", target=Target(at_least=80.0), **around
    )
    return [slowest, share]


def admission_records(seeds: int, risks: list[float]) -> list[Record]:
    """Per margin the running batch as a part of the oracle's, and the preempted requests; medians over workloads."""
    around = surroundings("python -m tokenspeed.bench.simulate")
    records = []
    oracles = [simulate_admission(Workload(), seed, None) for seed in range(seeds)]
    for risk in risks:
        outcomes = [simulate_admission(Workload(), seed, risk) for seed in range(seeds)]
        shares = [100 * o.mean_running / best.mean_running for o, best in zip(outcomes, oracles, strict=True)]
        preempted = [100 * o.preemptions for o in outcomes]
        name = "sim.admission.risk" + f"{risk:g}".replace(".", "_")
        print(f"risk {risk}: {median(shares):.1f} % of the oracle, {median(preempted):.2f} % preempted")
        bounds = (Target(at_least=85.0), Target(at_most=2.0)) if risk == RISK else (None, None)
        for what, values, target in zip(("running", "preempted"), (shares, preempted), bounds, strict=True):
            records.append(
                Record(
                    id=f"{name}.{what}",
                    value=median(values),
                    unit="%",
                    target=target,
                    samples={"by_seed": values},
                    **around,
                )
            )
    return records


if __name__ == "__main__":
    main()
