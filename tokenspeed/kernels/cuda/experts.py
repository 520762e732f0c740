"""The chosen experts of up to eight tokens of bf16 by weights of bf16 or e4m3, streamed: `experts.cu`."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache

import torch

from tokenspeed.kernels.cuda.program import Kernel, architecture, compiled, pointer, processors
from tokenspeed.kernels.cuda.stream_tiles import ACTS, BITS, FORMATS, PROGRAMS_PER_SM, SHARED, UNIT
from tokenspeed.kernels.triton.expert_operands import ExpertMatrix, Experts
from tokenspeed.kernels.triton.launch import device_index
from tokenspeed.quantization.fp8 import Fp8Weight

MOST_TOKENS = 8
MOST_CHOICES = 16
"""Of a token."""
PITCH_GAP = 64
"""Bytes between rows of x in shared memory, where there are several."""
LEAST_STAGES = 2
TAKEN = (FORMATS[torch.Tensor], FORMATS[Fp8Weight])
WARPS, SEGMENTS = (16, 8), (256, 128)
"""Of a program; bytes of a row of W in a stage of a warp's ring, the better first."""
NARROW_UP, NARROW_DOWN = ((8, 512), (8, 256), (8, 128)), ((16, 256), (8, 256), (8, 128))
"""Both of e4m3, the better first: 30B-A3B takes 18.2 / 34.8 / 59.1 us at 1 / 2 / 4 tokens by the first of gate and up,
19.5 / 36.2 / 61.2 by the second; of down the first is 0.5 us ahead, where it fits."""
SCALE_BYTES = 4 * UNIT


@dataclass(frozen=True)
class Variant:
    """What a kernel is compiled for: names of the definitions of `experts.cu`, in lower case."""

    rows: int
    choices: int
    k: int
    n: int
    format: int
    warps: int
    segment: int
    stages: int
    act: int

    @property
    def down(self) -> bool:
        return self.act == 0

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def stage(self) -> int:
        """Bytes of a warp's stage, with its barrier."""
        gap = PITCH_GAP if self.rows > 1 else 0
        x = self.rows * (self.segment * 16 // BITS[self.format] + gap) if self.down else 0
        scales = SCALE_BYTES if self.down and BITS[self.format] == 8 else 0
        return UNIT * self.segment + PITCH_GAP + x + scales + 8

    @property
    def shared(self) -> int:
        """Bytes of the source's Shared."""
        slots, gap = self.rows * self.choices, PITCH_GAP if self.rows > 1 else 0
        x = 16 if self.down else self.rows * (2 * self.k + gap)
        words = 2 * self.warps * self.rows * UNIT + slots * (4 + 2 * self.rows) + 2
        return x + -(-4 * words // 8) * 8 + self.warps * self.stages * self.stage

    def defines(self) -> dict[str, int]:
        """For the compiler."""
        return {name.upper(): value for name, value in asdict(self).items()} | {"SHARED": self.shared}


def variant(tokens: int, choices: int, columns: int, outputs: int, format: int, act: str) -> Variant | None:
    """The variant for weights of so many columns in a format of FORMATS, None where they do not fit its tiles. act:
    "none" for down; outputs: after the activation."""
    if not _fit(tokens, choices, columns, outputs, format, act):
        return None
    rows = 1 << (tokens - 1).bit_length()
    row_bytes = columns * BITS[format] // 8
    for warps, segment in _splits(format, row_bytes, choices if act == "none" else 0):
        found = Variant(rows, choices, columns, outputs, format, warps, segment, 0, ACTS[act])
        stages = (SHARED - found.shared) // (found.warps * found.stage)
        if stages >= LEAST_STAGES:
            return replace(found, stages=stages)
    return None


def _fit(tokens: int, choices: int, columns: int, outputs: int, format: int, act: str) -> bool:
    return (
        act in ACTS
        and format in TAKEN
        and tokens <= MOST_TOKENS
        and choices <= MOST_CHOICES
        and columns % 8 == 0
        and outputs % UNIT == 0
    )


def _splits(format: int, row_bytes: int, slots: int) -> Iterator[tuple[int, int]]:
    """Warps and segments, the better first: of bf16 those by which all warps of a unit have as much to do. slots: of a
    unit of down, 0 for gate and up."""
    tried: Sequence[tuple[int, int]] = NARROW_DOWN if slots else NARROW_UP
    if BITS[format] == 16:
        ways = [(warps, each) for each in SEGMENTS for warps in WARPS]
        tried = sorted(ways, key=lambda way: max(slots, 1) * row_bytes // way[1] % way[0] > 0)
    yield from (way for way in tried if row_bytes % way[1] == 0)


@cache
def kernel(found: Variant, device: int) -> Kernel:
    """Compiled and loaded."""
    cubin = compiled("experts", found.defines(), architecture(device))
    return Kernel(cubin, "experts", found.threads, found.shared)


def stream_experts(
    x: torch.Tensor,
    ids: torch.Tensor,
    shares: torch.Tensor,
    given: Experts,
    first: Variant | None = None,
    second: Variant | None = None,
) -> torch.Tensor | None:
    """`triton.experts.run_experts` of up to eight tokens, None where no variant takes them: [T, hidden] bf16. first,
    second: variants of gate and up, and of down. By e4m3 weights rows are not rounded to e4m3."""
    (tokens, hidden), k = x.shape, ids.shape[1]
    if (
        given.act not in ACTS
        or given.gate_up_bias is not None
        or not _streams(given.gate_up)
        or not _streams(given.down)
    ):
        return None
    ff, format = given.down.shape[2], FORMATS.get(type(given.down), 0)
    first = first or variant(tokens, k, hidden, ff, format, given.act)
    second = second or variant(tokens, k, ff, hidden, format, "none")
    if first is None or second is None or x.stride(1) != 1 or (x.stride(0) * 2) % 16 or x.data_ptr() % 16:
        return None
    between = torch.empty(tokens * k, ff, dtype=torch.bfloat16, device=x.device)
    _launch(first, x, ids, shares, given.gate_up, between, x.shape[0])
    y = torch.empty(tokens, hidden, dtype=torch.bfloat16, device=x.device)
    _launch(second, between, ids, shares, given.down, y, x.shape[0])
    return y


def _launch(
    found: Variant,
    x: torch.Tensor,
    ids: torch.Tensor,
    shares: torch.Tensor,
    weight: ExpertMatrix,
    y: torch.Tensor,
    tokens: int,
) -> None:
    matrix, scale = (weight, None) if isinstance(weight, torch.Tensor) else (weight.q, weight.scale)
    device, units = (
        device_index(x.device),
        found.n // UNIT if found.down else tokens * found.choices * found.n // (UNIT // 2),
    )
    kernel(found, device).launch(
        (min(units, PROGRAMS_PER_SM * processors(device)), 1, 1),
        [
            pointer(x),
            pointer(ids),
            pointer(shares),
            pointer(matrix),
            pointer(scale),
            pointer(y),
            (x.stride(0), ctypes.c_longlong),
            (tokens, ctypes.c_int),
        ],
    )


def _streams(weight: ExpertMatrix) -> bool:
    """Whether it is bf16, or e4m3 with a scale per row, contiguous."""
    if isinstance(weight, Fp8Weight):
        return not weight.scale_block and weight.q.is_contiguous() and weight.scale.is_contiguous()
    return isinstance(weight, torch.Tensor) and weight.dtype == torch.bfloat16 and weight.is_contiguous()
