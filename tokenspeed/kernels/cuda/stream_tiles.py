"""How `stream.cu` and `stream_narrow.cu` divide rows of W among warps and stages: what they are compiled for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import torch

from tokenspeed.kernels.triton.operands import Prologue
from tokenspeed.quantization.fp8 import Fp8Weight
from tokenspeed.quantization.int4 import Int4Weight
from tokenspeed.quantization.int8 import Int8Weight
from tokenspeed.quantization.mxfp4 import Mxfp4Weight

FORMATS: dict[type, int] = {torch.Tensor: 0, Fp8Weight: 1, Int8Weight: 2, Int4Weight: 3, Mxfp4Weight: 4}
"""By the type of a weight, as `row.cuh` counts them."""
BITS = (16, 8, 8, 4, 4)
_SCALES = (0, 0, 0, 2, 4)
"""Bytes of the scales that lie in the ring, of a row and 64 bytes of it."""
_PLANES = (0, 0, 2, 2, 0)
"""Of bytes in which x is multiplied by a format's codes as integers."""
ACTS = {"none": 0, "silu": 1, "gelu_tanh": 2}
UNIT = 8
STEP = 64
"""Bytes of a row that a warp multiplies at a time."""
PROGRAMS_PER_SM = 2
SHARED = 113 << 10
"""Bytes of a program, so that two fit the 228 KiB of an SM."""
ALONE = 227 << 10
"""Bytes of a program that has an SM for itself."""
SHORT_ROW = 4096
"""Bytes. Rows of bf16 up to here are split among 16 warps, longer ones among 8 (a layer of 1B: 32.8 against 34.3 us,
of 8B: 103.4 and 102.0)."""
MOST_ROWS = 8
ROW_GAP = 32
"""Elements between rows of x in shared memory."""
SEVERAL_SEGMENT = 256
"""Of several rows, which take their part of a program's memory: with 128 bytes the Triton kernel wins."""
PLANE_GAP = 64
"""Bytes between planes of x's bytes."""
MOST_COLUMNS = {"bare": 16384, "norm": 12288, "branch": 8192}
"""Beyond, x does not fit the registers that two programs have: a warp takes an eighth of these at most."""
MOST_QUANTIZED = 32768
"""Elements of rows of bf16, that a program has in registers while it finds their scales, for the same reason."""
MOST_OF_EIGHT = 1 << 24
"""Elements of e4m3 weights below which more than four rows stream. A layer's projections of 8B, whose every weight is
larger, take 69.4 us by Triton and 70.5 streamed at 8 rows (68.9 and 68.2 at 4, 68.3 and 62.6 at 2); qkv and o of
Qwen3-30B-A3B 18.7 and 12.0 at 8 rows, 18.1 and 10.0 at 4, 18.1 and 10.8 at 2 (`bench.gpu.chain`, `stream_splits`)."""
SEGMENTS = (256, 128)
"""Bytes of a row of bf16 in a stage of a warp's ring (a layer of 8B: 98.5 us by 256, 102.6 by 512)."""
ODD_WARPS, ODD_SEGMENTS = (9, 7, 10, 6, 5), (256, 576, 128)
"""For one long row that eight warps do not divide: 2880 columns of bf16 take five and 576 bytes (us, of gpt-oss-20b's
201,088 and 5,120 rows: 257.9 and 8.7; three and 384 bytes 255.8 and 10.2, fifteen and 384 264.3 and 8.3, nine and 128
331.8 and 11.1; Triton 282.6 and 17.8)."""
SEVERAL_ODD = (6, 320)
"""The same for several rows, of the same weights at eight: 270.4 and 9.6; five and 576 bytes 268.4 and 10.6, nine and
128 315.3 and 11.2; Triton 266.9 and 17.7."""
NARROW_WARPS, NARROW_STEPS = (8, 7, 9, 10, 6, 5, 4), (4, 8, 2, 6, 5, 3, 7, 1)
"""Of a program with narrow weights, and of a warp in a stage, the better first (a layer of 8B in int4: 8 warps 41.3 us,
16 41.6, 4 44.6; 4 and 8 steps 41.3, 2 steps 44.3)."""
LEAST_STAGES = 3
LONG_ROW, LONG_ROWS = 8192, 28672
"""Columns, and elements of all (padded) rows, from which on two programs share the columns of several rows. us a layer,
by one (or Triton where x does not fit) and by two: 1B at 2 rows 33.6 and 34.8, at 4 35.4 and 34.7, at 8 39.2 and 36.4,
8B at 2 rows 101.7 and 100.9, at 4 105.8 and 104.2. By four or eight a projection takes a fifth longer: too few of such
clusters find room side by side. Shorter rows with as many elements (eight of 4,096) are shared, too, but for gate and
up; those, and what two programs have no room for (eight of 14,336), have a processor for themselves. A layer of 8B at 8
rows: 108.2 us before, 105.2 so; its head 262 and 235 (with 8 warps and 512 bytes 288); a layer of Qwen3-14B 240.7 by
Triton, 202.2 so."""
ALONE_WARPS, SHARED_WARPS = (16, 14, 12, 10, 8, 7), (16, 14, 10)
"""Of a program of several rows of bf16 that has a processor for itself, or shares short rows."""
SHORT_SHARED, SHORT_BYTES = 60 << 10, 100 << 10
"""Of a program that multiplies some units of so few bytes of narrow weights: what it leaves free the next kernel's
programs have (a layer of 8B with attention, us: int8 62.9 and 61.1, fp8 62.8 and 61.5 by 60 KiB for o and q, k, v)."""


