"""Projection of 1 to 64 rows by int8, int4 or MXFP4 weights, and such weights made plain for a library's product.

Each run of 128 columns of W, 16 words of four-bit codes, is widened in registers to what the compute dtype holds
exactly (codes, or MXFP4's values) and multiplied on tensor cores; scales of int4 groups and int8 rows are put on the
float32 sums. x is read in the order in which the codes lie (`quantization.nibbles`).
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tokenspeed.kernels.triton.gemv import weight_rows
from tokenspeed.kernels.triton.prefetch import prefetch_rows
from tokenspeed.kernels.triton.skinny import store_columns


@triton.jit
def columns_of(k: tl.tensor, NIBBLES: tl.constexpr) -> tl.tensor:
    """Columns, within a run, of codes in the order in which they lie."""
    if NIBBLES:
        cols = 32 * (k // 8 % 4) + 8 * (k // 32) + k % 8
        return tl.max_contiguous(tl.multiple_of(cols, 8), 8)
    else:
        return k


@triton.jit
def _nibbles(words: tl.tensor) -> tl.tensor:
    """int32 [N, 16] to codes [N, 16, 8]: even columns of a word lie in its low half, odd ones in its high half. Joins
    keep the codes of a word in one thread."""
    low = tl.join(_by_four(words), _by_four(words >> 4))
    high = tl.join(_by_four(words >> 16), _by_four(words >> 20))
    joined = tl.join(low, high)
    return tl.reshape(joined, [joined.shape[0], joined.shape[1], 8])


@triton.jit
def _by_four(words: tl.tensor) -> tl.tensor:
    return tl.join(words & 15, (words >> 8) & 15)


@triton.jit
def run_tile(
    weight: tl.tensor,
    scale: tl.tensor,
    zero: tl.tensor,
    w_rows: tl.tensor,
    w_stride: tl.tensor,
    stored: tl.tensor,
    run: tl.tensor,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KIND: tl.constexpr,
    dtype: tl.constexpr,
    PER_RUN: tl.constexpr = 1,
) -> tl.tensor:
    """A run of W [BLOCK_N, 128] in the order in which it lies: codes of int8, codes less zero points of int4, values of
    MXFP4, exact in `dtype`; of int4 with PER_RUN scales of a run, more than one, values rounded to it. stored: rows of
    W."""
    w_at = weight + w_rows.to(tl.int64)[:, None] * w_stride
    if KIND == "int8":
        cols = run * 128 + tl.arange(0, 128)
        tile = tl.load(w_at + cols[None, :], mask=cols[None, :] < K, other=0, eviction_policy="evict_first")
        return tile.to(dtype)
    else:
        word = tl.arange(0, 16)
        words = tl.load(w_at + run * 16 + word[None, :], eviction_policy="evict_first")
        codes = _nibbles(words)
        if KIND == "mxfp4":
            at = (run * stored + w_rows)[:, None] * 4 + (word % 4)[None, :]
            exponent = tl.load(scale + at).to(tl.int32) << 23
            # The code's bits as those of a float32 are 2^-126 times its value; for one half that is no normal number.
            bits = ((codes & 8) << 28) | ((codes & 7) << 22)
            values = bits.to(tl.float32, bitcast=True) * 8.507059173023462e37
            wide = values * exponent.to(tl.float32, bitcast=True)[:, :, None]
        else:
            # Bits of 2^23 + code: cheaper than a conversion.
            wide = (codes | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0
            group = (run * stored + w_rows)[:, None] * PER_RUN + (word % 4 * PER_RUN // 4)[None, :]
            if zero is None:
                wide -= 8.0
            elif PER_RUN > 1:
                wide -= tl.load(zero + group).to(tl.float32)[:, :, None]
            else:
                wide -= tl.load(zero + run * stored + w_rows).to(tl.float32)[:, None, None]
            if PER_RUN > 1:
                wide *= tl.load(scale + group).to(tl.float32)[:, :, None]
        return tl.reshape(wide, [BLOCK_N, 128]).to(dtype)


@triton.jit
def packed_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    scale: tl.tensor,
    zero: tl.tensor,
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
    SPLIT_K: tl.constexpr,
    STAGES: tl.constexpr,
    PREFETCH: tl.constexpr,
    KIND: tl.constexpr,
    PER_RUN: tl.constexpr,
    ACT: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """y [rows, n] of x [rows, K]; W is [n, K], or [2n, K] with ACT, as `run_tile` has it. With SPLIT_K > 1 float32 sums
    go to `parts` [SPLIT_K, rows, rows of W] instead, without int8's scales, bias and activation."""
    pid, split, stored = tl.program_id(0), tl.program_id(1), n if ACT == "none" else 2 * n
    w_rows, columns = weight_rows(pid, n, BLOCK_N, ACT)
    RUNS: tl.constexpr = (K + 127) // 128
    SPAN: tl.constexpr = (RUNS + SPLIT_K - 1) // SPLIT_K
    first = split * SPAN
    own_scale = tl.load(scale + w_rows) if KIND == "int8" and SPLIT_K == 1 else None
    own_bias = tl.load(bias + w_rows) if bias is not None and SPLIT_K == 1 else None
    if PDL:
        if PREFETCH > 0:
            item: tl.constexpr = weight.dtype.element_ty.primitive_bitwidth // 8
            w_at = weight + w_rows.to(tl.int64) * w_stride
            prefetch_rows(w_at, first * (128 if KIND == "int8" else 16), item, PREFETCH // item)
        gdc_wait()
        gdc_launch_dependents()

    t, inside = tl.arange(0, ROWS), columns_of(tl.arange(0, 128), KIND != "int8")
    x_at = x + t * x_stride
    acc = tl.zeros([BLOCK_N, ROWS], tl.float32)
    for run in tl.range(first, tl.minimum(first + SPAN, RUNS), num_stages=STAGES):
        w = run_tile(weight, scale, zero, w_rows, w_stride, stored, run, K, BLOCK_N, KIND, x.dtype.element_ty, PER_RUN)
        cols = run * 128 + inside
        mask = t[None, :] < rows
        if K % 128 != 0:
            mask &= (cols < K)[:, None]
        a = tl.load(x_at[None, :] + cols[:, None], mask=mask, other=0.0)
        if KIND == "int4" and PER_RUN == 1:
            factor = tl.load(scale + run * stored + w_rows).to(tl.float32)
            acc += tl.dot(w, a, input_precision="ieee") * factor[:, None]
        else:
            acc = tl.dot(w, a, acc, input_precision="ieee")
    if SPLIT_K > 1:
        flat = (split * rows + t[None, :]) * stored + w_rows[:, None]
        tl.store(parts + flat, acc, mask=(t[None, :] < rows) & (columns[:, None] < n))
    else:
        store_columns(y, acc, None, own_scale, own_bias, pid, rows, n, BLOCK_N, ROWS, ACT, y.dtype.element_ty)


@triton.jit
def dequantize_kernel(
    weight: tl.tensor,
    scale: tl.tensor,
    zero: tl.tensor,
    out: tl.tensor,
    w_stride: tl.tensor,
    stored: tl.tensor,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KIND: tl.constexpr,
    PER_RUN: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """W as plain rows, out [stored, K]: values rounded once. KIND fp8: e4m3 with a scale per 128 x 128."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    run = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    w_rows = tl.minimum(row, stored - 1)
    cols = run * 128 + columns_of(tl.arange(0, 128), KIND == "int4" or KIND == "mxfp4")
    if KIND == "fp8":
        at = weight + w_rows.to(tl.int64)[:, None] * w_stride + cols[None, :]
        wide = tl.load(at, mask=cols[None, :] < K, other=0.0).to(tl.float32)
        wide *= tl.load(scale + w_rows // 128 * ((K + 127) // 128) + run)[:, None]
    else:
        wide = run_tile(weight, scale, zero, w_rows, w_stride, stored, run, K, BLOCK_N, KIND, tl.float32, PER_RUN)
    if KIND == "int4" and PER_RUN == 1:
        wide *= tl.load(scale + run * stored + w_rows).to(tl.float32)[:, None]
    if KIND == "int8":
        wide *= tl.load(scale + w_rows)[:, None]
    at = out + row.to(tl.int64)[:, None] * K + cols[None, :]
    tl.store(at, wide.to(out.dtype.element_ty), mask=(row[:, None] < stored) & (cols[None, :] < K))
