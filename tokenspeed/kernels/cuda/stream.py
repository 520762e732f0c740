"""y = f(x) W^T for one row of bf16 by weights of any type, x W^T for up to eight by bf16 or e4m3, streamed at the read
ceiling: bf16 by `stream.cu`, narrower weights by `stream_narrow.cu`."""

from __future__ import annotations

import ctypes
from functools import cache

import torch

from tokenspeed.kernels.cuda.program import Kernel, architecture, compiled, pointer, processors
from tokenspeed.kernels.cuda.stream_tiles import FORMATS, MOST_OF_EIGHT, UNIT, Variant, variant
from tokenspeed.kernels.triton.launch import device_index
from tokenspeed.kernels.triton.operands import Matrix, Prologue, Rows
from tokenspeed.quantization.fp8 import Fp8Weight
from tokenspeed.quantization.int4 import Int4Weight
from tokenspeed.quantization.mxfp4 import Mxfp4Weight


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
    found: Variant | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """`triton.linear.project` of one row of bf16, None where no variant takes it. Taken are Fp8Weights with a scale per
    row and Int4Weights in groups of 128 with scales of 16 bits and without zero points. found: the variant, if it is
    chosen already."""
    return _stream(x, weight, bias, act, prologue, found)


def stream_rows(
    x: Rows, weight: Matrix, bias: torch.Tensor | None = None, act: str = "none", found: Variant | None = None
) -> torch.Tensor | None:
    """`triton.linear.skinny` of up to eight prepared rows, of bf16, or of e4m3 with a scale each by such weights, for
    which rows of bf16 are quantised here; None where no variant takes them. found: as in `stream`."""
    if len(x.values) == 1 if isinstance(weight, Fp8Weight) else x.scale is not None:
        return None
    made = _stream(x.values, weight, bias, act, None, found, x.scale)
    return None if made is None else made[0]


def _stream(
    x: torch.Tensor,
    weight: Matrix,
    bias: torch.Tensor | None,
    act: str,
    prologue: Prologue | None,
    found: Variant | None,
    x_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    matrix, scale = (weight, None) if isinstance(weight, torch.Tensor) else (weight.q, weight.scale)
    half = isinstance(weight, Int4Weight) and weight.scale.dtype == torch.float16
    if found is None:
        format, rows = FORMATS.get(type(weight), 0), x.shape[0]
        if isinstance(weight, Fp8Weight) and rows > 4 and matrix.numel() >= MOST_OF_EIGHT:
            return None
        quantize = isinstance(weight, Fp8Weight) and rows > 1 and x_scale is None
        found = variant(x.shape[1], format, act, prologue, bias is not None, rows, half, quantize)
    branch = prologue.branch if prologue else None
    branch_norm = prologue.branch_norm if prologue else None
    if found is None or not _streams(weight, act) or not aligned(x, branch, matrix):
        return None
    n = matrix.shape[0] if act == "none" else matrix.shape[0] // 2
    y = torch.empty(x.shape[0], n, dtype=torch.bfloat16, device=x.device)
    joined = None if branch is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    device = device_index(x.device)
    sized, together = for_outputs(found, n, processors(device))
    kernel(sized, device).launch(
        (together * found.cluster, 1, 1),
        [
            pointer(x),
            pointer(x_scale),
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


def for_outputs(found: Variant, n: int, processors: int) -> tuple[Variant, int]:
    """The variant as it is launched for n outputs, and how many programs, or clusters, are launched."""
    units = -(-n // (UNIT // 2 if found.act else UNIT))
    together = min(units, found.programs * processors // found.cluster)
    return found.holding(-(-units // together)), together


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
