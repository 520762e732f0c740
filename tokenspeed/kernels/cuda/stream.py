"""y = f(x) W^T for one row of bf16 by weights of any type, streamed at the read ceiling (`stream.cu`)."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache

import torch

from tokenspeed.kernels.cuda.program import Kernel, architecture, compiled, pointer
from tokenspeed.kernels.triton.operands import Matrix, Prologue
from tokenspeed.quantization.fp8 import Fp8Weight
from tokenspeed.quantization.int4 import Int4Weight
from tokenspeed.quantization.int8 import Int8Weight
from tokenspeed.quantization.mxfp4 import Mxfp4Weight

FORMATS: dict[type, int] = {torch.Tensor: 0, Fp8Weight: 1, Int8Weight: 2, Int4Weight: 3, Mxfp4Weight: 4}
"""By the type of a weight, as `row.cuh` counts them."""
BITS = (16, 8, 8, 4, 4)
_SCALES = (0, 0, 0, 2, 4)
"""Bytes of the scales that lie in the ring, of a row and 64 bytes of it."""
_OFFSETS = (0, 0, 4, 4, 0)
"""Bytes that 64 bytes of a row take for what the codes of zeros add."""
ACTS = {"none": 0, "silu": 1, "gelu_tanh": 2}
UNIT = 8
PROGRAMS_PER_SM = 2
SHARED = 113 << 10
"""Bytes of a program, so that two fit the 228 KiB of an SM."""
SHORT_ROW = 4096
"""Bytes. Rows of bf16 up to here are split among 16 warps, longer ones among 8 (a layer of 1B: 32.8 against 34.3 us,
of 8B: 103.4 and 102.0); those of e4m3 among 8 (8B: 73.1 and 66.3)."""
MOST_COLUMNS = {"bare": 16384, "norm": 12288, "branch": 8192}
"""Beyond, x does not fit the registers that two programs have: a warp takes an eighth of these at most."""
SEGMENTS = (512, 384, 256, 128)
NIBBLE_WARPS, NIBBLE_SEGMENTS = (8, 7, 6, 5), ((512, 256), (128,))
"""Rows of four-bit codes are short: any number of warps that leaves copies of 256 bytes or more, else of 128."""


@dataclass(frozen=True)
class Variant:
    """What a kernel is compiled for: names of the definitions of `stream.cu`, in lower case."""

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

    @property
    def shared(self) -> int:
        """Bytes of `stream.cu`'s Shared."""
        row_bytes = self.k * BITS[self.format] // 8
        offsets = row_bytes // 64 * _OFFSETS[self.format] or 8
        floats = offsets + (2 * UNIT + 3) * 4 * self.warps
        return 2 * self.k + -(-floats // 8) * 8 + self.stages * self.warps * self.stage

    @property
    def stage(self) -> int:
        """Bytes of a stage of a ring, with its barrier."""
        return UNIT * self.segment + 64 + self.segment // 64 * UNIT * _SCALES[self.format] + 8

    def defines(self) -> dict[str, int]:
        """For the compiler."""
        return {name.upper(): value for name, value in asdict(self).items()} | {"SHARED": self.shared}


def variant(columns: int, format: int, act: str, prologue: Prologue | None, bias: bool) -> Variant | None:
    """The variant for rows of W of so many columns in a format of FORMATS, None where they do not fit its tiles."""
    branch = prologue is not None and prologue.branch is not None
    branch_norm = prologue is not None and prologue.branch_norm is not None
    most = MOST_COLUMNS["bare" if prologue is None else "branch" if branch else "norm"]
    row_bytes = columns * BITS[format] // 8
    for warps, segment in _splits(format, row_bytes):
        if columns % 8 or columns > min(warps, 8) * most // 8 or row_bytes % (warps * segment):
            continue
        found = Variant(
            columns, format, warps, segment, 0, ACTS[act], prologue is not None, branch, branch_norm, bias
        )  # fmt: skip
        stages = (SHARED - found.shared) // (warps * found.stage)
        if stages >= 3 or (stages == 2 and segment == SEGMENTS[-1]):
            return Variant(**{**asdict(found), "stages": stages})
    return None


def _splits(format: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """Warps and segments to try, the better first."""
    if BITS[format] == 4:
        yield from ((warps, each) for segments in NIBBLE_SEGMENTS for warps in NIBBLE_WARPS for each in segments)
    else:
        warps = 16 if BITS[format] == 16 and row_bytes <= SHORT_ROW else 8
        yield from ((warps, segment) for segment in SEGMENTS)


@cache
def kernel(found: Variant, device: int) -> Kernel:
    """Compiled and loaded."""
    defines = {name: int(value) for name, value in found.defines().items()}
    return Kernel(compiled("stream", defines, architecture(device)), "stream", 32 * found.warps, found.shared)


def stream(
    x: torch.Tensor,
    weight: Matrix,
    bias: torch.Tensor | None = None,
    act: str = "none",
    prologue: Prologue | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """`triton.linear.project` of one row of bf16, None where no variant takes it. Taken are Fp8Weights with a scale per
    row and Int4Weights without zero points."""
    matrix, scale = (weight, None) if isinstance(weight, torch.Tensor) else (weight.q, weight.scale)
    found = variant(x.shape[1], FORMATS.get(type(weight), 0), act, prologue, bias is not None)
    branch = prologue.branch if prologue else None
    branch_norm = prologue.branch_norm if prologue else None
    if found is None or not _aligned(x, branch, matrix) or not _streams(weight, act):
        return None
    n = matrix.shape[0] if act == "none" else matrix.shape[0] // 2
    y = torch.empty(1, n, dtype=x.dtype, device=x.device)
    joined = None if branch is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    device = torch.cuda.current_device() if x.device.index is None else x.device.index
    units = -(-n // (UNIT if act == "none" else UNIT // 2))
    kernel(found, device).launch(
        (min(units, PROGRAMS_PER_SM * _processors(device)), 1, 1),
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
            (matrix.stride(0) * matrix.element_size(), ctypes.c_longlong),
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
        zeros = isinstance(weight, Int4Weight) and weight.zero is not None
        return not zeros and weight.shape[0] % (2 if act == "none" else 4) == 0
    return True


def _aligned(x: torch.Tensor, branch: torch.Tensor | None, matrix: torch.Tensor) -> bool:
    """Whether all rows begin at multiples of 16 bytes, as copies and vector loads want."""
    starts = [x.data_ptr(), matrix.data_ptr(), matrix.stride(0) * matrix.element_size()]
    starts += [] if branch is None else [branch.data_ptr()]
    return matrix.stride(1) == 1 and not any(start % 16 for start in starts)


@cache
def _processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
