"""The chosen experts of a few tokens, choice by choice: multiply-and-sum, each weight byte read once per choice.

Two kernels. The first has a program for some rows of gate and up of a choice. The second has one for some rows of down
of all choices of a token, weighs and adds them up in the order of choosing, and asks for its first weights before it
waits: it knows the experts, which were there before the kernel in front of it began.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tokenspeed.kernels.triton.gemv import PER_THREAD, weight_rows, weight_tile
from tokenspeed.kernels.triton.rows import fp8_scale, gated, load_columns, to_fp8

SHRUNK = tl.constexpr(256.0)
"""The exponents' offsets of float16 and e4m3 differ by 8."""


@triton.jit
def expert_gate(gate, up, alpha, limit, ACT: tl.constexpr, dtype: tl.constexpr):
    """What goes down, in float32: act(gate) * up, or the clamped variant of gpt-oss."""
    if ACT == "swiglu_clamped":
        gate = tl.minimum(gate.to(dtype).to(tl.float32), limit)
        up = tl.minimum(tl.maximum(up.to(dtype).to(tl.float32), -limit), limit)
        return gate * tl.sigmoid(alpha * gate) * (up + 1.0)
    else:
        return gated(gate, up, ACT, dtype)


@triton.jit
def _row_scale(x_at, tile, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """The e4m3 scale of a row."""
    largest = tl.zeros([1, BLOCK_K], tl.float32)
    for start in tl.static_range(0, K, BLOCK_K):
        cols = start + tile
        largest = tl.maximum(largest, tl.abs(load_columns(x_at + cols, cols, K, BLOCK_K).to(tl.float32)))
    return fp8_scale(tl.max(largest))


@triton.jit
def _widened(w, HALVES: tl.constexpr):
    """A tile of W in float32. HALVES: of e4m3, its values / SHRUNK, four at a time for NVIDIA GPUs: moved to their
    places in a float16, exponent and mantissa mean that, subnormals too. Conversions of e4m3 would bind the kernel."""
    if HALVES:
        half = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 low, high, a, b;
            prmt.b32 low, $2, 0, 0x1404;
            prmt.b32 high, $2, 0, 0x3424;
            shr.b32 a, low, 1;
            shr.b32 b, high, 1;
            and.b32 a, a, 0x3f803f80;
            and.b32 b, b, 0x3f803f80;
            lop3.b32 $0, low, 0x80008000, a, 0xea;
            lop3.b32 $1, high, 0x80008000, b, 0xea;
            }
            """,
            "=r,=r,r",
            [w.to(tl.int8, bitcast=True)],
            dtype=tl.float16,
            is_pure=True,
            pack=4,
        )
        return half.to(tl.float32)
    else:
        return w.to(tl.float32)


@triton.jit
def _products(x_at, w, cols, x_scale, NARROW: tl.constexpr, HALVES: tl.constexpr, K: tl.constexpr,
              BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """Sums [BLOCK_N, BLOCK_K / PER_THREAD] of a tile of W, or of its values / SHRUNK, times its columns of a row."""
    value = load_columns(x_at + cols, cols, K, BLOCK_K).to(tl.float32)
    if NARROW:
        value = to_fp8(value, x_scale).to(tl.float32)
    product = tl.reshape(value * _widened(w, HALVES), [BLOCK_N, BLOCK_K // PER_THREAD, PER_THREAD])
    return tl.sum(product, axis=2)


@triton.jit
def gate_up_kernel(x, ids, weight, scale, bias, y, x_stride, n, alpha, limit, CHOICES: tl.constexpr, K: tl.constexpr,
                   BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ACT: tl.constexpr,
                   HALVES: tl.constexpr, PDL: tl.constexpr) -> None:  # fmt: skip
    """y [choices, n] of x [tokens, K] by gate_up [experts, 2n, K]; with `scale` [experts, 2n] W is e4m3 and x is
    quantised per row. bias: float32 [experts, 2n]. Choices of no expert are left alone. HALVES: as `_widened`."""
    choice = tl.program_id(1).to(tl.int64)
    w_rows, _ = weight_rows(tl.program_id(0), n, BLOCK_N, ACT)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    expert = tl.load(ids + choice).to(tl.int64)
    if expert < 0:
        return
    w_rows = expert * 2 * n + w_rows
    w_at = weight + w_rows[:, None] * K
    x_at = x + choice // CHOICES * x_stride
    tile = tl.arange(0, BLOCK_K)[None, :]
    ahead = weight_tile(w_at, tile, K, BLOCK_K)
    x_scale = 1.0
    if scale is not None:
        x_scale = _row_scale(x_at, tile, K, BLOCK_K)
    acc = tl.zeros([BLOCK_N, BLOCK_K // PER_THREAD], tl.float32)
    for start in tl.static_range(0, K, BLOCK_K):
        current = ahead
        if start + BLOCK_K < K:
            ahead = weight_tile(w_at, start + BLOCK_K + tile, K, BLOCK_K)
        acc += _products(x_at, current, start + tile, x_scale, scale is not None, HALVES, K, BLOCK_N, BLOCK_K)
    out = tl.sum(acc, axis=1)
    dtype: tl.constexpr = y.dtype.element_ty
    if scale is not None:
        out *= x_scale * tl.load(scale + w_rows) * (SHRUNK if HALVES else 1.0)
    if bias is not None:
        out += tl.load(bias + w_rows).to(dtype).to(tl.float32)
    gate, up = tl.split(tl.reshape(out, [BLOCK_N // 2, 2]))
    column = tl.program_id(0) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
    tl.store(y + choice * n + column, expert_gate(gate, up, alpha, limit, ACT, dtype).to(dtype), mask=column < n)


@triton.jit
def down_kernel(x, ids, shares, weight, scale, bias, y, n, CHOICES: tl.constexpr, K: tl.constexpr,
                BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, HALVES: tl.constexpr,
                PDL: tl.constexpr) -> None:  # fmt: skip
    """y [tokens, n]: for each token the sum over its choices of share * (down x), of x [choices, K], down [experts, n,
    K] and shares [choices]; scale and bias as above, [experts, n]. A token without experts gets zeros."""
    first = tl.program_id(1).to(tl.int64) * CHOICES
    w_rows, columns = weight_rows(tl.program_id(0), n, BLOCK_N, "none")
    tile = tl.arange(0, BLOCK_K)[None, :]
    # The kernel in front lets this one start after its own wait, so what it reads of the router is there.
    live = tl.load(ids + first) >= 0
    expert = tl.maximum(tl.load(ids + first), 0).to(tl.int64)
    w_at = weight + (expert * n + w_rows)[:, None] * K
    ahead = weight_tile(w_at, tile, K, BLOCK_K)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    acc = tl.zeros([BLOCK_N, BLOCK_K // PER_THREAD], tl.float32)
    added = tl.zeros([BLOCK_N], tl.float32)
    for j in tl.static_range(CHOICES):
        x_at, factor, x_scale = x + (first + j) * K, tl.load(shares + first + j), 1.0
        own = expert * n + w_rows
        if bias is not None:
            added += factor * tl.load(bias + own).to(y.dtype.element_ty).to(tl.float32)
        factors = factor + tl.zeros([BLOCK_N, 1], tl.float32)
        if scale is not None:
            x_scale = _row_scale(x_at, tile, K, BLOCK_K)
            factors *= x_scale * tl.load(scale + own)[:, None] * (SHRUNK if HALVES else 1.0)
        for start in tl.static_range(0, K, BLOCK_K):
            current = ahead
            if start + BLOCK_K < K:
                ahead = weight_tile(w_at, start + BLOCK_K + tile, K, BLOCK_K)
            elif j + 1 < CHOICES:
                expert = tl.maximum(tl.load(ids + first + j + 1), 0).to(tl.int64)
                w_at = weight + (expert * n + w_rows)[:, None] * K
                ahead = weight_tile(w_at, tile, K, BLOCK_K)
            acc += factors * _products(
                x_at, current, start + tile, x_scale, scale is not None, HALVES, K, BLOCK_N, BLOCK_K
            )
    out = tl.where(live, tl.sum(acc, axis=1) + added, 0.0)
    tl.store(y + tl.program_id(1).to(tl.int64) * n + columns, out.to(y.dtype.element_ty), mask=columns < n)
