"""What a card can do at most, measured: reading memory, and matrix products in bf16 and fp8."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import torch
import triton
import triton.language as tl

from tokenspeed.observability.ceilings import Ceilings, read_ceilings
from tokenspeed.sol.floor import GPUS

READ_BYTES = 4 * 2**30
SHAPES = ((8, 2048, 4, 4), (16, 2048, 4, 4), (4, 4096, 8, 4), (8, 4096, 8, 3), (16, 1024, 4, 4), (2, 8192, 8, 4))
"""Programs per multiprocessor, words of a tile, warps, stages."""
PASSES = 5
MATRIX = 8192


@triton.jit
def _read(words: tl.tensor, out: tl.tensor, count: tl.tensor, BLOCK: tl.constexpr, STAGES: tl.constexpr) -> None:
    """Sum of every tile of a program; count is a multiple of BLOCK, and fits 32 bits."""
    total = tl.zeros([BLOCK], tl.int32)
    at = tl.arange(0, BLOCK)
    for tile in tl.range(tl.program_id(0), count // BLOCK, tl.num_programs(0), num_stages=STAGES):
        total += tl.load(words + tile * BLOCK + at, eviction_policy="evict_first")
    tl.store(out + tl.program_id(0), tl.sum(total, 0))


def read_sum(words: torch.Tensor, programs: int, block: int, warps: int, stages: int) -> torch.Tensor:
    """Sums of what each program has read of int32 [n], int32 [programs]; n is a multiple of `block`."""
    out = torch.empty(programs, dtype=torch.int32, device=words.device)
    _read[(programs,)](words, out, words.numel(), BLOCK=block, STAGES=stages, num_warps=warps)
    return out


def measure_read_gbs(nbytes: int = READ_BYTES) -> float:
    """GB/s of reading once, the best pass of the best shape of kernel."""
    words = torch.ones(nbytes // 4, dtype=torch.int32, device="cuda")
    processors = torch.cuda.get_device_properties(words.device).multi_processor_count
    runs: Iterator[Callable[[], object]] = (
        lambda each=each: read_sum(words, each[0] * processors, *each[1:])  # type: ignore[misc]
        for each in SHAPES
    )
    return nbytes / min(_best_ms(run) for run in runs) / 1e6


def measure_tflops(fp8: bool) -> float:
    """TFLOP/s of a library product of 8192 cubed, the best of some passes."""
    a = torch.randn(MATRIX, MATRIX, device="cuda").bfloat16()
    b = torch.randn(MATRIX, MATRIX, device="cuda").bfloat16()
    run: Callable[[], object] = lambda: a @ b.t()  # noqa: E731
    if fp8:
        x, w = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
        ones = torch.ones(MATRIX, 1, device="cuda")
        run = lambda: torch._scaled_mm(  # noqa: E731
            x, w.t(), scale_a=ones, scale_b=ones.t(), out_dtype=torch.bfloat16, use_fast_accum=True
        )
    return 2 * MATRIX**3 / _best_ms(run) / 1e9


def _best_ms(run: Callable[[], object]) -> float:
    run()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times = []
    for _ in range(PASSES):
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return min(times)


@cache
def measured() -> Ceilings:
    """Of the current card, measured once per process; about two seconds."""
    found = Ceilings(torch.cuda.get_device_name(), measure_read_gbs(), measure_tflops(False), measure_tflops(True))
    torch.cuda.empty_cache()
    return found


def ceilings_of(device: str) -> Ceilings | None:
    """What floors are made of: of a card, the better of what is measured now and what is known of it; of the CPU, what
    `doctor --measure` found, if anything."""
    if device == "cpu":
        return read_ceilings()
    now = measured()
    known = next((each for each in GPUS.values() if each.machine == now.machine), now)
    return better(now, known)


def better(now: Ceilings, known: Ceilings) -> Ceilings:
    """The larger of both in everything."""
    return Ceilings(
        now.machine,
        max(now.read_gbs, known.read_gbs),
        max(now.bf16_tflops, known.bf16_tflops),
        max(now.fp8_tflops, known.fp8_tflops),
    )
