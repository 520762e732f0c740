"""Row kernels for any number of rows: join, RMS norms, quantising to fp8, gated activation, embedding rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tokenspeed.kernels.triton.launch import dependent_launch, options
from tokenspeed.kernels.triton.operands import Norm, Rows
from tokenspeed.kernels.triton.rows import fp8_scale, gated, rstd, to_fp8

FP8 = torch.float8_e4m3fn
_ELEMENTS_PER_WARP, _QUANTIZED_PER_WARP = 512, 256
"""8B's step in fp8 at 8 / 32 / 128 sequences 2.859 / 3.607 / 7.302 ms, 2.871 / 3.625 / 7.327 by 512; Qwen3-30B-A3B's at
32 / 128 8.404 / 13.72 and 8.445 / 13.76. In bf16 8B's at 8 / 128 4.066 / 9.239 ms, 4.090 / 9.223 by 256."""
_ACT_COLUMNS = 1024
_TWIN = "quantized_twin"
MOST_EARLY_ROWS, MOST_EARLY_QUANTIZED_ROWS = 8, 64
"""Up to so many rows the projection that follows may start at once, and asks for weights meanwhile. A layer of 8B
at 4 rows: 105 us, 110 when it may start later; in e4m3 at 17 / 32 / 64 / 128 rows 71.2 / 69.8 / 76.6 / 88.8 and 75.3 /
73.8 / 79.2 / 89.3, the step at 9 / 12 / 16 2.91 / 2.94 / 3.08 and 2.94 / 3.01 / 3.14 ms; a layer in bf16 at 17 / 32 /
64 123.0 / 124.5 / 128.4 and 119.8 / 120.8 / 128.0."""


