"""Requests that have nothing to do with each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokenspeed.bench.arrivals import Load
from tokenspeed.bench.serve import Run, Sender, send_all
from tokenspeed.bench.workload import DatasetLine, Workload


@dataclass(frozen=True)
class SingleTurn:
    """`count` requests, random ones or the lines of a dataset."""

    work: Workload
    count: int
    load: Load
    lines: Sequence[DatasetLine] = ()

    async def run(self, sender: Sender) -> Run:
        """Send them."""
        return await send_all(sender, self.work.bodies(self.count, self.lines), self.load, seed=self.work.seed)
