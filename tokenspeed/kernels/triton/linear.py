"""Projections y = f(x) W^T (+ bias) (then an activation) of any number of rows and weight formats.

One row: one kernel with everything inside (`gemv`). Up to 64, or 128 by e4m3 weights: a norm kernel and a
tensor-core kernel that reads each weight byte once (`skinny`). More: a norm kernel, a library product and an activation
kernel. By int8, int4 and MXFP4 weights up to 64 rows go through a norm kernel and one of their own (`packed`), more
through the library, with the weights made plain for that one product.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
import triton

from tokenspeed.kernels.triton import norm as row_kernels
from tokenspeed.kernels.triton.gemv import gemv_kernel
from tokenspeed.kernels.triton.launch import dependent_launch, options
from tokenspeed.kernels.triton.operands import (
    Matrix,
    Multiplied,
    Prologue,
    Rows,
    check_matrix,
    matrix_parts,
    scale_block_of,
)
from tokenspeed.kernels.triton.packed_linear import packed_product, plain
from tokenspeed.kernels.triton.skinny import add_parts_kernel, skinny_kernel
from tokenspeed.kernels.triton.tiles import (
    FP8_GEMV_BYTES,
    FP8_SMALL_ROWS,
    FUSED_NORM_ELEMENTS,
    GEMV_ROWS,
    SMALL_ROWS,
    GemvTile,
    SkinnyTile,
    gemv_tile,
    skinny_tile,
)
from tokenspeed.quantization.fp8 import Fp8Weight
from tokenspeed.quantization.narrow import PackedWeight

_ADD_COLUMNS = 512
Small = Callable[[Rows, Matrix, torch.Tensor | None, str], torch.Tensor | None]
"""A product of few prepared rows of bf16, as `skinny`; None for what it does not take."""


def project(
    x: torch.Tensor,
    weight: Matrix,
    bias: torch.Tensor | None = None,
    act: str = "none",
    prologue: Prologue | None = None,
    small: Small | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """y [T, N] of x [T, K] in the dtype of x, and the joined rows [T, K], or None without a branch.

    weight: [N, K], or with `act` (silu, gelu_tanh) gate rows over up rows [2N, K]. bias: float32 [rows of weight]. x
    and the branch may be column slices. small: asked first where rows are few. Raises UnsupportedError for a weight
    whose rows are not contiguous.
    """
    rows, cols = x.shape
    check_matrix(weight, cols)
    if isinstance(weight, PackedWeight):
        if rows > SMALL_ROWS:
            return project(x, plain(weight, x.dtype), bias, act, prologue)
        ready, joined = _normed(x, prologue)
        return packed_product(ready.values, weight, bias, act), joined
    if _is_gemv(rows, weight) and _fits(rows, cols, prologue):
        return gemv(x, weight, bias, act, prologue)
    given, joined = prepared(x, weight, prologue)
    if rows <= _small_rows(weight):
        y = small(given, weight, bias, act) if small is not None else None
        return skinny(given, weight, x.dtype, bias, act) if y is None else y, joined
    return _library(given, weight, x.dtype, bias, act), joined


def _small_rows(weight: Multiplied) -> int:
    return FP8_SMALL_ROWS if isinstance(weight, Fp8Weight) else SMALL_ROWS


def _is_gemv(rows: int, weight: Multiplied) -> bool:
    if isinstance(weight, Fp8Weight):
        return rows <= GEMV_ROWS and weight.scale_block == 0 and weight.q.nbytes <= FP8_GEMV_BYTES
    return rows <= GEMV_ROWS


def gemv(
    x: torch.Tensor,
    weight: Multiplied,
    bias: torch.Tensor | None = None,
    act: str = "none",
    prologue: Prologue | None = None,
    tile: GemvTile | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`project` for one to four rows in one kernel; weights plain or with a scale per row."""
    rows, cols = x.shape
    matrix, scale = matrix_parts(weight)
    padded = triton.next_power_of_2(rows)
    tile = tile or gemv_tile(padded, matrix.shape[0], cols, matrix.element_size())
    n = matrix.shape[0] if act == "none" else matrix.shape[0] // 2
    columns = tile.block_n if act == "none" else tile.block_n // 2
    branch = prologue.branch if prologue else None
    branch_norm = prologue.branch_norm if prologue else None
    y = torch.empty(rows, n, dtype=x.dtype, device=x.device)
    joined = None if branch is None else torch.empty(rows, cols, dtype=x.dtype, device=x.device)
    gemv_kernel[(triton.cdiv(n, columns),)](
        x,
        branch,
        matrix,
        scale,
        bias,
        prologue.norm.weight if prologue else None,
        branch_norm.weight if branch_norm else None,
        y,
        joined,
        x.stride(0),
        0 if branch is None else branch.stride(0),
        matrix.stride(0),
        rows,
        n,
        prologue.norm.eps if prologue else 0.0,
        branch_norm.eps if branch_norm else 0.0,
        K=cols,
        ROWS=padded,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        ACT=act,
        **options(tile.warps, tile.pdl and dependent_launch(x.device)),
    )
    return y, joined


