"""Child process: compiles the dense kernels for a target on real shapes and prints what their assembly holds as JSON.

python -m tests.kernels.triton.dense_launches TARGET SET
"""

from __future__ import annotations

import json
import sys
from functools import partial
from typing import Any

import torch

from tests.kernels.triton.compilation import recorded
from tokenspeed.kernels.triton import invariant_linear, linear, norm, packed_linear
from tokenspeed.kernels.triton.invariant_linear import project_invariant
from tokenspeed.kernels.triton.linear import project
from tokenspeed.kernels.triton.operands import Matrix, Norm, Prologue
from tokenspeed.quantization.fp8 import Fp8Weight
from tokenspeed.quantization.int4 import Int4Weight
from tokenspeed.quantization.int8 import Int8Weight
from tokenspeed.quantization.mxfp4 import Mxfp4Weight

NO_FP8 = ("sm_80", "gfx942")


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def fp8(rows: int, cols: int, block: bool = False) -> Fp8Weight:
    scale = (rows // 128, cols // 128) if block else (rows,)
    return Fp8Weight(meta(rows, cols, dtype=torch.float8_e4m3fn), meta(*scale, dtype=torch.float32))


def int8(rows: int, cols: int) -> Int8Weight:
    return Int8Weight(meta(rows, cols, dtype=torch.int8), meta(rows, dtype=torch.float32))


def int4(
    rows: int, cols: int, zeros: bool = False, per_run: int = 1, scales: torch.dtype = torch.bfloat16
) -> Int4Weight:
    shape = (cols // 128, rows) if per_run == 1 else (cols // 128, rows, per_run)
    zero = meta(*shape, dtype=torch.uint8) if zeros else None
    return Int4Weight(meta(rows, cols // 8, dtype=torch.int32), meta(*shape, dtype=scales), zero)


def mxfp4(rows: int, cols: int) -> Mxfp4Weight:
    runs = -(-cols // 128)
    return Mxfp4Weight(meta(rows, 16 * runs, dtype=torch.int32), meta(runs, rows, 4, dtype=torch.uint8), cols)


OF_FILES = (
    partial(int4, zeros=True),
    partial(int4, scales=torch.float16),
    partial(int4, per_run=2, zeros=True),
    partial(int4, per_run=4, scales=torch.float16),
)
PACKED = (int8, int4, partial(int4, zeros=True), mxfp4)


def vector(cols: int) -> torch.Tensor:
    return meta(cols, dtype=torch.float32)


def layer(rows: int, hidden: int, ff: int, weight: Any, dtype: torch.dtype, project: Any = project) -> None:
    """The projections of a layer, and those of one with branch norms and biases."""
    x, branch = meta(rows, hidden, dtype=dtype), meta(rows, hidden, dtype=dtype)
    plain = Norm(vector(hidden), 1e-5)
    project(x, weight(3 * hidden, hidden), vector(3 * hidden), prologue=Prologue(plain))
    project(x, weight(hidden, hidden))
    project(x, weight(2 * ff, hidden), act="silu", prologue=Prologue(plain, branch))
    project(meta(rows, ff, dtype=dtype), weight(hidden, ff))
    project(x, weight(2 * ff, hidden), act="gelu_tanh", prologue=Prologue(plain, branch, plain))


def row_kernels(dtype: torch.dtype) -> None:
    x = meta(100, 4096, dtype=dtype)
    norm.add_rows(x, x)
    norm.norm_heads(x, Norm(vector(128), 1e-6))
    norm.norm_rows(x, Norm(vector(4096), 1e-6), x, Norm(vector(4096), 1e-6))
    norm.act_mul(x, "silu")
    norm.embed_rows(meta(100, dtype=torch.int32), meta(1000, 4096, dtype=dtype), 64.0)


def quantised_rows() -> None:
    x = meta(100, 28672)
    norm.act_mul(x, "gelu_tanh", quantize=True)
    norm.norm_rows(x[:, :4096], Norm(vector(4096), 1e-6), x[:, :4096], quantize=True)
    norm.norm_rows(x, None, quantize=True)


def few(target: str) -> None:
    """One configuration of each kernel."""
    x = meta(1, 4096)
    prologue = Prologue(Norm(vector(4096), 1e-5), x)
    project(x, meta(28672, 4096), act="silu", prologue=prologue)
    project(meta(32, 4096), meta(4096, 4096), vector(4096))
    project(meta(64, 4096), meta(28672, 4096), act="silu")
    for packed in (int4, mxfp4):
        project(meta(32, 4096), packed(4096, 4096))
    project(meta(64, 4096), int8(28672, 4096), act="silu")
    for narrow in (int4(4096, 4096), int4(4096, 4096, zeros=True, per_run=4)):
        packed_linear.plain(narrow, torch.bfloat16)
    project_invariant(x, meta(4096, 4096), prologue=prologue)
    row_kernels(torch.bfloat16)
    if target not in NO_FP8:
        project(x, fp8(6144, 4096), prologue=prologue)
        project(meta(64, 4096), fp8(28672, 4096), act="silu")
        packed_linear.plain(fp8(4096, 4096, block=True), torch.bfloat16)
        project_invariant(meta(999, 4096), fp8(28672, 4096), act="silu")


def product(target: str) -> None:
    """Every path, dtype and padded row count."""

    def plain(rows: int, cols: int) -> Matrix:
        return meta(rows, cols, dtype=dtype)

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for rows in (1, 2, 8, 64) if dtype == torch.bfloat16 else (1, 64):
            layer(rows, 2048, 8192, plain, dtype)
        layer(2, 640, 2048, plain, dtype)
        for rows in (1, 300) if dtype == torch.bfloat16 else (300,):
            layer(rows, 2048, 8192, plain, dtype, project_invariant)
        row_kernels(dtype)
    for packed in PACKED:
        for rows in (1, 8, 64, 100):
            layer(rows, 4096, 14336, packed, torch.bfloat16)
        layer(33, 4096, 14336, packed, torch.float16)
    for packed in OF_FILES:
        project(meta(9, 4096), packed(4096, 4096))
        packed_linear.plain(packed(4096, 4096), torch.bfloat16)
    project(meta(9, 2880), mxfp4(5120, 2880))
    project(meta(9, 2880), int8(5120, 2880))
    if target not in NO_FP8:
        quantised_rows()
        for rows in (1, 8, 64):
            layer(rows, 4096, 14336, fp8, torch.bfloat16)
        project(meta(9, 4096), fp8(6144, 4096, block=True))
        packed_linear.plain(fp8(6144, 4096, block=True), torch.bfloat16)
        for rows in (1, 300):
            layer(rows, 4096, 14336, fp8, torch.bfloat16, project_invariant)
            project_invariant(meta(rows, 4096), fp8(6144, 4096, block=True))


def main() -> None:
    target, which = sys.argv[1:]
    # Kernels of a target without dependent launch are compiled as they are launched there.
    ahead = target in ("sm_90", "sm_100")
    for module in (linear, norm, invariant_linear, packed_linear):
        module.dependent_launch = lambda device: ahead  # type: ignore[attr-defined]
    with recorded(target) as kernels:
        {"few": few, "each": few, "product": product}[which](target)
    print(json.dumps(kernels))


if __name__ == "__main__":
    main()
