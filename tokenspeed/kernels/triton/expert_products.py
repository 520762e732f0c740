"""The chosen experts of many tokens on tensor cores: for each block of an expert's choices a tile of its weights.

W is the tall operand; the choices of a block are the columns of the product, gathered from the tokens' rows and put
back by their numbers. A token's choices are added up by another kernel (`expert_sums`).
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tokenspeed.kernels.triton.expert_gemv import expert_gate
from tokenspeed.kernels.triton.gemv import weight_rows
from tokenspeed.kernels.triton.prefetch import prefetch_rows


@triton.jit
def _tile_pair(w_at, x_at, cols, used, K: tl.constexpr, EVEN: tl.constexpr, POLICY: tl.constexpr):
    """Some columns of W [BLOCK_N, columns] and of the rows, transposed [columns, ROWS]."""
    if EVEN:
        w = tl.load(w_at[:, None] + cols[None, :], eviction_policy=POLICY)
        a = tl.load(x_at[None, :] + cols[:, None], mask=used[None, :], other=0.0)
    else:
        inside = cols < K
        w = tl.load(w_at[:, None] + cols[None, :], mask=inside[None, :], other=0.0, eviction_policy=POLICY)
        a = tl.load(x_at[None, :] + cols[:, None], mask=used[None, :] & inside[:, None], other=0.0)
    return w, a


@triton.jit
def _sums(w_at, x_at, scale_at, used, K: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
          BLOCK_K: tl.constexpr, STAGES: tl.constexpr, SCALE_BLOCK: tl.constexpr, POLICY: tl.constexpr):  # fmt: skip
    """W x [BLOCK_N, ROWS]. scale_at: where scales of blocks of columns begin, for each row of W."""
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_N, ROWS], tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        w, a = _tile_pair(w_at, x_at, start + k, used, K, K % BLOCK_K == 0, POLICY)
        if SCALE_BLOCK > 0:
            acc += tl.dot(w, a, input_precision="ieee") * tl.load(scale_at + start // SCALE_BLOCK)[:, None]
        else:
            acc = tl.dot(w, a, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=("n",))
def grouped_kernel(x, x_scale, weight, scale, bias, y, order, blocks, x_stride, n, alpha, limit,
                   CHOICES: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
                   BLOCK_K: tl.constexpr, STAGES: tl.constexpr, SCALE_BLOCK: tl.constexpr, ACT: tl.constexpr,
                   POLICY: tl.constexpr, PREFETCH: tl.constexpr, EARLY: tl.constexpr,
                   PDL: tl.constexpr) -> None:  # fmt: skip
    """y [choices, n] by W [experts, n or 2n, K], for the block of choices of axis 1: (expert, first place in `order`,
    choices). Choice c has the row c // CHOICES of x. e4m3 operands come with x_scale for each row of x and with `scale`
    [experts, rows of W] or per SCALE_BLOCK x SCALE_BLOCK elements of an expert's matrix. EARLY: the lists were there
    before the kernel in front began."""
    if PDL and not EARLY:
        gdc_wait()
        gdc_launch_dependents()
    block = blocks + tl.program_id(1) * 4
    expert = tl.load(block).to(tl.int64)
    stored = n if ACT == "none" else 2 * n
    w_rows, _ = weight_rows(tl.program_id(0), n, BLOCK_N, ACT)
    matrix_rows = tl.maximum(expert, 0) * stored + w_rows
    w_at = weight + matrix_rows * K
    own_scale = tl.load(scale + matrix_rows) if x_scale is not None and SCALE_BLOCK == 0 else None
    own_bias = tl.load(bias + matrix_rows) if bias is not None else None
    if PDL and EARLY:
        if PREFETCH > 0:
            prefetch_rows(w_at, 0, weight.dtype.element_ty.primitive_bitwidth // 8, PREFETCH)
        gdc_wait()
        gdc_launch_dependents()
    if expert < 0:
        return
    used = tl.arange(0, ROWS) < tl.load(block + 2)
    choice = tl.load(order + tl.load(block + 1) + tl.arange(0, ROWS), mask=used, other=0).to(tl.int64)
    row = choice // CHOICES
    own_x_scale = tl.load(x_scale + row, mask=used, other=0.0) if x_scale is not None else None
    scale_at = matrix_rows
    if SCALE_BLOCK > 0:
        blocks_of_k: tl.constexpr = (K + SCALE_BLOCK - 1) // SCALE_BLOCK
        blocks_of_n = (stored + SCALE_BLOCK - 1) // SCALE_BLOCK
        scale_at = scale + (expert * blocks_of_n + w_rows // SCALE_BLOCK) * blocks_of_k
    acc = _sums(w_at, x + row * x_stride, scale_at, used, K, ROWS, BLOCK_N, BLOCK_K, STAGES, SCALE_BLOCK, POLICY)
    if own_x_scale is not None:
        acc *= own_x_scale[None, :]
    if own_scale is not None:
        acc *= own_scale[:, None]
    dtype: tl.constexpr = y.dtype.element_ty
    if own_bias is not None:
        acc += own_bias.to(dtype).to(tl.float32)[:, None]
    if ACT == "none":
        column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        out = acc
    else:
        column = tl.program_id(0) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        gate, up = tl.split(tl.permute(tl.reshape(acc, [BLOCK_N // 2, 2, ROWS]), [0, 2, 1]))
        out = expert_gate(gate, up, alpha, limit, ACT, dtype)
    tl.store(y + choice[None, :] * n + column[:, None], out.to(dtype), mask=used[None, :] & (column < n)[:, None])
