"""Interference: what long prompts that arrive do to the pace of streams that decode."""

from __future__ import annotations

import asyncio
import random
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from time import perf_counter

from tokenspeed.bench.arrivals import Load
from tokenspeed.bench.measured import Measured
from tokenspeed.bench.serve import Part, Run, Sender, open_loop, timed
from tokenspeed.bench.workload import Lengths, Workload
from tokenspeed.contracts.errors import ConfigError

_LOOK_S = 0.01
Span = tuple[float, float]
"""From and to, by perf_counter."""


@dataclass(frozen=True)
class Interference:
    """`streams` requests of `work` always under way, and long prompts that arrive among them.

    Once all streams decode and `settle_s` seconds have passed, `count` prompts of `inject_len` arrive under a load;
    `settle_s` after the last of these has ended, no new stream begins.
    """

    work: Workload
    streams: int
    load: Load
    count: int
    inject_len: Lengths
    inject_output_len: Lengths
    settle_s: float = 5.0

    def __post_init__(self) -> None:
        if self.streams < 1:
            raise ConfigError(f"--concurrency must be at least 1, got {self.streams}")
        if not 0 < self.settle_s < float("inf"):
            raise ConfigError(f"--settle must be above 0, got {self.settle_s}")

    def __str__(self) -> str:
        return f"{self.streams} streams and {self.count} long prompts, {self.load}"

    async def run(self, sender: Sender) -> Run:
        """Measure it. Where a stream fails, everything ends early."""
        steady: list[Measured] = []
        injected: list[Measured] = []
        counted: list[float] = []
        run = await timed(str(self), self._measure(sender, steady, injected, counted))
        gaps = phases(steady, injected, (counted[0], counted[1]))
        parts = [Part.of("steady", steady), *(Part(name, [], found) for name, found in gaps.items())]
        return replace(run, parts=[*parts, Part.of("injected", injected)], mixed=True)

    async def _measure(
        self, sender: Sender, steady: list[Measured], injected: list[Measured], counted: list[float]
    ) -> list[Measured]:
        long = replace(self.work, seed=self.work.seed + 1, input_len=self.inject_len, output_len=self.inject_output_len)
        prompts = [sender.request(body) for body in long.bodies(self.count)]
        streams = _Streams(sender, self.work.bodies(None), self.streams, steady)
        await streams.all_decode()
        counted.append(perf_counter())
        await streams.hold(self.settle_s)
        if not streams.ending.is_set():
            injected += await open_loop(sender, prompts, self.load, random.Random(self.work.seed))
        await streams.hold(self.settle_s)
        counted.append(perf_counter())
        await streams.end()
        return steady + injected


class _Streams:
    """Requests one after the other in each of `count` streams, until told to end or until one fails."""

    def __init__(self, sender: Sender, bodies: Iterator[bytes], count: int, requests: list[Measured]) -> None:
        self.ending = asyncio.Event()
        self._sender, self._bodies, self._count, self._requests = sender, bodies, count, requests
        self._tasks = [asyncio.ensure_future(self._stream()) for _ in range(count)]

    async def all_decode(self) -> None:
        """Until every stream has had its first output, or one has failed."""
        while not self.ending.is_set() and not self._begun():
            await asyncio.sleep(_LOOK_S)

    async def hold(self, seconds: float) -> None:
        """Let them go on for so long, or until one fails."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self.ending.wait(), seconds)

    async def end(self) -> None:
        """Begin no other request, and wait for those under way."""
        self.ending.set()
        await asyncio.gather(*self._tasks)

    def _begun(self) -> bool:
        # Every stream appends its first request before any of them can append its second.
        firsts = self._requests[: self._count]
        return len(firsts) == self._count and all(request.first is not None for request in firsts)

    async def _stream(self) -> None:
        while not self.ending.is_set():
            result = Measured()
            self._requests.append(result)
            await self._sender.send(self._sender.request(next(self._bodies)), result)
            if result.error is not None:
                self.ending.set()


def phases(steady: Iterable[Measured], injected: Iterable[Measured], counted: Span) -> dict[str, list[float]]:
    """The gaps of steady streams within `counted`, by what they overlap.

    before: all before the first long prompt was sent. during: overlapping the time from sending one to its first token.
    between: overlapping none, but another is still to come. after: later than all.
    """
    readings = _merged((each.sent, each.first) for each in injected if each.first is not None)
    begins = [begin for begin, _ in readings]
    found: dict[str, list[float]] = {"before": [], "during": [], "between": [], "after": []}
    for request in steady:
        if request.error is None:
            for begin, end in pairwise(request.arrivals()):
                if counted[0] <= begin and end <= counted[1]:
                    found[_phase(begin, end, readings, begins)].append(end - begin)
    return found


def _phase(begin: float, end: float, readings: list[Span], begins: list[float]) -> str:
    begun = bisect_left(begins, end)
    if begun == 0:
        return "before"
    if begin < readings[begun - 1][1]:
        return "during"
    return "after" if begun == len(readings) else "between"


def _merged(spans: Iterable[Span]) -> list[Span]:
    merged: list[Span] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged
