"""y = f(x) W^T for one row of bf16 by weights of any type, x W^T for up to eight by bf16, streamed at the read ceiling:
bf16 by `stream.cu`, narrower weights by `stream_narrow.cu`."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import NamedTuple

import torch

from tokenspeed.kernels.cuda.program import Kernel, architecture, compiled, pointer, processors
from tokenspeed.kernels.triton.launch import device_index
from tokenspeed.kernels.triton.operands import Matrix, Prologue, Rows
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
SEGMENTS = (256, 128)
"""Bytes of a row of bf16 in a stage of a warp's ring (a layer of 8B: 98.5 us by 256, 102.6 by 512)."""
ODD_WARPS = (9, 7, 10, 6, 5)
"""For one long row that eight warps do not divide: 2880 columns of bf16 take nine."""
NARROW_WARPS, NARROW_STEPS = (8, 7, 9, 10, 6, 5, 4), (4, 8, 2, 6, 5, 3, 7, 1)
"""Of a program with narrow weights, and of a warp in a stage, the better first (a layer of 8B in int4: 8 warps 41.3 us,
16 41.6, 4 44.6; 4 and 8 steps 41.3, 2 steps 44.3)."""
LEAST_STAGES = 3
LONG_ROW, LONG_ROWS = 8192, 28672
"""Columns, and elements of all (padded) rows, from which on two programs share the columns of several rows. us a layer,
by one (or Triton where x does not fit) and by two: 1B at 2 rows 33.6 and 34.8, at 4 35.4 and 34.7, at 8 39.2 and 36.4,
8B at 2 rows 101.7 and 100.9, at 4 105.8 and 104.2. By four or eight a projection takes a fifth longer: too few of such
clusters find room side by side."""
SHORT_SHARED, SHORT_BYTES = 60 << 10, 100 << 10
"""Of a program that multiplies some units of so few bytes of narrow weights: what it leaves free the next kernel's
programs have (a layer of 8B with attention, us: int8 62.9 and 61.1, fp8 62.8 and 61.5 by 60 KiB for o and q, k, v)."""


class Way(NamedTuple):
    """programs: of a kernel per SM. shared: bytes of a program, of which two always fit: the next kernel's as well."""

    programs: int
    shared: int


_SMALLER = Way(PROGRAMS_PER_SM, 100 << 10)
WAYS = (Way(PROGRAMS_PER_SM, SHARED), _SMALLER, _SMALLER, _SMALLER, _SMALLER)
"""By format. A layer of 8B without attention, by one program, by two, and by two with 100 KiB: fp8 58.2, 60.2 and 59.5
us, int8 56.9, 59.6 and 59.2, int4 43.5, 41.3 and 40.8, MXFP4 50.8, 50.0 and 49.1; bf16 by one 108.9, by two 99.9. In
the whole step one program loses: fp8 2.588 ms, where rings for each warp of two programs took 2.473."""


