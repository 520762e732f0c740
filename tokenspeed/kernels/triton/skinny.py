"""Projection of 5 to 64 rows on tensor cores: y = x W^T with W as the tall operand, each weight byte read once.

The rows of x are padded to 16, 32 or 64 columns of the product. Tiles of W stream through shared memory; where rows of
W are few, K is split between programs, and a second kernel adds the parts in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tokenspeed.kernels.triton.gemv import weight_rows
from tokenspeed.kernels.triton.prefetch import prefetch_rows
from tokenspeed.kernels.triton.rows import gated


@triton.jit
def store_columns(
    y: tl.tensor,
    acc: tl.tensor,
    x_scale: tl.tensor,
    scale: tl.tensor,
    bias: tl.tensor,
    pid: tl.tensor,
    rows: tl.tensor,
    n: tl.tensor,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    ACT: tl.constexpr,
    dtype: tl.constexpr,
) -> None:
    """Scale acc [BLOCK_N, ROWS] by what its rows and columns have, add the bias, and write it to y [rows, n], gate and
    up rows joined where they are. What rows of W have is read before the products: memory is far, and nothing else
    would be asked of it here."""
    t = tl.arange(0, ROWS)[None, :]
    if x_scale is not None:
        acc *= x_scale[None, :]
    if scale is not None:
        acc *= scale[:, None]
    if bias is not None:
        acc += bias.to(dtype).to(tl.float32)[:, None]
    if ACT == "none":
        column = pid * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
        out = acc
    else:
        column = pid * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)[:, None]
        gate, up = tl.split(tl.permute(tl.reshape(acc, [BLOCK_N // 2, 2, ROWS]), [0, 2, 1]))
        out = gated(gate, up, ACT, dtype)
    tl.store(y + t * n + column, out.to(dtype), mask=(t < rows) & (column < n))


@triton.jit
def tile_pair(
    w_at: tl.tensor,
    x_at: tl.tensor,
    cols: tl.tensor,
    t: tl.tensor,
    rows: tl.tensor,
    K: tl.constexpr,
    EVEN: tl.constexpr,
) -> tl.tensor:
    """Some columns of W [BLOCK_N, columns] and of x, transposed [columns, ROWS]."""
    if EVEN:
        w = tl.load(w_at[:, None] + cols[None, :], eviction_policy="evict_first")
        a = tl.load(x_at[None, :] + cols[:, None], mask=t[None, :] < rows, other=0.0)
    else:
        inside = cols < K
        w = tl.load(w_at[:, None] + cols[None, :], mask=inside[None, :], other=0.0, eviction_policy="evict_first")
        a = tl.load(x_at[None, :] + cols[:, None], mask=(t[None, :] < rows) & inside[:, None], other=0.0)
    return w, a


@triton.jit
def skinny_kernel(
    x: tl.tensor,
    x_scale: tl.tensor,
    weight: tl.tensor,
    scale: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    parts: tl.tensor,
    x_stride: tl.tensor,
    w_stride: tl.tensor,
    rows: tl.tensor,
    n: tl.tensor,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    STAGES: tl.constexpr,
    PREFETCH: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
    ACT: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """y [rows, n] of x [rows, K]; W is [n, K], or [2n, K] with ACT. e4m3 operands come with x_scale [rows] and with
    `scale` per row of W, or per SCALE_BLOCK x SCALE_BLOCK elements. With SPLIT_K > 1 float32 sums go to `parts`
    [SPLIT_K, rows, rows of W] instead, without x_scale, scales per row, bias and activation."""
    pid, split = tl.program_id(0), tl.program_id(1)
    w_rows, columns = weight_rows(pid, n, BLOCK_N, ACT)
    w_at = weight + w_rows.to(tl.int64) * w_stride
    SPAN: tl.constexpr = (K + SPLIT_K * BLOCK_K - 1) // (SPLIT_K * BLOCK_K) * BLOCK_K
    first = split * SPAN
    # Constants, as weights are.
    own_scale = tl.load(scale + w_rows) if scale is not None and SCALE_BLOCK == 0 and SPLIT_K == 1 else None
    own_bias = tl.load(bias + w_rows) if bias is not None and SPLIT_K == 1 else None
    if PDL:
        if PREFETCH > 0:
            prefetch_rows(w_at, first, weight.dtype.element_ty.primitive_bitwidth // 8, PREFETCH)
        gdc_wait()
        gdc_launch_dependents()

    t = tl.arange(0, ROWS)
    x_at = x + t * x_stride
    own_x_scale = tl.load(x_scale + tl.minimum(t, rows - 1)) if x_scale is not None and SPLIT_K == 1 else None
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_N, ROWS], tl.float32)
    for start in tl.range(first, tl.minimum(first + SPAN, K), BLOCK_K, num_stages=STAGES):
        w, a = tile_pair(w_at, x_at, start + k, t, rows, K, K % BLOCK_K == 0)
        if SCALE_BLOCK > 0:
            blocks_of_k: tl.constexpr = (K + SCALE_BLOCK - 1) // SCALE_BLOCK
            block = tl.load(scale + w_rows // SCALE_BLOCK * blocks_of_k + start // SCALE_BLOCK)
            acc += tl.dot(w, a, input_precision="ieee") * block[:, None]
        else:
            acc = tl.dot(w, a, acc, input_precision="ieee")
    if SPLIT_K > 1:
        flat = (split * rows + t[None, :]) * (n if ACT == "none" else 2 * n) + w_rows[:, None]
        tl.store(parts + flat, acc, mask=(t[None, :] < rows) & (columns[:, None] < n))
    else:
        store_columns(y, acc, own_x_scale, own_scale, own_bias, pid, rows, n, BLOCK_N, ROWS, ACT, y.dtype.element_ty)


@triton.jit
def sum_of_parts(
    parts: tl.tensor,
    x_scale: tl.tensor,
    scale: tl.tensor,
    bias: tl.tensor,
    t: tl.tensor,
    w_rows: tl.tensor,
    rows: tl.tensor,
    stored: tl.tensor,
    mask: tl.tensor,
    SPLIT_K: tl.constexpr,
    dtype: tl.constexpr,
) -> tl.tensor:
    total = tl.load(parts + t * stored + w_rows, mask=mask, other=0.0)
    for split in tl.static_range(1, SPLIT_K):
        total += tl.load(parts + (split * rows + t) * stored + w_rows, mask=mask, other=0.0)
    if x_scale is not None:
        total *= tl.load(x_scale + t)
    if scale is not None:
        total *= tl.load(scale + w_rows, mask=mask, other=0.0)
    if bias is not None:
        total += tl.load(bias + w_rows, mask=mask, other=0.0).to(dtype).to(tl.float32)
    return total


@triton.jit
def add_parts_kernel(
    parts: tl.tensor,
    x_scale: tl.tensor,
    scale: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    rows: tl.tensor,
    n: tl.tensor,
    SPLIT_K: tl.constexpr,
    BLOCK: tl.constexpr,
    ACT: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """y [rows, n] from parts [SPLIT_K, rows, n or 2n], added in order, then scaled, biased and activated."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    dtype: tl.constexpr = y.dtype.element_ty
    t = tl.program_id(1)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = column < n
    if ACT == "none":
        out = sum_of_parts(parts, x_scale, scale, bias, t, column, rows, n, mask, SPLIT_K, dtype)
    else:
        gate = sum_of_parts(parts, x_scale, scale, bias, t, column, rows, 2 * n, mask, SPLIT_K, dtype)
        up = sum_of_parts(parts, x_scale, scale, bias, t, column + n, rows, 2 * n, mask, SPLIT_K, dtype)
        out = gated(gate, up, ACT, dtype)
    tl.store(y + t * n + column, out.to(dtype), mask=mask)
