"""Launches of the kernels over int8, int4 and MXFP4 weights, and of those that make weights plain."""

from __future__ import annotations

import torch
import triton

from tokenspeed.kernels.triton.launch import dependent_launch, options
from tokenspeed.kernels.triton.packed import dequantize_kernel, packed_kernel
from tokenspeed.kernels.triton.skinny import add_parts_kernel
from tokenspeed.kernels.triton.tiles import PackedTile, packed_tile
from tokenspeed.quantization.fp8 import Fp8Weight
from tokenspeed.quantization.int4 import Int4Weight
from tokenspeed.quantization.int8 import Int8Weight
from tokenspeed.quantization.narrow import PackedWeight

_ADD_COLUMNS = 512
_BLOCK_N = 32


def kind_of(weight: PackedWeight) -> str:
    """int8, int4 or mxfp4."""
    if isinstance(weight, Int8Weight):
        return "int8"
    return "int4" if isinstance(weight, Int4Weight) else "mxfp4"


def zero_of(weight: PackedWeight) -> torch.Tensor | None:
    """Zero points, where it has them."""
    return weight.zero if isinstance(weight, Int4Weight) else None


def per_run_of(weight: PackedWeight) -> int:
    """Scales of a run of 128 columns, of int4."""
    return weight.per_run if isinstance(weight, Int4Weight) else 1


def packed_product(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None = None,
    act: str = "none",
    tile: PackedTile | None = None,
) -> torch.Tensor:
    """y [T, N] in the dtype of x [T, K], 1 to 64 rows that are already normed; weight [N, K], or [2N, K] with `act`."""
    (rows, cols), kind = x.shape, kind_of(weight)
    stored = weight.shape[0]
    padded = max(16, triton.next_power_of_2(rows))
    tile = tile or packed_tile(padded, stored, cols, kind)
    n = stored if act == "none" else stored // 2
    columns = tile.block_n if act == "none" else tile.block_n // 2
    pdl = tile.pdl and dependent_launch(x.device)
    y = torch.empty(rows, n, dtype=x.dtype, device=x.device)
    parts = None
    if tile.split_k > 1:
        parts = torch.empty(tile.split_k, rows, stored, dtype=torch.float32, device=x.device)
    packed_kernel[(triton.cdiv(n, columns), tile.split_k)](
        x,
        weight.q,
        weight.scale,
        zero_of(weight),
        bias,
        y,
        parts,
        x.stride(0),
        weight.q.stride(0),
        rows,
        n,
        K=cols,
        ROWS=padded,
        BLOCK_N=tile.block_n,
        SPLIT_K=tile.split_k,
        STAGES=tile.stages,
        PREFETCH=tile.prefetch,
        KIND=kind,
        PER_RUN=per_run_of(weight),
        ACT=act,
        **options(tile.warps, pdl),
    )
    if parts is not None:
        row_scale = weight.scale if kind == "int8" else None
        grid = (triton.cdiv(n, _ADD_COLUMNS), rows)
        add_parts_kernel[grid](
            parts,
            None,
            row_scale,
            bias,
            y,
            rows,
            n,
            SPLIT_K=tile.split_k,
            BLOCK=_ADD_COLUMNS,
            ACT=act,
            **options(4, pdl),
        )
    return y


def plain(weight: PackedWeight | Fp8Weight, dtype: torch.dtype) -> torch.Tensor:
    """A fresh [N, K] of `dtype`, values rounded once: `weight.dequantized` in one kernel; of fp8 with scales per
    block."""
    rows, cols = weight.shape
    out = torch.empty(rows, cols, dtype=dtype, device=weight.q.device)
    dequantize_kernel[(triton.cdiv(rows, _BLOCK_N), triton.cdiv(cols, 128))](
        weight.q,
        weight.scale,
        None if isinstance(weight, Fp8Weight) else zero_of(weight),
        out,
        weight.q.stride(0),
        rows,
        K=cols,
        BLOCK_N=_BLOCK_N,
        KIND="fp8" if isinstance(weight, Fp8Weight) else kind_of(weight),
        PER_RUN=1 if isinstance(weight, Fp8Weight) else per_run_of(weight),
        **options(4, dependent_launch(out.device)),
    )
    return out