@dataclass(frozen=True)
class Variant:
    """What a kernel is compiled for: names of the definitions of its source, in lower case. segment: bytes of a row in
    a stage, of a warp in `stream.cu`, of all warps that multiply in `stream_narrow.cu`."""

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
        x = 2 * self.rows * (self.k // self.cluster + (ROW_GAP if self.rows > 1 else 0))
        floats = 3 * self.warps
        if self.narrow:
            planes = _PLANES[self.format]
            x = planes * (self.k + PLANE_GAP) if planes else x
            floats += (self.k * BITS[self.format] // 8 // STEP if planes else 2) + 1
        else:
            floats += UNIT * self.rows * (2 * self.warps + self.cluster) + 2
        return x + -(-4 * floats // 8) * 8 + self.stages * self.stage

    @property
    def stage(self) -> int:
        """Bytes of a stage, of a program: with its barriers, and what else there is of each."""
        if not self.narrow:
            return self.warps * (UNIT * self.segment + 64 + 8)
        scales = self.segment // STEP * UNIT * _SCALES[self.format]
        return UNIT * self.segment + 64 + scales + 16 + 4 * self.warps * UNIT

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
) -> Variant | None:
    """The variant for rows of W of so many columns in a format of FORMATS, None where they do not fit its tiles. More
    than one row of x comes without prologue, and to bf16. half_scales: of int4, whether scales are float16."""
    branch = prologue is not None and prologue.branch is not None
    branch_norm = prologue is not None and prologue.branch_norm is not None
    if columns % 8 or rows > MOST_ROWS or (rows > 1 and BITS[format] != 16):
        return None
    padded, most = (
        1 << (rows - 1).bit_length(),
        MOST_COLUMNS["bare" if prologue is None else "branch" if branch else "norm"],
    )
    shared = rows > 1 and columns >= LONG_ROW and padded * columns >= LONG_ROWS
    for cluster in (2, 1) if shared else (1,):
        for warps, segment, least in _splits(format, columns * BITS[format] // 8 // cluster, rows, cluster):
            found = Variant(
                padded, columns, format, warps, segment, 0, ACTS[act], prologue is not None, branch, branch_norm, bias,
                int(half_scales), cluster,
            )  # fmt: skip
            stages = (WAYS[format].shared - found.shared) // found.stage
            if stages >= least and columns <= min(warps, 8) * most // 8:
                return replace(found, stages=stages)
    return None


def _splits(format: int, row_bytes: int, rows: int, cluster: int) -> Iterator[tuple[int, int, int]]:
    """Warps, segments and the fewest stages to try, the better first: those that divide a row."""
    if BITS[format] == 16:
        warps = 16 if row_bytes <= SHORT_ROW else 8
        segments = SEGMENTS if rows == 1 else (SEVERAL_SEGMENT,)
        tried = [(warps, each, LEAST_STAGES - (each == segments[-1])) for each in segments]
        if row_bytes > SHORT_ROW and (rows == 1 or cluster > 1):
            tried += [(odd, each, LEAST_STAGES - (each == segments[-1])) for each in segments for odd in ODD_WARPS]
        yield from (each for each in tried if row_bytes % (each[0] * each[1]) == 0)
    else:
        tried = [(warps, STEP * warps * steps, LEAST_STAGES) for warps in NARROW_WARPS for steps in NARROW_STEPS]
        yield from (each for each in tried if row_bytes % each[1] == 0)


@cache
def kernel(found: Variant, device: int) -> Kernel:
    """Compiled and loaded."""
    cubin = compiled(found.source, found.defines(), architecture(device))
    return Kernel(cubin, "stream", found.threads, found.shared, found.cluster)


def stream(
    x: torch.Tensor,
    weight: Matrix,
    bias: torch.Tensor | None = None,
    act: str = "none",
    prologue: Prologue | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """`triton.linear.project` of one row of bf16, None where no variant takes it. Taken are Fp8Weights with a scale per
    row and Int4Weights in groups of 128 with scales of 16 bits and without zero points."""
    return _stream(x, weight, bias, act, prologue)


def stream_rows(x: Rows, weight: Matrix, bias: torch.Tensor | None = None, act: str = "none") -> torch.Tensor | None:
    """`triton.linear.skinny` of up to eight prepared rows of bf16; None where no variant takes them."""
    found = _stream(x.values, weight, bias, act, None)
    return None if found is None else found[0]


def _stream(
    x: torch.Tensor, weight: Matrix, bias: torch.Tensor | None, act: str, prologue: Prologue | None
) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    matrix, scale = (weight, None) if isinstance(weight, torch.Tensor) else (weight.q, weight.scale)
    half = isinstance(weight, Int4Weight) and weight.scale.dtype == torch.float16
    found = variant(x.shape[1], FORMATS.get(type(weight), 0), act, prologue, bias is not None, x.shape[0], half)
    branch = prologue.branch if prologue else None
    branch_norm = prologue.branch_norm if prologue else None
    if found is None or not _streams(weight, act) or not aligned(x, branch, matrix):
        return None
    n = matrix.shape[0] if act == "none" else matrix.shape[0] // 2
    y = torch.empty(x.shape[0], n, dtype=torch.bfloat16, device=x.device)
    joined = None if branch is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    device = device_index(x.device)
    units = -(-n // (UNIT if act == "none" else UNIT // 2))
    together = min(units, WAYS[found.format].programs * processors(device) // found.cluster)
    kernel(found.holding(-(-units // together)), device).launch(
        (together * found.cluster, 1, 1),
        [
            pointer(x),
            pointer(branch),
            pointer(matrix),
            pointer(scale),
            pointer(bias),
            pointer(prologue.norm.weight if prologue else None),
            pointer(branch_norm.weight if branch_norm else None),
            pointer(y),
            pointer(joined),
            (x.stride(0), ctypes.c_longlong),
            (matrix.stride(0) * matrix.element_size(), ctypes.c_longlong),
            (x.shape[0], ctypes.c_int),
            (n, ctypes.c_int),
            (prologue.norm.eps if prologue else 0.0, ctypes.c_float),
            (branch_norm.eps if branch_norm else 0.0, ctypes.c_float),
        ],
    )
    return y, joined


def _streams(weight: Matrix, act: str) -> bool:
    """Whether its scales and zero points are such as the kernel takes, which reads groups' scales for two rows."""
    if isinstance(weight, Fp8Weight):
        return not weight.scale_block
    if isinstance(weight, Int4Weight | Mxfp4Weight):
        other = isinstance(weight, Int4Weight) and not _is_taken(weight)
        return not other and weight.shape[0] % (2 if act == "none" else 4) == 0
    return True


def _is_taken(weight: Int4Weight) -> bool:
    """Groups of 128 with scales of 16 bits and without zero points."""
    return weight.zero is None and weight.per_run == 1 and weight.scale.itemsize == 2


def aligned(*matrices: torch.Tensor | None) -> bool:
    """Whether all rows begin at multiples of 16 bytes, as copies and vector loads want."""
    given = [matrix for matrix in matrices if matrix is not None]
    apart = [each for matrix in given for each in (matrix.data_ptr(), matrix.stride(0) * matrix.element_size())]
    return all(matrix.stride(1) == 1 for matrix in given) and not any(each % 16 for each in apart)
