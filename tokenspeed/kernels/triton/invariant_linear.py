"""Projections whose rows have the same bits in every batch: one tile, one order over K, for any number of rows.

The tile follows from the shape of W alone; rows of x are always padded to blocks of 64. K is cut into parts by the
shape of W as well. Where programs are few, parts are summed by programs of their own and added by a second kernel;
where they are many, one program sums part after part. Both add the same float32 numbers in the same order, and multiply
and add are never contracted, so the choice, which may depend on the number of rows, changes no bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tokenspeed.kernels.triton import norm as row_kernels
from tokenspeed.kernels.triton.gemv import weight_rows
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
from tokenspeed.kernels.triton.packed_linear import plain
from tokenspeed.kernels.triton.prefetch import prefetch_rows
from tokenspeed.kernels.triton.skinny import add_parts_kernel, store_columns, tile_pair
from tokenspeed.kernels.triton.tiles import SkinnyTile
from tokenspeed.quantization.fp8 import Fp8Weight
from tokenspeed.quantization.narrow import PackedWeight

ROWS = 64
"""Rows of x in a tile, always."""
WIDE = 16384
"""From so many rows of W on, a program takes 128 of them."""
PROGRAMS = 200
"""Programs wanted: one and a half per SM of an H200."""
SHORTEST_PART = 512
"""Columns of K below which a part is not worth its addition."""
NEIGHBOURS = 8
"""Blocks of rows that read a block of W at about the same time."""
_ADD_COLUMNS = 512


def invariant_tile(n: int, k: int, item: int, scale_block: int = 0) -> SkinnyTile:
    """The tile for W [n, k] of `item` bytes an element; it lies within one block of scales along K."""
    if n >= WIDE:
        return SkinnyTile(128, scale_block or 128 // item, 1, 8, 4, prefetch=256 // item)
    tiles, split = -(-n // 64), 1
    while tiles * split < PROGRAMS and split < 8 and k // (2 * split) >= SHORTEST_PART:
        split *= 2
    return SkinnyTile(64, scale_block or 256 // item, split, 4, 3, prefetch=512 // item)


@triton.jit
def _place(pid, rows, blocks, ROWS: tl.constexpr, NEIGHBOURS: tl.constexpr):
    """Block of W and block of rows of a program: some blocks of rows pass over W together."""
    row_blocks = tl.cdiv(rows, ROWS)
    group = pid // (NEIGHBOURS * blocks)
    size = tl.minimum(row_blocks - group * NEIGHBOURS, NEIGHBOURS)
    within = pid - group * NEIGHBOURS * blocks
    return within // size, group * NEIGHBOURS + within % size


@triton.jit
def _part(w_at, x_at, scale, w_rows, t, rows, part, K: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
          BLOCK_K: tl.constexpr, SPAN: tl.constexpr, STAGES: tl.constexpr, SCALE_BLOCK: tl.constexpr):  # fmt: skip
    """Sums [BLOCK_N, ROWS] over the columns of one part of K."""
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_N, ROWS], tl.float32)
    for start in tl.range(part * SPAN, tl.minimum(part * SPAN + SPAN, K), BLOCK_K, num_stages=STAGES):
        w, a = tile_pair(w_at, x_at, start + k, t, rows, K, K % BLOCK_K == 0)
        if SCALE_BLOCK > 0:
            blocks_of_k: tl.constexpr = (K + SCALE_BLOCK - 1) // SCALE_BLOCK
            block = tl.load(scale + w_rows // SCALE_BLOCK * blocks_of_k + start // SCALE_BLOCK)
            acc += tl.dot(w, a, input_precision="ieee") * block[:, None]
        else:
            acc = tl.dot(w, a, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=("rows", "blocks"))
def product_kernel(x, x_scale, weight, scale, bias, y, parts, x_stride, w_stride, rows, n, blocks,
                   K: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                   SPLIT_K: tl.constexpr, APART: tl.constexpr, STAGES: tl.constexpr, PREFETCH: tl.constexpr,
                   SCALE_BLOCK: tl.constexpr, NEIGHBOURS: tl.constexpr, ACT: tl.constexpr,
                   PDL: tl.constexpr) -> None:  # fmt: skip
    """y [rows, n] of x [rows, K]; operands as `skinny_kernel` has them. blocks: of W. APART: sums of parts of K go to
    `parts` [SPLIT_K, rows, rows of W], one part per program of axis 1."""
    pid, row_block = _place(tl.program_id(0), rows, blocks, ROWS, NEIGHBOURS)
    w_rows, columns = weight_rows(pid, n, BLOCK_N, ACT)
    w_at = weight + w_rows.to(tl.int64) * w_stride
    SPAN: tl.constexpr = (K + SPLIT_K * BLOCK_K - 1) // (SPLIT_K * BLOCK_K) * BLOCK_K
    split = tl.program_id(1)
    own_scale = tl.load(scale + w_rows) if scale is not None and SCALE_BLOCK == 0 and not APART else None
    own_bias = tl.load(bias + w_rows) if bias is not None and not APART else None
    if PDL:
        if PREFETCH > 0:
            prefetch_rows(w_at, split * SPAN, weight.dtype.element_ty.primitive_bitwidth // 8, PREFETCH)
        gdc_wait()
        gdc_launch_dependents()

    first = row_block.to(tl.int64) * ROWS
    t = first + tl.arange(0, ROWS)
    x_at = x + t * x_stride
    own_x_scale = tl.load(x_scale + tl.minimum(t, rows - 1)) if x_scale is not None and not APART else None
    if APART:
        acc = _part(w_at, x_at, scale, w_rows, t, rows, split, K, ROWS, BLOCK_N, BLOCK_K, SPAN, STAGES, SCALE_BLOCK)
        stored = n if ACT == "none" else 2 * n
        flat = (split * rows + t[None, :]) * stored + w_rows[:, None]
        tl.store(parts + flat, acc, mask=(t[None, :] < rows) & (columns[:, None] < n))
    else:
        acc = _part(w_at, x_at, scale, w_rows, t, rows, 0, K, ROWS, BLOCK_N, BLOCK_K, SPAN, STAGES, SCALE_BLOCK)
        for part in range(1, SPLIT_K):
            acc += _part(w_at, x_at, scale, w_rows, t, rows, part, K, ROWS, BLOCK_N, BLOCK_K, SPAN, STAGES,
                         SCALE_BLOCK)  # fmt: skip
        store_columns(y + first * n, acc, own_x_scale, own_scale, own_bias, pid, rows - first, n, BLOCK_N, ROWS, ACT,
                      y.dtype.element_ty)  # fmt: skip


def product(
    x: Rows,
    weight: Multiplied,
    dtype: torch.dtype,
    bias: torch.Tensor | None = None,
    act: str = "none",
    tile: SkinnyTile | None = None,
    programs: int = PROGRAMS,
) -> torch.Tensor:
    """y [T, N] of `dtype` of rows that are already normed, and quantised where the weight is fp8.

    With fewer programs than `programs`, parts of K are summed apart.
    """
    rows, cols = x.values.shape
    (matrix, scale), scale_block = matrix_parts(weight), scale_block_of(weight)
    tile = tile or invariant_tile(matrix.shape[0], cols, matrix.element_size(), scale_block)
    n = matrix.shape[0] if act == "none" else matrix.shape[0] // 2
    blocks = triton.cdiv(n, tile.block_n if act == "none" else tile.block_n // 2)
    grid = blocks * triton.cdiv(rows, ROWS)
    apart = tile.split_k > 1 and grid < programs
    launch = options(tile.warps, tile.pdl and dependent_launch(matrix.device)) | {"enable_fp_fusion": False}
    y = torch.empty(rows, n, dtype=dtype, device=matrix.device)
    shape = (tile.split_k, rows, matrix.shape[0])
    parts = torch.empty(shape, dtype=torch.float32, device=matrix.device) if apart else None
    product_kernel[(grid, tile.split_k if apart else 1)](
        x.values, x.scale, matrix, scale, bias, y, parts, x.values.stride(0), matrix.stride(0), rows, n, blocks,
        K=cols, ROWS=ROWS, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, SPLIT_K=tile.split_k, APART=apart,
        STAGES=tile.stages, PREFETCH=tile.prefetch, SCALE_BLOCK=scale_block, NEIGHBOURS=NEIGHBOURS, ACT=act, **launch,
    )  # fmt: skip
    if parts is not None:
        add_parts_kernel[(triton.cdiv(n, _ADD_COLUMNS), rows)](
            parts, x.scale, None if scale_block else scale, bias, y, rows, n, SPLIT_K=tile.split_k,
            BLOCK=_ADD_COLUMNS, ACT=act, **(launch | {"num_warps": 4}),
        )  # fmt: skip
    return y


def project_invariant(
    x: torch.Tensor,
    weight: Matrix,
    bias: torch.Tensor | None = None,
    act: str = "none",
    prologue: Prologue | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `linear.project`, with bits that depend on a row alone. Raises UnsupportedError for a weight that does not fit
    or whose rows are not contiguous. int8, int4 and MXFP4 weights are made plain first."""
    check_matrix(weight, x.shape[1])
    if isinstance(weight, PackedWeight):
        weight = plain(weight, x.dtype)
    quantize = isinstance(weight, Fp8Weight)
    given, joined = Rows(x), None
    if prologue is not None:
        given, joined = row_kernels.norm_rows(x, prologue.norm, prologue.branch, prologue.branch_norm, quantize)
    elif quantize:
        given, _ = row_kernels.norm_rows(x, None, quantize=True)
    return product(given, weight, x.dtype, bias, act), joined
