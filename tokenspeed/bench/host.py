"""The host's own work per step, with an executor that computes nothing: `python -m tokenspeed.bench.host`.

Writes host.step.b1.us, host.step.b256.us, host.queue1000.us and host.hash50k.ms to benchmarks/results/host.json.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

from tokenspeed.bench import record
from tokenspeed.bench.stats import RepeatedResult, repeated, summarise
from tokenspeed.cache.keys import ChainHasher, root_key
from tokenspeed.cache.manager import CacheManager
from tokenspeed.contracts.request import Request
from tokenspeed.contracts.sampling import SamplingParams
from tokenspeed.contracts.step import StepResult
from tokenspeed.runner.null import NullExecutor
from tokenspeed.scheduler.config import SchedulerConfig
from tokenspeed.scheduler.scheduler import Scheduler

RESULTS = "benchmarks/results/host.json"
RUNS = 9
STEPS = 128
"""Timed per run: each sequence fills eight pages, and Python's garbage collector comes by."""
PAGE_SIZE = 16
BUDGET = 8192
PAIR = 4
"""Steps before the other side of a pair has its turn: the machine keeps its speed that long."""
CONTEXT = 8192
DEPTH = 2
"""Steps in flight."""
HASHED_TOKENS = 50_000


class Loop:
    """Scheduler and null executor; `run` is what is timed."""

    def __init__(self, num_seqs: int, context: int, num_waiting: int = 0) -> None:
        most = context + RUNS * STEPS * 2 + 1024
        cache = CacheManager(num_seqs * -(-most // PAGE_SIZE), PAGE_SIZE, root_key("", "", PAGE_SIZE))
        self._scheduler = Scheduler(SchedulerConfig(num_seqs, BUDGET, most), cache)
        self._executor = NullExecutor()
        params = SamplingParams(max_tokens=most, ignore_eos=True)
        rng = random.Random(num_seqs)
        for number in range(num_seqs + num_waiting):
            prompt = [number, *rng.choices(range(32_000), k=context - 1)]
            self._scheduler.add(Request(request_id=str(number), prompt_token_ids=prompt, params=params, seed=number))
            while number < num_seqs and self._scheduler.num_waiting:
                self._step()
        self._in_flight = [self._launch() for _ in range(DEPTH - 1)]
        gc.collect()
        gc.freeze()  # as the engine's process does once it is up

    def run(self, steps: int = STEPS) -> float:
        """Microseconds per step."""
        start = time.perf_counter()
        for _ in range(steps):
            self._in_flight.append(self._launch())
            self._scheduler.update(self._in_flight.pop(0))
        return (time.perf_counter() - start) / steps * 1e6

    def _launch(self) -> StepResult:
        plan = self._scheduler.schedule()
        assert plan is not None
        return self._executor.launch(plan).result()

    def _step(self) -> None:
        self._scheduler.update(self._launch())


def measure_step(num_seqs: int, context: int) -> RepeatedResult:
    """Microseconds per step of `num_seqs` decoding sequences with `context` tokens each."""
    return repeated(Loop(num_seqs, context).run, RUNS)


def measure_queue(num_waiting: int = 1000) -> RepeatedResult:
    """Microseconds that so many waiting requests add to a step: the median of pairs of a few steps each."""
    plain, queued = Loop(16, 256), Loop(16, 256, num_waiting)
    return repeated(lambda: statistics.median(queued.run(PAIR) - plain.run(PAIR) for _ in range(STEPS // PAIR)), RUNS)


def measure_hash() -> RepeatedResult:
    """Milliseconds to hash a prompt's pages; asking again for keys that are known costs nothing."""
    tokens = random.Random(0).choices(range(2**31), k=HASHED_TOKENS)
    return repeated(lambda: _hash(tokens), RUNS)


def _hash(tokens: list[int]) -> float:
    hasher = ChainHasher(root_key("", "", PAGE_SIZE), PAGE_SIZE)
    start = time.perf_counter()
    hasher.extend(tokens, len(tokens) // PAGE_SIZE)
    return (time.perf_counter() - start) * 1e3


def records() -> Iterator[record.Record]:
    """Measure everything, one after the other. Values are lower quartiles: a neighbour on the machine only adds."""
    measures: list[tuple[str, str, float, Callable[[], RepeatedResult]]] = [
        ("host.step.b1.us", "us", 100, lambda: measure_step(1, 256)),
        ("host.step.b256.us", "us", 1500, lambda: measure_step(256, CONTEXT)),
        ("host.queue1000.us", "us", 5, measure_queue),
        ("host.hash50k.ms", "ms", 10, measure_hash),
    ]
    surroundings = record.surroundings("python -m tokenspeed.bench.host")
    for name, unit, at_most, measure in measures:
        samples = measure()
        yield record.Record(
            id=name,
            value=round(summarise(samples.figures).lower_quartile, 3),
            unit=unit,
            target=record.Target(at_most=at_most),
            samples=samples.samples(),
            **surroundings,
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write. arguments: by default the command line's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default=RESULTS, help=f"file to merge the records into (default {RESULTS})")
    options = parser.parse_args(arguments)
    found = []
    for entry in records():
        figures = summarise(entry.samples["figures"])
        calibration = summarise(entry.samples["calibration_s"])
        print(
            f"{entry.id:20} {entry.value:10.2f} {entry.unit} (median {figures.median:.2f}, {figures.minimum:.2f} to "
            f"{figures.maximum:.2f}; calibration {calibration.median * 1e3:.1f} ms) met: {entry.met()}"
        )
        found.append(entry)
    record.write(options.output, found)


if __name__ == "__main__":
    main()