@triton.jit
def rows_kernel(
    x: tl.tensor,
    branch: tl.tensor,
    norm_weight: tl.tensor,
    branch_weight: tl.tensor,
    y: tl.tensor,
    y_scale: tl.tensor,
    joined: tl.tensor,
    x_stride: tl.tensor,
    branch_stride: tl.tensor,
    eps: tl.tensor,
    branch_eps: tl.tensor,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One program per row (axis 0) and head of K columns (axis 1). Writes what is not None: the sum with the branch,
    the normed row, and with y_scale the latter in e4m3 of that scale. EARLY: the next kernel may start at once."""
    if PDL and EARLY:
        gdc_launch_dependents()
    t, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    cols = tl.arange(0, BLOCK_K)
    inside = cols < K
    out_at = (t * tl.num_programs(1) + head) * K
    if norm_weight is not None:
        weight = tl.load(norm_weight + cols, mask=inside, other=0.0)
    if branch_weight is not None:
        branch_scale = tl.load(branch_weight + cols, mask=inside, other=0.0)
    if PDL:
        gdc_wait()
        if not EARLY:
            gdc_launch_dependents()
    value = tl.load(x + t * x_stride + head * K + cols, mask=inside, other=0.0)
    dtype: tl.constexpr = value.dtype
    if branch is not None:
        other = tl.load(branch + t * branch_stride + head * K + cols, mask=inside, other=0.0).to(tl.float32)
        if branch_weight is not None:
            other = (other * rstd(other, K, branch_eps) * branch_scale).to(dtype).to(tl.float32)
        value = (value.to(tl.float32) + other).to(dtype)
    if joined is not None:
        tl.store(joined + out_at + cols, value, mask=inside)
    if y is not None:
        wide = value.to(tl.float32)
        if norm_weight is not None:
            wide = (wide * rstd(wide, K, eps) * weight).to(dtype).to(tl.float32)
        if y_scale is not None:
            scale = fp8_scale(tl.max(tl.abs(wide), axis=0))
            tl.store(y_scale + t, scale)
            wide = to_fp8(wide, scale)
        tl.store(y + out_at + cols, wide.to(y.dtype.element_ty), mask=inside)


@triton.jit
def act_kernel(
    x: tl.tensor,
    y: tl.tensor,
    q: tl.tensor,
    q_scale: tl.tensor,
    x_stride: tl.tensor,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    ACT: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """y [rows, N] = act(left half) * right half of x [rows, 2N]; with q, the same in e4m3, a program holds a row."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    dtype: tl.constexpr = x.dtype.element_ty
    t = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < N
    gate = tl.load(x + t * x_stride + cols, mask=mask, other=0.0)
    up = tl.load(x + t * x_stride + N + cols, mask=mask, other=0.0)
    value = gated(gate, up, ACT, dtype).to(dtype)
    tl.store(y + t * N + cols, value, mask=mask)
    if q is not None:
        value = value.to(tl.float32)
        scale = fp8_scale(tl.max(tl.abs(value), axis=0))
        tl.store(q_scale + t, scale)
        tl.store(q + t * N + cols, to_fp8(value, scale), mask=mask)


@triton.jit
def embed_kernel(
    tokens: tl.tensor,
    table: tl.tensor,
    y: tl.tensor,
    t_stride: tl.tensor,
    vocab: tl.tensor,
    scale: tl.tensor,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """y [rows, K] = table[tokens] * scale; zeros for ids outside the table."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    dtype: tl.constexpr = y.dtype.element_ty
    t = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(tokens + t).to(tl.int64)
    known_columns = tl.where((token >= 0) & (token < vocab), K, 0)
    value = tl.load(table + token * t_stride + cols, mask=cols < known_columns, other=0.0)
    value = value.to(tl.float32) * scale
    tl.store(y + t * K + cols, value.to(dtype), mask=cols < K)


def norm_rows(
    x: torch.Tensor,
    norm: Norm | None,
    branch: torch.Tensor | None = None,
    branch_norm: Norm | None = None,
    quantize: bool = False,
) -> tuple[Rows, torch.Tensor | None]:
    """RMS norm (arXiv:1910.07467) of x [T, K], or of x plus a branch [T, K] that is normed first where asked.

    Returns the rows, normed, in the dtype of x or in e4m3 with a scale per row (absmax / 448), and the sum [T, K], or
    None without a branch. Without `norm` the rows are only joined and quantised. x and branch may be column slices.
    """
    rows, cols = x.shape
    y = torch.empty(rows, cols, dtype=FP8 if quantize else x.dtype, device=x.device)
    y_scale = torch.empty(rows, dtype=torch.float32, device=x.device) if quantize else None
    joined = None if branch is None else torch.empty(rows, cols, dtype=x.dtype, device=x.device)
    _launch_rows(x, branch, norm, branch_norm, y, y_scale, joined, heads=1)
    return Rows(y, y_scale), joined


def norm_heads(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    """RMS norm of each head of x [T, heads * width], width being that of the norm's weight. Dtype of x."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch_rows(x, None, norm, None, y, None, None, heads=x.shape[1] // norm.weight.numel())
    return y


def add_rows(x: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
    """x + branch, both [T, K], in the dtype of x."""
    joined = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch_rows(x, branch, None, None, None, None, joined, heads=1)
    return joined


def _launch_rows(
    x: torch.Tensor,
    branch: torch.Tensor | None,
    norm: Norm | None,
    branch_norm: Norm | None,
    y: torch.Tensor | None,
    y_scale: torch.Tensor | None,
    joined: torch.Tensor | None,
    heads: int,
) -> None:
    rows, width = x.shape[0], x.shape[1] // heads
    block = triton.next_power_of_2(width)
    rows_kernel[(rows, heads)](
        x,
        branch,
        None if norm is None else norm.weight,
        None if branch_norm is None else branch_norm.weight,
        y,
        y_scale,
        joined,
        x.stride(0),
        0 if branch is None else branch.stride(0),
        0.0 if norm is None else norm.eps,
        0.0 if branch_norm is None else branch_norm.eps,
        K=width,
        BLOCK_K=block,
        EARLY=rows <= (MOST_EARLY_ROWS if y_scale is None else MOST_EARLY_QUANTIZED_ROWS),
        **options(_warps(block, y_scale is not None), dependent_launch(x.device)),
    )


def act_mul(x: torch.Tensor, act: str, quantize: bool = False) -> torch.Tensor:
    """act(left half) * right half of x [T, 2N], act being silu or gelu_tanh; [T, N] in the dtype of x. quantize: it is
    kept in e4m3 as well, for `quantized_twin`."""
    rows, cols = x.shape[0], x.shape[1] // 2
    block = triton.next_power_of_2(cols) if quantize else min(_ACT_COLUMNS, triton.next_power_of_2(cols))
    y, q, scale = torch.empty(rows, cols, dtype=x.dtype, device=x.device), None, None
    if quantize:
        q = torch.empty(rows, cols, dtype=FP8, device=x.device)
        scale = torch.empty(rows, dtype=torch.float32, device=x.device)
        setattr(y, _TWIN, Rows(q, scale))
    grid = (rows, triton.cdiv(cols, block))
    launch = options(_warps(block), dependent_launch(x.device))
    act_kernel[grid](x, y, q, scale, x.stride(0), N=cols, BLOCK=block, ACT=act, **launch)
    return y


def quantized_twin(x: torch.Tensor) -> Rows | None:
    """The same rows in e4m3, where the kernel that made them has left some."""
    found: Rows | None = getattr(x, _TWIN, None)
    return found


def embed_rows(tokens: torch.Tensor, table: torch.Tensor, scale: float) -> torch.Tensor:
    """table[tokens] * scale, [T, K] in the dtype of the table; zeros for ids outside it. tokens: int32 or int64 [T]."""
    rows, (vocab, cols) = tokens.shape[0], table.shape
    block = min(_ACT_COLUMNS, triton.next_power_of_2(cols))
    y = torch.empty(rows, cols, dtype=table.dtype, device=table.device)
    grid = (rows, triton.cdiv(cols, block))
    launch = options(_warps(block), dependent_launch(table.device))
    rounded = torch.tensor(scale, dtype=table.dtype).item()  # as the reference does
    embed_kernel[grid](tokens, table, y, table.stride(0), vocab, rounded, K=cols, BLOCK=block, **launch)
    return y


def _warps(columns: int, quantized: bool = False) -> int:
    return max(1, min(16, columns // (_QUANTIZED_PER_WARP if quantized else _ELEMENTS_PER_WARP)))
