"""Products of the chosen experts' MXFP4 weights: a block of an expert's choices, or one choice, at a time.

A run of 128 columns of W is 32 words of four codes (`quantization.mxfp4_experts`). They are widened in registers to the
four blocks of the run, as the left operands of four products; the right ones are the choices' rows.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tokenspeed.kernels.triton.expert_gemv import expert_gate
from tokenspeed.kernels.triton.gemv import weight_rows
from tokenspeed.kernels.triton.mxfp4_codes import UNSCALED, quarters
from tokenspeed.kernels.triton.prefetch import prefetch_rows


@triton.jit
def _columns(x_at, cols, used, K: tl.constexpr):
    """Some columns of the rows, transposed [columns, ROWS]."""
    if K % 128 == 0:
        return tl.load(x_at[None, :] + cols[:, None], mask=used[None, :], other=0.0)
    else:
        return tl.load(x_at[None, :] + cols[:, None], mask=used[None, :] & (cols < K)[:, None], other=0.0)


@triton.jit
def _packed_sums(w_at, scale_at, scale_stride, x_at, used, first_run, last_run, K: tl.constexpr, ROWS: tl.constexpr,
                 BLOCK_N: tl.constexpr, STAGES: tl.constexpr, POLICY: tl.constexpr, FAST: tl.constexpr,
                 dtype: tl.constexpr):  # fmt: skip
    """W x [BLOCK_N, ROWS] of some runs of the columns. w_at, scale_at: where words and exponents of each row of W
    begin; the latter of the next run lie scale_stride further on."""
    word = tl.arange(0, 32)
    acc = tl.zeros([BLOCK_N, ROWS], tl.float32)
    for run in tl.range(first_run, last_run, num_stages=STAGES):
        words = tl.load(w_at[:, None] + (run * 32 + word)[None, :], eviction_policy=POLICY)
        exponents = tl.load(scale_at + run * scale_stride)
        first, second, third, fourth = quarters(words, exponents, FAST, dtype)
        cols = run * 128 + word
        acc = tl.dot(first, _columns(x_at, cols, used, K), acc, input_precision="ieee")
        acc = tl.dot(second, _columns(x_at, cols + 32, used, K), acc, input_precision="ieee")
        acc = tl.dot(third, _columns(x_at, cols + 64, used, K), acc, input_precision="ieee")
        acc = tl.dot(fourth, _columns(x_at, cols + 96, used, K), acc, input_precision="ieee")
    if FAST:
        acc *= UNSCALED
    return acc


@triton.jit(do_not_specialize=("n",))
def packed_experts_kernel(x, weight, scale, bias, y, order, blocks, x_stride, n, alpha, limit, CHOICES: tl.constexpr,
                          K: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
                          ACT: tl.constexpr, POLICY: tl.constexpr, PREFETCH: tl.constexpr, EARLY: tl.constexpr,
                          FAST: tl.constexpr, PDL: tl.constexpr) -> None:  # fmt: skip
    """y [choices, n] by W [experts, n or 2n, K] of MXFP4, words `weight` and exponents `scale`, for the block of
    choices of axis 1: (expert, first place in `order`, choices). Choice c has the row c // CHOICES of x. EARLY: the
    lists were there before the kernel in front began. FAST: as `quarters`."""
    if PDL and not EARLY:
        gdc_wait()
        gdc_launch_dependents()
    block, number = blocks + tl.program_id(1) * 4, tl.arange(0, ROWS)
    expert = tl.load(block).to(tl.int64)
    stored = n if ACT == "none" else 2 * n
    w_rows, _ = weight_rows(tl.program_id(0), n, BLOCK_N, ACT)
    RUNS: tl.constexpr = (K + 127) // 128
    there = tl.maximum(expert, 0)
    matrix_rows = there * stored + w_rows
    w_at = weight + matrix_rows * (RUNS * 32)
    own_bias = tl.load(bias + matrix_rows) if bias is not None else None
    if PDL and EARLY:
        if PREFETCH > 0:
            prefetch_rows(w_at, 0, 2, PREFETCH // 2)
        gdc_wait()
        gdc_launch_dependents()
    if expert < 0:
        return
    used = number < tl.load(block + 2)
    choice = tl.load(order + tl.load(block + 1) + number, mask=used, other=0).to(tl.int64)
    x_at = x + choice // CHOICES * x_stride
    scale_at = scale + there * RUNS * stored + w_rows
    acc = _packed_sums(w_at, scale_at, stored, x_at, used, 0, RUNS, K, ROWS, BLOCK_N, STAGES, POLICY, FAST,
                       x.dtype.element_ty)  # fmt: skip
    dtype: tl.constexpr = y.dtype.element_ty
    if own_bias is not None:
        acc += own_bias.to(x.dtype.element_ty).to(tl.float32)[:, None]
    if ACT == "none":
        column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        out = acc
    else:
        column = tl.program_id(0) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        gate, up = tl.split(tl.permute(tl.reshape(acc, [BLOCK_N // 2, 2, ROWS]), [0, 2, 1]))
        out = expert_gate(gate, up, alpha, limit, ACT, dtype)
    tl.store(y + choice[None, :] * n + column[:, None], out.to(dtype), mask=used[None, :] & (column < n)[:, None])


@triton.jit(do_not_specialize=("n",))
def packed_choice_kernel(x, weight, scale, bias, parts, y, ids, shares, counters, x_stride, n, alpha, limit,
                         CHOICES: tl.constexpr, GROUP: tl.constexpr, SPLITS: tl.constexpr, K: tl.constexpr,
                         ROWS: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, ACT: tl.constexpr,
                         POLICY: tl.constexpr, PREFETCH: tl.constexpr, EARLY: tl.constexpr, FAST: tl.constexpr,
                         PDL: tl.constexpr) -> None:  # fmt: skip
    """The choice of axis 1, whose expert is in `ids`, by W as above; axis 2: of SPLITS parts of the columns. Who ends
    last of the programs of GROUP choices in a row adds up what all have left in `parts`, float32 [choices, SPLITS, rows
    of W], in order: with ACT, y [choices, n] of one choice each, left alone without an expert; else y [choices / GROUP,
    n], the sum of share * part, zeros without experts. counters [groups, programs of axis 0]: zeros before and after.
    """
    if PDL and not EARLY:
        gdc_wait()
        gdc_launch_dependents()
    tile, at, split, number = tl.program_id(0), tl.program_id(1), tl.program_id(2), tl.arange(0, ROWS)
    expert = tl.load(ids + at).to(tl.int64)
    there = tl.maximum(expert, 0)
    stored = n if ACT == "none" else 2 * n
    w_rows, column = weight_rows(tile, n, BLOCK_N, ACT)
    RUNS: tl.constexpr = (K + 127) // 128
    SPAN: tl.constexpr = (RUNS + SPLITS - 1) // SPLITS
    matrix_rows = there * stored + w_rows
    w_at = weight + matrix_rows * (RUNS * 32)
    own_bias = tl.load(bias + matrix_rows) if bias is not None else None
    if PDL and EARLY:
        if PREFETCH > 0:
            prefetch_rows(w_at, split * SPAN * 32, 2, PREFETCH // 2)
        gdc_wait()
        gdc_launch_dependents()
    if expert >= 0:
        used = number < 1
        x_at = x + (number + at).to(tl.int64) // CHOICES * x_stride
        scale_at = scale + there * RUNS * stored + w_rows
        acc = _packed_sums(w_at, scale_at, stored, x_at, used, split * SPAN, tl.minimum(split * SPAN + SPAN, RUNS), K,
                           ROWS, BLOCK_N, STAGES, POLICY, FAST, x.dtype.element_ty)  # fmt: skip
        if own_bias is not None:
            own = own_bias.to(x.dtype.element_ty).to(tl.float32)
            acc += tl.where(split == 0, own, 0.0)[:, None]
        to = parts + (at.to(tl.int64) * SPLITS + split) * stored + (number * 0)[None, :] + w_rows[:, None]
        tl.store(to, acc, mask=used[None, :] & (column < n)[:, None])
    tl.debug_barrier()
    group = (at // GROUP).to(tl.int64)
    counter = counters + group * tl.num_programs(0) + tile
    if tl.atomic_add(counter, 1, sem="acq_rel") == GROUP * SPLITS - 1:
        tl.store(counter, 0)
        first = group * GROUP
        # Nobody has written parts without experts.
        last = tl.where(tl.load(ids + first) >= 0, n, 0)
        total = tl.zeros([BLOCK_N], tl.float32)
        for j in tl.static_range(GROUP * SPLITS):
            part = parts + (first * SPLITS + j) * stored + w_rows
            share = tl.load(shares + first + j // SPLITS) if ACT == "none" else 1.0
            total += share * tl.load(part, mask=column < last, other=0.0, cache_modifier=".cg")
        dtype: tl.constexpr = y.dtype.element_ty
        if ACT == "none":
            tl.store(y + group * n + column, total.to(dtype), mask=column < n)
        else:
            gate, up = tl.split(tl.reshape(total, [BLOCK_N // 2, 2]))
            outputs = tile * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
            out = expert_gate(gate, up, alpha, limit, ACT, dtype)
            tl.store(y + group * n + outputs, out.to(dtype), mask=outputs < last)
