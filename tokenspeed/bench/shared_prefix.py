"""Groups of requests that begin alike: what a prefix cache is worth."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from tokenspeed.bench.arrivals import Load
from tokenspeed.bench.measured import Measured
from tokenspeed.bench.serve import Part, Run, Sender, send_all
from tokenspeed.bench.workload import Lengths, Workload


@dataclass(frozen=True)
class SharedPrefix:
    """`group_size` requests in each of `groups`, those of a group with the same prefix and suffixes of their own."""

    work: Workload
    load: Load
    groups: int
    group_size: int
    prefix_len: Lengths
    suffix_len: Lengths

    async def run(self, sender: Sender) -> Run:
        """Send them, the groups taking turns."""
        run = await send_all(sender, self.bodies(), self.load, seed=self.work.seed)
        named = f"{self.groups} groups of {self.group_size}, {run.load}"
        return replace(run, load=named, parts=self.parts(run.requests))

    def bodies(self) -> Iterator[bytes]:
        """A request of every group, then a second of every group, and so on."""
        generator = random.Random(self.work.seed)
        prefixes = [self.work.pieces(generator, self.prefix_len.draw(generator)) for _ in range(self.groups)]
        for _ in range(self.group_size):
            for prefix in prefixes:
                suffix = self.work.pieces(generator, self.suffix_len.draw(generator))
                yield self.work.body(self.work.asked(prefix + suffix), self.work.output_len.draw(generator))

    def parts(self, requests: list[Measured]) -> list[Part]:
        """The first of each group; those sent before the first of their group had its first token; the rest."""
        found: dict[str, list[Measured]] = {"first": [], "early": [], "rest": []}
        for group in range(self.groups):
            first, *others = sorted(requests[group :: self.groups], key=lambda request: request.sent)
            found["first"].append(first)
            for other in others:
                found["early" if other.sent < first.sent + first.ttft else "rest"].append(other)
        return [Part.of(name, members) for name, members in found.items() if members]
