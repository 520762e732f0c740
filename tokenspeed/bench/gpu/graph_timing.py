"""Times a launch on a GPU inside a CUDA graph of many repetitions, and prints it against the read ceiling."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

CEILING_GBS = 4600.0
"""Read-only stream of an H200, measured."""
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


def print_table(cases: Iterable[Case]) -> None:
    """One line per case as it is measured. A case that does not compile or fit says so and the table goes on."""
    print(f"{'us':>9} {'GB/s':>7} {'share':>6} {'TFLOP/s':>8}  case", flush=True)
    for case in cases:
        try:
            us = microseconds(case.make())
        except Exception as error:
            print(f"{'failed':>9} {'':7} {'':6} {'':8}  {case.name}: {type(error).__name__}: {error}", flush=True)
            continue
        rate = case.bytes / us / 1e3
        print(f"{us:9.2f} {rate:7.0f} {rate / CEILING_GBS:6.1%} {case.flops / us / 1e6:8.1f}  {case.name}", flush=True)
