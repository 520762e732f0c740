"""Times a launch on a GPU inside a CUDA graph of many repetitions, and prints it against the read ceiling."""

from __future__ import annotations

import argparse
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from tokenspeed.bench.gpu.setup import machine_name
from tokenspeed.bench.record import Record, surroundings, write
from tokenspeed.sol.floor import GPUS

CEILING_GBS = GPUS["H200"].read_gbs
GRAPH_US = 2000.0
"""A graph holds about as many repetitions as fill this time."""
REPLAYS = 5
Launch = Callable[[int], object]


class Case(NamedTuple):
    """bytes and flops that one launch must move and do. make() gives the launch of repetition i; rotating its inputs by
    i, so that they come from memory and not from L2, is its own matter."""

    name: str
    bytes: float
    flops: float
    make: Callable[[], Launch]


def microseconds(launch: Launch) -> float:
    """Device time of one launch, the median over replays of a graph."""
    launch(0)
    torch.cuda.synchronize()
    once = _replayed(launch, 4)
    return _replayed(launch, max(8, min(200, int(GRAPH_US / once))))


def _replayed(launch: Launch, repetitions: int) -> float:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(repetitions):
            launch(i)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times = []
    for _ in range(REPLAYS + 1):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / repetitions)
    return statistics.median(times[1:])


def print_table(cases: Iterable[Case]) -> list[tuple[Case, float]]:
    """One line per case as it is measured; the cases with their microseconds. A case that does not compile or fit says
    so and the table goes on."""
    timed = []
    print(f"{'us':>9} {'GB/s':>7} {'share':>6} {'TFLOP/s':>8}  case", flush=True)
    for case in cases:
        try:
            us = microseconds(case.make())
        except Exception as error:
            print(f"{'failed':>9} {'':7} {'':6} {'':8}  {case.name}: {type(error).__name__}: {error}", flush=True)
            continue
        timed.append((case, us))
        rate = case.bytes / us / 1e3
        print(f"{us:9.2f} {rate:7.0f} {rate / CEILING_GBS:6.1%} {case.flops / us / 1e6:8.1f}  {case.name}", flush=True)
    return timed


def write_timed(out: Path, table: str, timed: Iterable[tuple[str, float, float]]) -> None:
    """Records of a table's cases, in microseconds, from (name, bytes, us); the floor is that of their bytes."""
    around = surroundings(f"python -m tokenspeed.bench kernels {table}")
    records = []
    for name, nbytes, us in timed:
        floor = nbytes / CEILING_GBS / 1e3 or None
        share = floor / us if floor else None
        records.append(Record(id=case_id(table, name), value=us, unit="us", floor=floor, share=share, **around))
    write(out, records)


def case_id(table: str, name: str) -> str:
    """The id of a case: h200.kernels.attention.decode-8b-b-1-ctx-1024."""
    machine = machine_name("cuda" if torch.cuda.is_available() else "cpu")
    return f"{machine}.kernels.{table}.{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}"


def run_table(
    table: str, doc: str | None, cases: Iterable[Case], check: Callable[[], bool], arguments: Sequence[str] | None
) -> int:
    """A table's command: check, then measure what is asked for; 1 where the check fails."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with torch first")
    parser.add_argument("--out", type=Path, metavar="FILE", help="of records to add to")
    parser.add_argument("words", nargs="*", help="measure cases whose names have all of these")
    options = parser.parse_args(arguments)
    if options.check and not check():
        return 1
    timed = print_table(case for case in cases if all(word in case.name.split() for word in options.words))
    if options.out is not None:
        write_timed(options.out, table, [(case.name, case.bytes, us) for case, us in timed])
    return 0