def skinny(
    x: Rows,
    weight: Multiplied,
    dtype: torch.dtype,
    bias: torch.Tensor | None = None,
    act: str = "none",
    tile: SkinnyTile | None = None,
) -> torch.Tensor:
    """y [T, N] of `dtype`, of 1 to 128 rows that are already normed, and quantised where the weight is fp8."""
    rows, cols = x.values.shape
    matrix, scale = matrix_parts(weight)
    padded = max(16, triton.next_power_of_2(rows))
    tile = tile or skinny_tile(padded, matrix.shape[0], cols, matrix.element_size(), scale_block_of(weight))
    n = matrix.shape[0] if act == "none" else matrix.shape[0] // 2
    columns = tile.block_n if act == "none" else tile.block_n // 2
    pdl = tile.pdl and dependent_launch(matrix.device)
    y = torch.empty(rows, n, dtype=dtype, device=matrix.device)
    parts = None
    if tile.split_k > 1:
        parts = torch.empty(tile.split_k, rows, matrix.shape[0], dtype=torch.float32, device=matrix.device)
    skinny_kernel[(triton.cdiv(n, columns), tile.split_k)](
        x.values,
        x.scale,
        matrix,
        scale,
        bias,
        y,
        parts,
        x.values.stride(0),
        matrix.stride(0),
        rows,
        n,
        K=cols,
        ROWS=padded,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        SPLIT_K=tile.split_k,
        STAGES=tile.stages,
        PREFETCH=tile.prefetch,
        SCALE_BLOCK=scale_block_of(weight),
        ACT=act,
        **options(tile.warps, pdl),
    )
    if parts is not None:
        row_scale = None if scale_block_of(weight) else scale
        launch = options(4, pdl)
        grid = (triton.cdiv(n, _ADD_COLUMNS), rows)
        add_parts_kernel[grid](
            parts, x.scale, row_scale, bias, y, rows, n, SPLIT_K=tile.split_k, BLOCK=_ADD_COLUMNS, ACT=act, **launch
        )
    return y


def prepared(x: torch.Tensor, weight: Multiplied, prologue: Prologue | None) -> tuple[Rows, torch.Tensor | None]:
    """x as the product takes it: joined, normed, quantised for an fp8 weight where a kernel multiplies fp8."""
    quantize = isinstance(weight, Fp8Weight) and (x.shape[0] <= FP8_SMALL_ROWS or not weight.scale_block)
    if prologue is None and quantize:
        twin = row_kernels.quantized_twin(x)
        return row_kernels.norm_rows(x, None, quantize=True) if twin is None else (twin, None)
    return _normed(x, prologue, quantize)


def _normed(x: torch.Tensor, prologue: Prologue | None, quantize: bool = False) -> tuple[Rows, torch.Tensor | None]:
    if prologue is None:
        return Rows(x), None
    return row_kernels.norm_rows(x, prologue.norm, prologue.branch, prologue.branch_norm, quantize)


def _library(x: Rows, weight: Multiplied, dtype: torch.dtype, bias: torch.Tensor | None, act: str) -> torch.Tensor:
    rounded = None if bias is None else bias.to(dtype)
    if isinstance(weight, Fp8Weight):
        y = _scaled_product(x, weight, dtype)
        y = y if rounded is None else y + rounded
    else:
        y = F.linear(x.values, weight, rounded)
    quantize = isinstance(weight, Fp8Weight) and not weight.scale_block
    return y if act == "none" else row_kernels.act_mul(y, act, quantize)


def _scaled_product(x: Rows, weight: Fp8Weight, dtype: torch.dtype) -> torch.Tensor:
    if x.scale is None:
        return F.linear(x.values, plain(weight, dtype))
    # Row-wise scaling gives bf16 only.
    y = torch._scaled_mm(
        x.values,
        weight.q.t(),
        scale_a=x.scale[:, None],
        scale_b=weight.scale[None, :],
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return y.to(dtype)


def _fits(rows: int, cols: int, prologue: Prologue | None) -> bool:
    return prologue is None or rows * cols <= FUSED_NORM_ELEMENTS
