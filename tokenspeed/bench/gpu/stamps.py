"""Times told by the device itself: a tiny kernel writes its clock into a ring, at the ends of steps or between ops."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import gcd
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

from tokenspeed.bench.gpu.bare import executor_of
from tokenspeed.engine.llm import LLM
from tokenspeed.kernels.triton.step import StepInputs
from tokenspeed.runner.gpu.link import TritonSteps

RING = 4096
"""Steps that are kept."""
FIRST, LAST = 0, 1


@triton.jit
def stamp_kernel(ring: tl.tensor, count: tl.tensor, RING: tl.constexpr, LAST: tl.constexpr) -> None:
    """ring int64 [2, RING]: the clock in ns at the start (0) or the end (1) of step `count`, which ends with the
    latter."""
    number = tl.load(count)
    tl.store(ring + LAST * RING + number % RING, globaltimer())
    if LAST:
        tl.store(count, number + 1)


class Ring:
    """Stamps of steps: int64 [2, RING] nanoseconds of the device's clock, and how many steps ended."""

    def __init__(self, device: torch.device) -> None:
        self._times = torch.zeros(2, RING, dtype=torch.int64, device=device)
        self._count = torch.zeros(1, dtype=torch.int32, device=device)

    def stamp(self, which: int) -> None:
        """Note the time after all work given so far: FIRST or LAST of a step."""
        stamp_kernel[(1,)](self._times, self._count, RING=RING, LAST=which, num_warps=1)

    def clear(self) -> None:
        """Begin anew."""
        self._count.zero_()

    def read(self) -> tuple[list[int], list[int]]:
        """Starts and ends of the steps since `clear`, in order. Raises RuntimeError where they did not fit."""
        count = int(self._count.item())
        if count > RING:
            raise RuntimeError(f"{count} steps since the ring was cleared, it holds {RING}")
        starts, ends = self._times[:, :count].tolist()
        return starts, ends


class StampedSteps(TritonSteps):
    """The kernels around the forward pass, with a stamp before the first and one after the last."""

    def __init__(self, kernels: TritonSteps, ring: Ring) -> None:
        self._inner, self._ring = kernels, ring

    def prepare(self, *args: Any, **options: Any) -> StepInputs:
        self._ring.stamp(FIRST)
        return self._inner.prepare(*args, **options)

    def finish(self, *args: Any, **options: Any) -> None:
        self._inner.finish(*args, **options)
        self._ring.stamp(LAST)

    def items(self, *args: Any) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        return self._inner.items(*args)


@contextmanager
def stamped(llm: LLM) -> Iterator[Ring]:
    """Inside, the engine's steps are stamped; they are captured anew, and once more after. The engine has to be idle.
    Raises UnsupportedError where it has no graphs."""
    executor = executor_of(llm)
    ring = Ring(executor.device)
    plain: list[TritonSteps] = []

    def wrap(kernels: TritonSteps) -> TritonSteps:
        plain.append(kernels)
        return StampedSteps(kernels, ring)

    executor.wrap_kernels(wrap)
    try:
        yield ring
    finally:
        executor.wrap_kernels(lambda kernels: plain[0])


def gaps_us(starts: Sequence[int], ends: Sequence[int], steps: int) -> list[float]:
    """Microseconds between the end of a step and the start of the next, for the last `steps` gaps. Raises RuntimeError
    where there are fewer."""
    gaps = [(start - end) / 1e3 for end, start in zip(ends, starts[1:], strict=False)]
    if len(gaps) < steps:
        raise RuntimeError(f"{len(gaps)} gaps between steps, {steps} are wanted")
    return gaps[-steps:]


def clock_ns(starts: Sequence[int], ends: Sequence[int]) -> int:
    """The device clock's resolution, as far as the stamps tell: the greatest step that all differences share."""
    times = [*starts, *ends]
    return gcd(*(time - times[0] for time in times[1:]))