class Split(NamedTuple):
    """Of a row of W. segment: as a Variant's. least: stages, else another one is taken."""

    warps: int
    segment: int
    least: int


_SMALLER = 100 << 10
MOST_SHARED = (SHARED, _SMALLER, _SMALLER, _SMALLER, _SMALLER)
"""Bytes of a program, by format: two always fit, the next kernel's as well. A layer of 8B without attention, by one
program, by two, and by two with 100 KiB: fp8 58.2, 60.2 and 59.5 us, int8 56.9, 59.6 and 59.2, int4 43.5, 41.3 and
40.8, MXFP4 50.8, 50.0 and 49.1; bf16 by one 108.9, by two 99.9. In the whole step one program loses: fp8 2.588 ms,
where rings for each warp of two programs took 2.473."""


@dataclass(frozen=True)
class Variant:
    """What a kernel is compiled for: names of the definitions of its source, in lower case. segment: bytes of a row in
    a stage, of a warp in `stream.cu`, of all warps that multiply in `stream_narrow.cu`. wide: whether several rows of
    e4m3 are held as float16. quantize: whether they come as bf16. programs: on an SM."""

    rows: int
    k: int
    format: int
    warps: int
    segment: int
    stages: int
    act: int
    norm: int
    branch: int
    branch_norm: int
    bias: int
    half_scales: int = 0
    cluster: int = 1
    wide: int = 1
    quantize: int = 0
    programs: int = PROGRAMS_PER_SM

    @property
    def narrow(self) -> bool:
        return BITS[self.format] < 16

    @property
    def source(self) -> str:
        """The file, without its ending."""
        return "stream_narrow" if self.narrow else "stream"

    @property
    def threads(self) -> int:
        """Of a program: one warp more fills a ring that all share."""
        return 32 * (self.warps + self.narrow)

    @property
    def shared(self) -> int:
        """Bytes of the source's Shared."""
        x = 2 * self.rows * (self.k // self.cluster + (ROW_GAP if self.rows > 1 and not self.narrow else 0))
        floats = 3 * self.warps
        if self.narrow:
            planes = _PLANES[self.format]
            x = planes * (self.k + PLANE_GAP) if planes else x if self.wide else self.rows * (self.k // 128 * 128 + 64)
            floats += (self.k * BITS[self.format] // 8 // STEP if planes else 2) + self.rows
        else:
            floats += UNIT * self.rows * (2 * self.warps + self.cluster) + 2
        return x + -(-4 * floats // 8) * 8 + self.stages * self.stage

    @property
    def stage(self) -> int:
        """Bytes of a stage, of a program: with its barriers, and what else there is of each."""
        if not self.narrow:
            return self.warps * (UNIT * self.segment + 64 + 8)
        scales = self.segment // STEP * UNIT * _SCALES[self.format]
        return UNIT * self.segment + 64 + scales + 16 + 4 * self.warps * UNIT * self.rows

    def holding(self, units: int) -> Variant:
        """The same with no more stages than so many units of a program fill, or than a short program is better with."""
        row_bytes, most = self.k * BITS[self.format] // 8, self.stages
        if self.narrow and 1 < units <= SHORT_BYTES // (UNIT * row_bytes):
            most = min(most, (SHORT_SHARED - replace(self, stages=0).shared) // self.stage)
        segments = row_bytes // (self.segment * self.cluster * (1 if self.narrow else self.warps))
        return replace(self, stages=min(max(most, LEAST_STAGES), self.stages, units * segments))

    def defines(self) -> dict[str, int]:
        """For the compiler."""
        return {name.upper(): int(value) for name, value in asdict(self).items()} | {"SHARED": self.shared}


def variant(
    columns: int,
    format: int,
    act: str,
    prologue: Prologue | None,
    bias: bool,
    rows: int = 1,
    half_scales: bool = False,
    quantize: bool = False,
) -> Variant | None:
    """The variant for rows of W of so many columns in a format of FORMATS, None where they do not fit its tiles. More
    than one row of x comes without prologue, and to bf16 or e4m3. half_scales: of int4, whether scales are float16.
    quantize: whether several rows are bf16 by e4m3."""
    if not _taken(columns, format, rows):
        return None
    bare = _bare(columns, format, act, prologue, bias, rows, half_scales, quantize)
    for cluster, programs in _ways(bare):
        way = replace(bare, cluster=cluster, programs=programs)
        for split in _splits(way):
            found = _fitting(way, split)
            if found is not None:
                return found
    return None


def candidates(
    columns: int, format: int, act: str, prologue: Prologue | None, bias: bool, rows: int = 1, quantize: bool = False
) -> Iterator[Variant]:
    """Every variant that fits, whether or not `variant` would take it: to be timed."""
    if not _taken(columns, format, rows):
        return
    bare = _bare(columns, format, act, prologue, bias, rows, False, quantize)
    long = rows > 1 and columns >= LONG_ROW
    shared = [replace(bare, cluster=2)] if long and not bare.narrow else []
    alone = [replace(each, programs=1) for each in (bare, *shared)] if long else []
    held = [replace(each, wide=1) for each in (bare, *alone)] if rows > 1 and bare.narrow else []
    for each in (bare, *shared, *alone, *held):
        row_bytes = columns * BITS[format] // 8 // each.cluster
        for warps in range(3, 17):
            least = STEP * warps if bare.narrow else 2 * STEP
            most = row_bytes if bare.narrow else row_bytes // warps
            for segment in range(least, most + 1, least if bare.narrow else STEP):
                found = _fitting(each, Split(warps, segment, LEAST_STAGES - 1))
                if row_bytes % (segment if bare.narrow else segment * warps) == 0 and found is not None:
                    yield found


def _taken(columns: int, format: int, rows: int) -> bool:
    several = rows == 1 or format in (FORMATS[torch.Tensor], FORMATS[Fp8Weight])
    return columns % 8 == 0 and rows <= MOST_ROWS and several


def _bare(
    columns: int,
    format: int,
    act: str,
    prologue: Prologue | None,
    bias: bool,
    rows: int,
    half_scales: bool,
    quantize: bool,
) -> Variant:
    """How a row is divided is still open."""
    branch = prologue is not None and prologue.branch is not None
    branch_norm = prologue is not None and prologue.branch_norm is not None
    padded, normed = 1 << (rows - 1).bit_length(), prologue is not None
    return Variant(
        padded, columns, format, 0, 0, 0, ACTS[act], normed, branch, branch_norm, bias, int(half_scales),
        wide=int(rows == 1 or BITS[format] == 16), quantize=int(quantize),
    )  # fmt: skip


def _fitting(bare: Variant, split: Split) -> Variant | None:
    """With as many stages as fit, None where those are too few, or where x does not fit registers."""
    found = replace(bare, warps=split.warps, segment=split.segment)
    most = MOST_COLUMNS["branch" if bare.branch else "norm" if bare.norm else "bare"]
    stages = ((MOST_SHARED[bare.format] if bare.programs > 1 else ALONE) - found.shared) // found.stage
    if stages < split.least or bare.k > min(split.warps, 8) * most // 8:
        return None
    if bare.quantize and (split.warps % bare.rows or bare.rows * bare.k > MOST_QUANTIZED * min(split.warps, 8) // 8):
        return None
    return replace(found, stages=stages)


def _ways(bare: Variant) -> tuple[tuple[int, int], ...]:
    """Programs of a cluster, and on a processor, to try, the better first."""
    if bare.narrow or bare.rows == 1 or bare.rows * bare.k < LONG_ROWS:
        return ((1, PROGRAMS_PER_SM),)
    if bare.k >= LONG_ROW:
        return ((2, PROGRAMS_PER_SM), (2, 1), (1, PROGRAMS_PER_SM))
    return ((1, 1) if bare.act else (2, PROGRAMS_PER_SM), (1, PROGRAMS_PER_SM))


def _splits(way: Variant) -> Iterator[Split]:
    """To try, the better first: those that divide a row."""
    row_bytes = way.k * BITS[way.format] // 8 // way.cluster
    if way.narrow:
        tried = [Split(warps, STEP * warps * steps, LEAST_STAGES) for warps in NARROW_WARPS for steps in NARROW_STEPS]
        yield from (each for each in tried if row_bytes % each.segment == 0)
    else:
        yield from (each for each in _wide_splits(way, row_bytes) if row_bytes % (each.warps * each.segment) == 0)


def _wide_splits(way: Variant, row_bytes: int) -> list[Split]:
    if way.programs == 1:
        return [Split(warps, SEVERAL_SEGMENT, LEAST_STAGES) for warps in ALONE_WARPS]
    if way.cluster > 1 and way.k < LONG_ROW:
        return [Split(warps, SEVERAL_SEGMENT, LEAST_STAGES - 1) for warps in SHARED_WARPS]
    warps = 16 if row_bytes <= SHORT_ROW else 8
    segments = SEGMENTS if way.rows == 1 else (SEVERAL_SEGMENT,)
    tried = [Split(warps, each, LEAST_STAGES - (each == segments[-1])) for each in segments]
    if row_bytes > SHORT_ROW:
        odd_segments = ODD_SEGMENTS if way.rows == 1 else segments if way.cluster > 1 else ()
        last = segments[-1]
        tried += [Split(odd, each, LEAST_STAGES - (each == last)) for each in odd_segments for odd in ODD_WARPS]
        tried += [Split(*SEVERAL_ODD, LEAST_STAGES)] if way.rows > 1 and way.cluster == 1 else []
    return tried
