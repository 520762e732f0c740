"""Child process: compiles routers and experts for a target on real shapes and prints what their assembly holds as JSON.

python -m tests.kernels.triton.expert_launches TARGET SET
"""

from __future__ import annotations

import json
import sys
from typing import Any
from unittest import mock

import torch

from tests.kernels.triton.compilation import recorded
from tests.kernels.triton.dense_launches import NO_FP8, meta
from tokenspeed.kernels.triton import experts as module
from tokenspeed.kernels.triton import norm, packed_experts
from tokenspeed.kernels.triton import route as router
from tokenspeed.kernels.triton import router as fused
from tokenspeed.kernels.triton.expert_operands import Experts
from tokenspeed.kernels.triton.expert_sums import combine
from tokenspeed.kernels.triton.expert_tiles import packed_tile_of, tile_of
from tokenspeed.kernels.triton.experts import run_experts
from tokenspeed.kernels.triton.operands import Norm, Prologue
from tokenspeed.kernels.triton.route import Noise, route
from tokenspeed.quantization.fp8 import Fp8Weight
from tokenspeed.quantization.mxfp4_experts import Mxfp4Experts

FP32, BF16 = torch.float32, torch.bfloat16


ATTRS: dict[str, Any] = {
    "k": 8, "score": "softmax", "renormalize": True, "groups": 1, "kept_groups": 1, "scale": 1.0
}  # fmt: skip


