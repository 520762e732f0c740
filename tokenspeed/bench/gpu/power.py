"""What parts of a decode step draw when they last: `python -m tokenspeed.bench.gpu.power`.

Each part is repeated for about a second, over weights and pages that no cache holds: microseconds, watts of the card,
its clock, and millijoules. A card that reaches its power limit lowers its clock, so what takes less energy is then
faster, whatever it takes when it runs for a moment.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import mean
from typing import NamedTuple, Protocol

import torch

from tokenspeed.bench.gpu import chain
from tokenspeed.bench.gpu.attend import LAYERS, MODELS, Attend, by_one, split
from tokenspeed.bench.gpu.ceilings import READ_BYTES, SHAPES, read_sum
from tokenspeed.bench.gpu.paged_steps import PagedStep, paged_step
from tokenspeed.kernels.triton.operands import Norm
from tokenspeed.ops.rope import Rope

SECONDS, READINGS = 1.0, 10
CONTEXT, PAGE = 1100, 64
ROWS = (1, 8, 32, 128)
_SM_CLOCK = 1
Work = Callable[[], object]


class Draw(NamedTuple):
    """Of one repetition, when it lasts."""

    us: float
    watts: float
    mhz: float
    mj: float


class Meter(Protocol):
    """What tells how much a card has drawn."""

    def joules(self) -> float:
        """Since some moment."""
        ...

    def mhz(self) -> float:
        """The clock of its processors now."""
        ...


class Nvml:
    """The driver's own meter of the first card. Raises OSError where there is none."""

    def __init__(self) -> None:
        self._library, self._card = ctypes.CDLL("libnvidia-ml.so.1"), ctypes.c_void_p()
        self._call("nvmlInit_v2")
        self._call("nvmlDeviceGetHandleByIndex_v2", 0, ctypes.byref(self._card))

    def joules(self) -> float:
        """By the card's counter of millijoules."""
        found = ctypes.c_ulonglong()
        self._call("nvmlDeviceGetTotalEnergyConsumption", self._card, ctypes.byref(found))
        return found.value / 1e3

    def mhz(self) -> float:
        """As the driver reports it."""
        found = ctypes.c_uint()
        self._call("nvmlDeviceGetClockInfo", self._card, _SM_CLOCK, ctypes.byref(found))
        return float(found.value)

    def _call(self, name: str, *arguments: object) -> None:
        if status := getattr(self._library, name)(*arguments):
            raise OSError(f"{name} failed with {status}")


def drawn(run: Work, wait: Work, meter: Meter, count: float, seconds: float = SECONDS) -> Draw:
    """Of a part that `run` does `count` times: half of the time to warm up, then for so many seconds."""
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds / 2:
        run()
        wait()
    clocks: list[float] = []
    runs = 0
    joules, begin = meter.joules(), time.perf_counter()
    while (lasted := time.perf_counter() - begin) < seconds or not runs:
        while time.perf_counter() - begin < seconds * (len(clocks) + 1) / READINGS or not runs:
            run()
            runs += 1
            wait()
        clocks.append(meter.mhz())
    joules = meter.joules() - joules
    return Draw(lasted / runs / count * 1e6, joules / lasted, mean(clocks), joules / runs / count * 1e3)


def parts() -> Iterator[tuple[str, float, Work]]:
    """Name, how often a run does it, the run."""
    words = torch.randint(-(2**31), 2**31 - 1, (READ_BYTES // 4,), dtype=torch.int32, device="cuda")
    programs = SHAPES[0][0] * torch.cuda.get_device_properties(0).multi_processor_count
    for name, given in (("random words", words), ("equal words", torch.ones_like(words))):
        yield f"reading a GB of {name}", READ_BYTES / 1e9, partial(read_sum, given, programs, *SHAPES[0][1:])
    del words, given
    for format in ("bf16", "fp8"):
        made = chain.layers("8b", format == "fp8")
        norm = Norm(torch.ones(4096, device="cuda"), 1e-5)
        for rows in ROWS:
            x, branch = torch.randn(2, rows, 4096, device="cuda").bfloat16()
            yield (
                f"8B {format}, a layer's projections, {rows} rows",
                len(made),
                partial(chain.run, made, chain.streamed, norm, x, branch),
            )
        del made
    _, heads = MODELS["8b"]
    attention = by_one(heads, Rope(5e5, heads.head_dim), longest=CONTEXT)
    for batch in ROWS[1:]:
        step = paged_step([(CONTEXT, 1)] * batch, heads, PAGE, layers=LAYERS)
        run = partial(_attend, attention, split(torch.randn(batch, 6144, device="cuda").bfloat16(), heads), step)
        yield f"8B, a layer's attention, {batch} sequences of {CONTEXT} tokens", LAYERS, run


def _attend(attention: Attend, qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor], step: PagedStep) -> None:
    for layer in range(LAYERS):
        attention(*qkv, step.layer(layer))


def captured(run: Work, repeats: int) -> Work:
    """A graph of so many runs."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            run()
    return graph.replay


def main() -> int:
    """All parts on the first card."""
    meter, repeats = Nvml(), 8
    for name, count, run in parts():
        found = drawn(captured(run, repeats), torch.cuda.synchronize, meter, count * repeats)
        print(f"{name}: {found.us:.1f} us, {found.watts:.0f} W, {found.mhz:.0f} MHz, {found.mj:.1f} mJ", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
