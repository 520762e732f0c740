"""What kernels do to activation rows, as device functions: residual join, RMS norms, activations, fp8 steps.

Rounding points are those of the torch references: whatever a reference gives back is rounded to the compute dtype
here as well, and all arithmetic between is float32. Rows are tiles whose last axis runs over columns; `x_at` and
`branch_at` are element offsets of the rows, with an axis of size one for the columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

FP8_MAX = tl.constexpr(448.0)
"""Largest finite e4m3 value (arXiv:2209.05433)."""
FP8_TINY = tl.constexpr(1e-12)
"""A row smaller than this is quantised as if it reached this far, so that no scale is zero."""


@triton.jit
def load_columns(pointers: tl.tensor, cols: tl.tensor, K: tl.constexpr, BLOCK_K: tl.constexpr) -> tl.tensor:
    """Load with a mask only where tiles do not fit the columns."""
    if K % BLOCK_K == 0:
        return tl.load(pointers, eviction_policy="evict_last")
    else:
        return tl.load(pointers, mask=cols < K, other=0.0, eviction_policy="evict_last")


@triton.jit
def residual(
    x: tl.tensor,
    branch: tl.tensor,
    branch_weight: tl.tensor,
    x_at: tl.tensor,
    branch_at: tl.tensor,
    branch_rstd: tl.tensor,
    cols: tl.tensor,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """x, or x + branch, or x + norm(branch), rounded to the compute dtype."""
    value = load_columns(x + x_at + cols, cols, K, BLOCK_K)
    if branch is not None:
        other = load_columns(branch + branch_at + cols, cols, K, BLOCK_K).to(tl.float32)
        if branch_weight is not None:
            weight = load_columns(branch_weight + cols, cols, K, BLOCK_K)
            other = (other * branch_rstd * weight).to(value.dtype).to(tl.float32)
        value = (value.to(tl.float32) + other).to(value.dtype)
    return value


@triton.jit
def activation(
    x: tl.tensor,
    branch: tl.tensor,
    branch_weight: tl.tensor,
    norm_weight: tl.tensor,
    x_at: tl.tensor,
    branch_at: tl.tensor,
    branch_rstd: tl.tensor,
    rstd: tl.tensor,
    cols: tl.tensor,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """The joined and normed tile, rounded to the compute dtype, in float32."""
    value = residual(x, branch, branch_weight, x_at, branch_at, branch_rstd, cols, K, BLOCK_K)
    if norm_weight is not None:
        weight = load_columns(norm_weight + cols, cols, K, BLOCK_K)
        value = (value.to(tl.float32) * rstd * weight).to(value.dtype)
    return value.to(tl.float32)


@triton.jit
def rms_factors(
    x: tl.tensor,
    branch: tl.tensor,
    branch_weight: tl.tensor,
    norm_weight: tl.tensor,
    x_at: tl.tensor,
    branch_at: tl.tensor,
    eps: tl.tensor,
    branch_eps: tl.tensor,
    tile: tl.tensor,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """1 / rms of the branch and of the joined row; 1 where there is no such norm. `tile` gives columns and shape."""
    squares = tl.zeros_like((x_at + tile).to(tl.float32))
    rstd = tl.sum(squares, axis=-1, keep_dims=True) + 1.0
    branch_rstd = rstd
    if branch_weight is not None:
        for start in tl.static_range(0, K, BLOCK_K):
            cols = start + tile
            value = load_columns(branch + branch_at + cols, cols, K, BLOCK_K).to(tl.float32)
            squares += value * value
        branch_rstd = tl.rsqrt(tl.sum(squares, axis=-1, keep_dims=True) / K + branch_eps)
        squares *= 0.0
    if norm_weight is not None:
        for start in tl.static_range(0, K, BLOCK_K):
            cols = start + tile
            value = residual(x, branch, branch_weight, x_at, branch_at, branch_rstd, cols, K, BLOCK_K).to(tl.float32)
            squares += value * value
        rstd = tl.rsqrt(tl.sum(squares, axis=-1, keep_dims=True) / K + eps)
    return branch_rstd, rstd


@triton.jit
def rstd(value: tl.tensor, K: tl.constexpr, eps: tl.tensor) -> tl.tensor:
    """1 / rms of a whole row of K float32 columns, zeros beyond them."""
    return tl.rsqrt(tl.sum(value * value, axis=0) / K + eps)


@triton.jit
def fp8_scale(largest: tl.tensor) -> tl.tensor:
    """Scale of a row whose largest magnitude is `largest`: the row divided by it fills e4m3."""
    return tl.maximum(largest, FP8_TINY) / FP8_MAX


@triton.jit
def to_fp8(value: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """value / scale in e4m3, saturated, to nearest even."""
    scaled = value * (1.0 / scale)
    return tl.minimum(tl.maximum(scaled, -FP8_MAX), FP8_MAX).to(tl.float8e4nv)


@triton.jit
def gated(gate: tl.tensor, up: tl.tensor, ACT: tl.constexpr, dtype: tl.constexpr) -> tl.tensor:
    """act(gate) * up in float32 with the references' roundings to `dtype` in between. gelu_tanh is x sigmoid(2z) of
    z = sqrt(2/pi) (x + 0.044715 x^3) (arXiv:1606.08415)."""
    gate = gate.to(dtype).to(tl.float32)
    up = up.to(dtype).to(tl.float32)
    if ACT == "silu":
        opened = gate * tl.sigmoid(gate)
    else:
        opened = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    return opened.to(dtype).to(tl.float32) * up