def weight(fmt: str, dtype: torch.dtype, *shape: int) -> Any:
    """fmt: "plain", "mxfp4", "channel" or "block"."""
    if fmt == "mxfp4":
        runs = -(-shape[2] // 128)
        words, scales = (
            meta(*shape[:2], runs * 32, dtype=torch.int16),
            meta(shape[0], runs, shape[1], dtype=torch.int32),
        )
        return Mxfp4Experts(words, scales, shape[2])
    if fmt == "plain":
        return meta(*shape, dtype=dtype)
    scale = (shape[0], shape[1] // 128, shape[2] // 128) if fmt == "block" else shape[:2]
    return Fp8Weight(meta(*shape, dtype=torch.float8_e4m3fn), meta(*scale, dtype=FP32))


def layer(rows: int, shape: tuple[int, int, int, int], fmt: str = "plain", act: str = "silu", biased: bool = False,
          dtype: torch.dtype = BF16, same: bool = False) -> None:  # fmt: skip
    """shape: experts, k, hidden, ff. same: by the tile of batch-invariant mode."""
    count, k, hidden, ff = shape
    given = Experts(
        weight(fmt, dtype, count, 2 * ff, hidden),
        weight(fmt, dtype, count, hidden, ff),
        act,
        meta(count, 2 * ff, dtype=FP32) if biased else None,
        meta(count, hidden, dtype=FP32) if biased else None,
        1.702,
        7.0,
    )
    ids, shares = meta(rows, k, dtype=torch.int32), meta(rows, k, dtype=FP32)
    item, block = (2 if fmt == "plain" else 1), 128 if fmt == "block" else 0
    tile = packed_tile_of(64) if fmt == "mxfp4" else tile_of(64, item, block)
    counters = meta(rows * hidden, dtype=torch.int32)
    with mock.patch.object(packed_experts, "_counters", return_value=counters):
        run_experts(meta(rows, hidden, dtype=dtype), ids, shares, given, tile if same else None)


def fused_router(
    rows: int, hidden: int, experts: int, dtype: torch.dtype, attrs: dict[str, Any], seed: int | None = None
) -> None:
    """With a join; a bias and a correction where scores are sigmoids; a seed: by noise."""
    x, norm = meta(rows, hidden, dtype=dtype), Norm(meta(hidden, dtype=FP32), 1e-6)
    extra = meta(experts, dtype=FP32) if attrs["score"] == "sigmoid" else None
    weight = meta(experts, hidden, dtype=dtype)
    with mock.patch.object(fused, "_counters", return_value=meta(rows, dtype=torch.int32)):
        slots = meta(rows, dtype=torch.int32)
        noise = None if seed is None else Noise(slots, seed)
        fused.route_rows(x, Prologue(norm, x), weight, extra, extra, attrs, slots, noise)


def routers(rows: int) -> None:
    """Every kind of score, with groups and a bias."""
    slots = meta(rows, dtype=torch.int32)
    route(meta(rows, 128), None, ATTRS, slots)
    route(meta(rows, 32), None, ATTRS | {"k": 4, "score": "logits"}, slots)
    groups = ATTRS | {"score": "sigmoid", "groups": 8, "kept_groups": 4, "scale": 2.5}
    route(meta(rows, 256, dtype=FP32), meta(256, dtype=FP32), groups)
    route(meta(rows, 512), None, ATTRS | {"renormalize": False, "k": 10}, slots)
    for dtype in (BF16, FP32):
        fused_router(rows, 2048, 128, dtype, ATTRS)
        fused_router(rows, 6144, 256, dtype, groups)


QWEN, MIXTRAL, GPT_OSS, MINIMAX = (128, 8, 2048, 768), (8, 2, 4096, 14336), (32, 4, 2880, 2880), (256, 8, 3072, 1536)

AHEAD = ("sm_90", "sm_100")
"""Targets with dependent launch; kernels of others are compiled as they are launched there."""


def few(target: str) -> None:
    """The kernels of a decode step."""
    for seed in (None, 1, 3):  # the compiler is given a seed of 1 as a constant
        fused_router(1, 2048, 128, BF16, ATTRS, seed)
    layer(1, QWEN)
    if target not in NO_FP8:
        layer(8, QWEN, "channel")
    for rows in (1, 8):
        layer(rows, GPT_OSS, "mxfp4", "swiglu_clamped", True)
    ids, shares = meta(8, 4, dtype=torch.int32), meta(8, 4, dtype=FP32)
    if target in AHEAD:
        combine(meta(32, 2880, dtype=FP32), ids, shares, BF16, True, early=True)


def each(target: str) -> None:
    """Every kernel."""
    few(target)
    route(meta(3, 128), None, ATTRS, meta(3, dtype=torch.int32))
    layer(300, QWEN)
    layer(1000, GPT_OSS, "mxfp4", "swiglu_clamped", True)


def product(target: str) -> None:
    """Every path, dtype and number of choices in a block."""
    routers(3)
    for dtype in (BF16, torch.float16, FP32):
        for rows in (1, 8, 300, 1000, 4096) if dtype == BF16 else (1, 300):
            layer(rows, QWEN, dtype=dtype)
    for rows in (1, 4, 50):
        layer(rows, GPT_OSS, act="swiglu_clamped", biased=True)
        layer(rows, MIXTRAL, act="gelu_tanh")
    layer(5000, QWEN, same=True)
    layer(5000, GPT_OSS, "mxfp4", "swiglu_clamped", True, same=True)
    for dtype in (BF16, torch.float16, FP32):
        for rows in (1, 8, 32, 128, 300, 1000) if dtype == BF16 else (1, 300):
            layer(rows, GPT_OSS, "mxfp4", "swiglu_clamped", True, dtype)
            layer(rows, QWEN, "mxfp4", dtype=dtype)
    if target not in NO_FP8:
        for rows in (1, 8, 300, 1000, 4096):
            layer(rows, QWEN, "channel")
            layer(rows, MINIMAX, "block")


def main() -> None:
    target, which = sys.argv[1:]
    for changed in (module, norm, packed_experts, router, fused):
        changed.dependent_launch = lambda device: target in AHEAD  # type: ignore[attr-defined]
    with recorded(target) as kernels:
        {"few": few, "each": each, "product": product}[which](target)
    print(json.dumps(kernels))


if __name__ == "__main__":
    main()
