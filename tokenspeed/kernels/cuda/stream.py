"""y = f(x) W^T for one row of bf16, x W^T for up to eight, streamed at the read ceiling (`stream.cu`)."""

from __future__ import annotations

import ctypes
from dataclasses import asdict, dataclass, replace
from functools import cache

import torch

from tokenspeed.kernels.cuda.program import Kernel, architecture, compiled, pointer
from tokenspeed.kernels.triton.operands import Matrix, Prologue, Rows, matrix_parts, scale_block_of

ACTS = {"none": 0, "silu": 1, "gelu_tanh": 2}
UNIT = 8
PROGRAMS_PER_SM = 2
SHARED = 113 << 10
"""Bytes of a program, so that two fit the 228 KiB of an SM."""
SHORT_ROW = 4096
"""Bytes. Rows of bf16 up to here are split among 16 warps, longer ones among 8 (a layer of 1B: 32.8 against 34.3 us,
of 8B: 103.4 and 102.0); those of e4m3 among 8 (8B: 73.1 and 66.3)."""
MOST_ROWS = 8
ROW_GAP = 32
"""Elements between rows of x in shared memory."""
SEVERAL_SEGMENT = 256
"""Of several rows, which take their part of a program's memory: with 128 bytes the Triton kernel wins, as it does with
e4m3."""
MOST_COLUMNS, MOST_JOINED_COLUMNS = 16384, 8192
"""Beyond, x does not fit the registers that two programs have."""
SEGMENTS = {2: (256, 128), 1: (512, 384, 256, 128)}
"""Bytes of a row in a stage, by those of a weight (a layer of 8B in bf16: 98.5 us by 256, 102.6 by 512; e4m3: 65.1 and
63.3)."""


@dataclass(frozen=True)
class Variant:
    """What a kernel is compiled for: names of the definitions of `stream.cu`, in lower case."""

    rows: int
    k: int
    item: int
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
        x = 2 * self.rows * (self.k + (ROW_GAP if self.rows > 1 else 0))
        return x + (2 * UNIT * self.rows + 3) * 4 * self.warps + self.stages * self.warps * self.stage

    @property
    def stage(self) -> int:
        """Bytes of a stage of a ring, with its barrier."""
        return UNIT * self.segment + 64 + 8

    def defines(self) -> dict[str, int]:
        """For the compiler."""
        return {name.upper(): value for name, value in asdict(self).items()} | {"SHARED": self.shared}


def variant(columns: int, item: int, act: str, prologue: Prologue | None, bias: bool, rows: int = 1) -> Variant | None:
    """The variant for rows of W of so many columns of `item` bytes, None where they do not fit its tiles. More than one
    row of x comes without prologue."""
    branch = prologue is not None and prologue.branch is not None
    branch_norm = prologue is not None and prologue.branch_norm is not None
    padded = 1 << (rows - 1).bit_length()
    warps = 16 if item == 2 and columns * item <= SHORT_ROW else 8
    if columns % 8 or columns > (MOST_JOINED_COLUMNS if branch else MOST_COLUMNS):
        return None
    if rows > MOST_ROWS or (rows > 1 and item == 1):
        return None
    segments = SEGMENTS[item] if rows == 1 else (SEVERAL_SEGMENT,)
    for segment in segments:
        if columns * item % (warps * segment):
            continue
        found = Variant(
            padded, columns, item, warps, segment, 0, ACTS[act], prologue is not None, branch, branch_norm, bias
        )  # fmt: skip
        stages = (SHARED - found.shared) // (warps * found.stage)
        if stages >= 3 or (stages == 2 and segment == segments[-1]):
            return replace(found, stages=stages)
    return None


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
    """`triton.linear.project` of one row of bf16, None where no variant takes it. An Fp8Weight has a scale per row."""
    return _stream(x, weight, bias, act, prologue)


def stream_rows(x: Rows, weight: Matrix, bias: torch.Tensor | None = None, act: str = "none") -> torch.Tensor | None:
    """`triton.linear.skinny` of up to eight prepared rows of bf16; None where no variant takes them."""
    found = _stream(x.values, weight, bias, act, None)
    return None if found is None else found[0]


def _stream(
    x: torch.Tensor, weight: Matrix, bias: torch.Tensor | None, act: str, prologue: Prologue | None
) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    matrix, scale = matrix_parts(weight)
    found = variant(x.shape[1], matrix.element_size(), act, prologue, bias is not None, x.shape[0])
    branch = prologue.branch if prologue else None
    branch_norm = prologue.branch_norm if prologue else None
    if found is None or scale_block_of(weight) or not _aligned(x, branch, matrix):
        return None
    n = matrix.shape[0] if act == "none" else matrix.shape[0] // 2
    y = torch.empty(x.shape[0], n, dtype=torch.bfloat16, device=x.device)
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
            (x.stride(0), ctypes.c_longlong),
            (matrix.stride(0) * matrix.element_size(), ctypes.c_longlong),
            (x.shape[0], ctypes.c_int),
            (n, ctypes.c_int),
            (prologue.norm.eps if prologue else 0.0, ctypes.c_float),
            (branch_norm.eps if branch_norm else 0.0, ctypes.c_float),
        ],
    )
    return y, joined


def _aligned(*matrices: torch.Tensor | None) -> bool:
    """Whether all rows begin at multiples of 16 bytes, as copies and vector loads want."""
    given = [matrix for matrix in matrices if matrix is not None]
    apart = [each for matrix in given for each in (matrix.data_ptr(), matrix.stride(0) * matrix.element_size())]
    return all(matrix.stride(1) == 1 for matrix in given) and not any(each % 16 for each in apart)


@cache
def _processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
