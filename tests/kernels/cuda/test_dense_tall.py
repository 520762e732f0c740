"""The kernel of projections of 9 to 64 rows compiles without spills, asks for weights before it waits and converts
none; what it takes. What it computes is checked on a GPU: `python -m tokenspeed.bench.gpu.chain --rows 9 17 32 64`."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from tests.kernels.cuda.nvrtc import compile_
from tokenspeed.kernels.cuda.dense_tall import CLUSTERS, MOST_SHARED, Variant, tall_rows, variant
from tokenspeed.kernels.triton.operands import Rows
from tokenspeed.quantization.fp8 import quantize_fp8
from tokenspeed.quantization.int8 import quantize_int8

SHAPES = [(3072, 2048), (2048, 2048), (2048, 8192), (6144, 4096), (4096, 4096), (4096, 14336), (5120, 2880)]
"""Of 1B and 8B, but gate and up, which other kernels have; of gpt-oss-20b."""
PRODUCT = {False: "m64n{}k16.f32.bf16.bf16", True: "m64n{}k32.f32.e4m3.e4m3"}


def check(found: Variant, narrow: bool) -> None:
    log, ptx = compile_("dense_tall", found.defines(), "sm_90a")
    assert " 0 bytes spill stores, 0 bytes spill loads" in log
    start, copy, wait = (
        ptx.index(each) for each in ("griddepcontrol.launch", "cp.async.bulk.tensor.5d", "griddepcontrol.wait")
    )
    assert start < copy < wait
    assert ptx.count(f"wgmma.mma_async.sync.aligned.{PRODUCT[narrow].format(found.tokens)}") == 4
    assert "cvt.rn.f16x2.e4m3x2" not in ptx
    assert ("st.async" in ptx) == (found.splits > 1)
    assert found.shared <= MOST_SHARED


@pytest.mark.parametrize("narrow", [False, True])
def test_llama(narrow: bool) -> None:
    found = variant(32, 4096, 14336, narrow)
    assert found is not None
    assert found.splits == 3
    check(found, narrow)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "tokens", "narrow"),
    [each for each in product(SHAPES, [9, 17, 64], [False, True]) if variant(each[1], *each[0], each[2])],
)
def test_every_variant(shape: tuple[int, int], tokens: int, narrow: bool) -> None:
    found = variant(tokens, *shape, narrow)
    assert found is not None
    assert found.tiles <= CLUSTERS[found.splits]
    check(found, narrow)


def test_what_is_taken() -> None:
    cases = [(16, True), (32, False), (33, False), (17, True), (64, True)]
    taken = [[shape for shape in SHAPES if variant(tokens, *shape, narrow)] for tokens, narrow in cases]
    assert taken == [
        [(3072, 2048), (2048, 2048), (2048, 8192), (4096, 4096)],
        [shape for shape in SHAPES if shape[0] <= 4096],
        [shape for shape in SHAPES if shape[1] != 14336],
        [shape for shape in SHAPES if shape[1] != 2880],
        [shape for shape in SHAPES if shape[1] != 2880],
    ]


def test_what_is_not_taken() -> None:
    assert variant(8, 2048, 2048, True) is None
    assert variant(16, 2048, 2048, False) is None
    assert variant(65, 2048, 2048, False) is None
    assert variant(32, 28672, 4096, True) is None  # gate and up
    assert variant(32, 2047, 2048, False) is None  # two outputs are written at once
    assert variant(32, 2048, 2048 + 32, False) is None  # a line of 128 bytes is copied
    x, w = torch.zeros(32, 2048).bfloat16(), torch.zeros(256, 2048).bfloat16()
    assert tall_rows(Rows(x), w, None, "silu") is None
    assert tall_rows(Rows(x), quantize_int8(w)) is None
    assert tall_rows(Rows(x), quantize_fp8(w)) is None  # rows that are not quantised
    assert tall_rows(Rows(torch.zeros(32, 2052).bfloat16()[:, 4:]), w) is None  # rows that begin anywhere
