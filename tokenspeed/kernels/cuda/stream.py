"""y = f(x) W^T for one row of bf16, streamed at the read ceiling (`stream.cu`)."""

from __future__ import annotations

import ctypes
from dataclasses import asdict, dataclass
from functools import cache

import torch

from tokenspeed.kernels.cuda.program import Kernel, architecture, compiled, pointer
from tokenspeed.kernels.triton.operands import Matrix, Prologue
from tokenspeed.quantization.fp8 import Fp8Weight

ACTS = {"none": 0, "silu": 1, "gelu_tanh": 2}
UNIT = 8
PROGRAMS_PER_SM = 2
SHARED = 113 << 10
"""Bytes of a program, so that two fit the 228 KiB of an SM."""
SHORT_ROW = 4096
"""Bytes. Rows of bf16 up to here are split among 16 warps, longer ones among 8 (a layer of 1B: 32.8 against 34.3 us,
of 8B: 103.4 and 102.0); those of e4m3 among 8 (8B: 73.1 and 66.3)."""
MOST_COLUMNS, MOST_JOINED_COLUMNS = 16384, 8192
"""Beyond, x does not fit the registers that two programs have."""
SEGMENTS = {2: (256, 128), 1: (512, 384, 256, 128)}
"""Bytes of a row in a stage, by those of a weight (a layer of 8B in bf16: 98.5 us by 256, 102.6 by 512; e4m3: 65.1 and
63.3)."""


@dataclass(frozen=True)
class Variant:
    """What a kernel is compiled for: names of the definitions of `stream.cu`, in lower case."""

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
        return 2 * self.k + (2 * UNIT + 3) * 4 * self.warps + self.stages * self.warps * self.stage

    @property
    def stage(self) -> int:
        """Bytes of a stage of a ring, with its barrier."""
        return UNIT * self.segment + 64 + 8

    def defines(self) -> dict[str, int]:
        """For the compiler."""
        return {name.upper(): value for name, value in asdict(self).items()} | {"SHARED": self.shared}


def variant(columns: int, item: int, act: str, prologue: Prologue | None, bias: bool) -> Variant | None:
    """The variant for rows of W of so many columns of `item` bytes, None where they do not fit its tiles."""
    branch = prologue is not None and prologue.branch is not None
    branch_norm = prologue is not None and prologue.branch_norm is not None
    warps = 16 if item == 2 and columns * item <= SHORT_ROW else 8
    if columns % 8 or columns > (MOST_JOINED_COLUMNS if branch else MOST_COLUMNS):
        return None
    for segment in SEGMENTS[item]:
        if columns * item % (warps * segment):
            continue
        found = Variant(
            columns, item, warps, segment, 0, ACTS[act], prologue is not None, branch, branch_norm, bias
        )  # fmt: skip
        stages = (SHARED - found.shared) // (warps * found.stage)
        if stages >= 3 or (stages == 2 and segment == SEGMENTS[item][-1]):
            return Variant(**{**asdict(found), "stages": stages})
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
    matrix, scale = (weight.q, weight.scale) if isinstance(weight, Fp8Weight) else (weight, None)
    found = variant(x.shape[1], matrix.element_size(), act, prologue, bias is not None)
    branch = prologue.branch if prologue else None
    branch_norm = prologue.branch_norm if prologue else None
    if found is None or not _aligned(x, branch, matrix) or (scale is not None and scale.dim() != 1):
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


def _aligned(x: torch.Tensor, branch: torch.Tensor | None, matrix: torch.Tensor) -> bool:
    """Whether all rows begin at multiples of 16 bytes, as copies and vector loads want."""
    starts = [x.data_ptr(), matrix.data_ptr(), matrix.stride(0) * matrix.element_size()]
    starts += [] if branch is None else [branch.data_ptr()]
    return matrix.stride(1) == 1 and not any(start % 16 for start in starts)


@cache
def _processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
