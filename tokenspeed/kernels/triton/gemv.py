"""Projection of one to four rows: y = f(x) W^T as multiply-and-sum, each weight byte read once.

A program owns BLOCK_N rows of W and walks their K columns in tiles held in registers, one tile ahead. The first tile
is requested before the wait for the kernel in front, so memory is busy while norms are worked out. Programs repeat the
join and the norms of x, whose rows stay in the first-level cache; program 0 writes the joined sum.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tokenspeed.kernels.triton.rows import activation, fp8_scale, gated, residual, rms_factors, to_fp8

PER_THREAD = tl.constexpr(8)
"""Columns of a tile that one thread adds up before they join its running sums, which saves registers."""


@triton.jit
def weight_rows(pid: tl.tensor, n: tl.tensor, BLOCK_N: tl.constexpr, ACT: tl.constexpr) -> tl.tensor:
    """The program's rows of W: consecutive, or gate and up rows in turn, and the output column of each."""
    local = tl.arange(0, BLOCK_N)
    if ACT == "none":
        column = pid * BLOCK_N + local
        return tl.minimum(column, n - 1), column
    else:
        column = pid * (BLOCK_N // 2) + local // 2
        return tl.minimum(column, n - 1) + (local % 2) * n, column


@triton.jit
def weight_tile(pointers: tl.tensor, cols: tl.tensor, K: tl.constexpr, BLOCK_K: tl.constexpr) -> tl.tensor:
    if K % BLOCK_K == 0:
        return tl.load(pointers + cols, eviction_policy="evict_first")
    else:
        return tl.load(pointers + cols, mask=cols < K, other=0.0, eviction_policy="evict_first")


@triton.jit
def store_rows(
    y: tl.tensor,
    out: tl.tensor,
    x_scale: tl.tensor,
    scale: tl.tensor,
    bias: tl.tensor,
    w_rows: tl.tensor,
    columns: tl.tensor,
    pid: tl.tensor,
    rows: tl.tensor,
    n: tl.tensor,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ACT: tl.constexpr,
    dtype: tl.constexpr,
) -> None:
    """Scale out [ROWS, BLOCK_N], add the bias, and write it to y [rows, n], gate and up rows joined where they are."""
    if scale is not None:
        out *= tl.reshape(x_scale, [ROWS, 1]) * tl.load(scale + w_rows)[None, :]
    if bias is not None:
        out += tl.load(bias + w_rows).to(dtype).to(tl.float32)[None, :]
    t = tl.arange(0, ROWS)[:, None]
    if ACT == "none":
        tl.store(y + t * n + columns[None, :], out.to(dtype), mask=(t < rows) & (columns[None, :] < n))
    else:
        gate, up = tl.split(tl.reshape(out, [ROWS, BLOCK_N // 2, 2]))
        column = pid * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)[None, :]
        tl.store(y + t * n + column, gated(gate, up, ACT, dtype).to(dtype), mask=(t < rows) & (column < n))


@triton.jit
def row_scales(
    x: tl.tensor,
    branch: tl.tensor,
    branch_weight: tl.tensor,
    norm_weight: tl.tensor,
    x_at: tl.tensor,
    branch_at: tl.tensor,
    branch_rstd: tl.tensor,
    rstd: tl.tensor,
    tile: tl.tensor,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """The e4m3 scale of each prepared row, with an axis of size one for the columns."""
    largest = tl.zeros_like((x_at + tile).to(tl.float32))
    for start in tl.static_range(0, K, BLOCK_K):
        value = activation(
            x, branch, branch_weight, norm_weight, x_at, branch_at, branch_rstd, rstd, start + tile, K, BLOCK_K
        )
        largest = tl.maximum(largest, tl.abs(value))
    return fp8_scale(tl.max(largest, axis=-1, keep_dims=True))


@triton.jit
def write_joined(
    joined: tl.tensor,
    x: tl.tensor,
    branch: tl.tensor,
    branch_weight: tl.tensor,
    t: tl.tensor,
    x_at: tl.tensor,
    branch_at: tl.tensor,
    branch_rstd: tl.tensor,
    tile: tl.tensor,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    for start in range(0, K, BLOCK_K):
        cols = start + tile
        total = residual(x, branch, branch_weight, x_at, branch_at, branch_rstd, cols, K, BLOCK_K)
        tl.store(joined + t * K + cols, total, mask=cols < K)


@triton.jit
def gemv_kernel(
    x: tl.tensor,
    branch: tl.tensor,
    weight: tl.tensor,
    scale: tl.tensor,
    bias: tl.tensor,
    norm_weight: tl.tensor,
    branch_weight: tl.tensor,
    y: tl.tensor,
    joined: tl.tensor,
    x_stride: tl.tensor,
    branch_stride: tl.tensor,
    w_stride: tl.tensor,
    rows: tl.tensor,
    n: tl.tensor,
    eps: tl.tensor,
    branch_eps: tl.tensor,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACT: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """y [rows, n] of x [rows, K]; W is [n, K], or [2n, K] with ACT. With `scale` [rows of W] W is e4m3 and x is
    quantised per row. With `branch`, `joined` [rows, K] gets the sum."""
    pid = tl.program_id(0)
    w_rows, columns = weight_rows(pid, n, BLOCK_N, ACT)
    w_at = weight + w_rows.to(tl.int64)[None, :, None] * w_stride
    tile = tl.arange(0, BLOCK_K)[None, None, :]
    ahead = weight_tile(w_at, tile, K, BLOCK_K)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    t = tl.minimum(tl.arange(0, ROWS), rows - 1)[:, None, None]
    x_at, branch_at = t * x_stride, t * branch_stride
    branch_rstd, rstd = rms_factors(
        x, branch, branch_weight, norm_weight, x_at, branch_at, eps, branch_eps, tile, K, BLOCK_K
    )
    x_scale = rstd
    if scale is not None:
        x_scale = row_scales(
            x, branch, branch_weight, norm_weight, x_at, branch_at, branch_rstd, rstd, tile, K, BLOCK_K
        )
    acc = tl.zeros([ROWS, BLOCK_N, BLOCK_K // PER_THREAD], tl.float32)
    for start in range(0, K, BLOCK_K):
        current = ahead
        if start + BLOCK_K < K:
            ahead = weight_tile(w_at, start + BLOCK_K + tile, K, BLOCK_K)
        value = activation(
            x, branch, branch_weight, norm_weight, x_at, branch_at, branch_rstd, rstd, start + tile, K, BLOCK_K
        )
        if scale is not None:
            value = to_fp8(value, x_scale).to(tl.float32)
        product = tl.reshape(value * current.to(tl.float32), [ROWS, BLOCK_N, BLOCK_K // PER_THREAD, PER_THREAD])
        acc += tl.sum(product, axis=3)
    dtype: tl.constexpr = y.dtype.element_ty
    store_rows(y, tl.sum(acc, axis=2), x_scale, scale, bias, w_rows, columns, pid, rows, n, ROWS, BLOCK_N, ACT, dtype)
    if branch is not None and pid == 0:
        write_joined(joined, x, branch, branch_weight, t, x_at, branch_at, branch_rstd, tile, K, BLOCK_K)
