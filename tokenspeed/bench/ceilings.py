"""Measures what this machine can do at most: reading memory, and bf16 matrix products."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from tokenspeed.observability.ceilings import Ceilings, processor, usable_threads, write_ceilings

READ_BYTES = 512 * 2**20
"""Read per pass: many times any last-level cache."""
PASSES = 7
MATRIX = 1024


def measure_cpu() -> Ceilings:
    """Measure this machine's CPU with every thread it may use, and cache the result. About two seconds."""
    threads = usable_threads()
    ceilings = Ceilings(processor(), measure_read_gbs(threads), measure_bf16_tflops(threads), threads=threads)
    write_ceilings(ceilings)
    return ceilings


def measure_read_gbs(threads: int) -> float:
    """GB/s of reading a large array once with so many threads: the best of several passes, over the readers torch
    has."""
    with torch_threads(threads):
        matrix = torch.ones(READ_BYTES // 4096 // 4, 4096)
        vector, out = torch.ones(4096), torch.empty(matrix.shape[0])
        integers = matrix.view(torch.int32)
        readers: tuple[Callable[[], object], ...] = (
            lambda: torch.mv(matrix, vector, out=out),
            lambda: torch.sum(matrix),
            lambda: torch.amax(integers),
        )
        seconds = min(_best(reader) for reader in readers)
    return READ_BYTES / seconds / 1e9


def measure_bf16_tflops(threads: int) -> float:
    """TFLOP/s of a bf16 matrix product of 1024^3 with so many threads, best of several."""
    with torch_threads(threads):
        a = torch.randn(MATRIX, MATRIX).bfloat16()
        b = torch.randn(MATRIX, MATRIX).bfloat16()
        return 2 * MATRIX**3 / _best(lambda: a @ b) / 1e12


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Let torch compute with so many threads, and then with as many as before: the CPU backend leaves it one."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _best(run: Callable[[], object]) -> float:
    run()
    times = []
    for _ in range(PASSES):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)
