"""Projections by int8, int4 and MXFP4 weights in the interpreter against float64 of the values they stand for."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.triton.dense_reference import prepared, projected, random_prologue
from tests.kernels.triton.test_dense_projection import check, check_sum, inputs, matrix
from tests.seeds import SEED
from tokenspeed.kernels.registry import Registry, Situation
from tokenspeed.kernels.triton import dense
from tokenspeed.kernels.triton.invariant_linear import project_invariant
from tokenspeed.kernels.triton.linear import project
from tokenspeed.kernels.triton.packed_linear import packed_product, plain
from tokenspeed.kernels.triton.tiles import PackedTile, packed_tile
from tokenspeed.ops.definitions import Operands
from tokenspeed.quantization.fp8 import quantize_fp8
from tokenspeed.quantization.int4 import Int4Weight, int4_weight
from tokenspeed.quantization.narrow import FORMATS, PackedWeight, narrow

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
KINDS = ("int8", "int4", "int4 zeros", "mxfp4")


def generator(*key: int) -> torch.Generator:
    return torch.Generator().manual_seed(SEED + sum(31**i * k for i, k in enumerate(key)))


def packed(kind: str, rows: int, cols: int, g: torch.Generator) -> PackedWeight:
    """Rows of different size; with zero points, codes that a file may have."""
    if kind == "int4 zeros":
        codes = torch.randint(0, 16, (rows, cols), generator=g)
        groups = (rows, cols // 128)
        scale = ((torch.rand(*groups, generator=g) + 0.1) / cols**0.5 / 4).bfloat16()
        return int4_weight(codes, scale, torch.randint(0, 16, groups, generator=g))
    made = narrow(matrix(rows, cols, FP32, g), kind, "w")
    assert isinstance(made, PackedWeight)
    return made


def columns(kind: str, fitting: int, ragged: int) -> int:
    return {"int8": ragged, "mxfp4": ragged // 32 * 32}.get(kind, fitting)


def check_product(kind: str, dtype: torch.dtype, split: int, act: str, rows: int, n: int, cols: int) -> None:
    g = generator(rows, n, split)
    stored = n if act == "none" else 2 * n
    x, w = inputs(rows, cols, dtype, g), packed(kind, stored, cols, g)
    bias = torch.randn(stored, generator=g)
    y = packed_product(x, w, bias, act, PackedTile(16, split, 4, 2))
    check(y, *projected(x, w, bias, act))


pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")
SHAPES = [("none", 1, 37, 256, 301), ("silu", 16, 24, 384, 400), ("gelu_tanh", 33, 9, 128, 100)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype, split, shape", [(BF16, 1, SHAPES[0]), (FP16, 2, SHAPES[1]), (FP32, 1, SHAPES[2])])
def test_products(kind: str, dtype: torch.dtype, split: int, shape: tuple[str, int, int, int, int]) -> None:
    act, rows, n, fitting, ragged = shape
    check_product(kind, dtype, split, act, rows, n, columns(kind, fitting, ragged))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize("split", [1, 2, 3])
@pytest.mark.parametrize("shape", [*SHAPES, ("none", 64, 34, 640, 650), ("silu", 8, 13, 1024, 1000)])
def test_all_products(kind: str, dtype: torch.dtype, split: int, shape: tuple[str, int, int, int, int]) -> None:
    act, rows, n, fitting, ragged = shape
    check_product(kind, dtype, split, act, rows, n, columns(kind, fitting, ragged))


def grouped(rows: int, cols: int, group: int, scale_type: torch.dtype, zeros: bool, g: torch.Generator) -> Int4Weight:
    """As files have them."""
    codes = torch.randint(0, 16, (rows, cols), generator=g)
    scale = ((torch.rand(rows, cols // group, generator=g) + 0.1) / cols**0.5 / 4).to(scale_type)
    return int4_weight(codes, scale, torch.randint(0, 17, scale.shape, generator=g) if zeros else None)


@pytest.mark.parametrize(
    "group, scale_type, zeros, dtype, shape",
    [
        (128, FP16, True, BF16, ("none", 3, 21, 256)),
        (64, FP16, False, FP16, ("silu", 1, 12, 384)),
        (32, BF16, True, FP32, ("none", 17, 37, 256)),
        (32, FP32, False, BF16, ("gelu_tanh", 2, 9, 128)),
    ],
)
def test_groups_and_scales_of_files(
    group: int, scale_type: torch.dtype, zeros: bool, dtype: torch.dtype, shape: tuple[str, int, int, int]
) -> None:
    """Groups smaller than a run are multiplied as values of the compute dtype."""
    act, rows, n, cols = shape
    g = generator(group, rows)
    stored = n if act == "none" else 2 * n
    x, w = inputs(rows, cols, dtype, g), grouped(stored, cols, group, scale_type, zeros, g)
    assert (plain(w, dtype) == w.dequantized(dtype)).all()
    for split in (1, 2):
        y = packed_product(x, w, None, act, PackedTile(16, split, 4, 2))
        check(y, *projected(x, w if group == 128 else w.dequantized(dtype), None, act))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_made_plain_is_what_torch_makes(kind: str, dtype: torch.dtype) -> None:
    w = packed(kind, 41, columns(kind, 256, 300), generator(1))
    assert (plain(w, dtype) == w.dequantized(dtype)).all()


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("rows, cols", [(130, 384), (41, 300)])
def test_blocks_of_fp8_made_plain_are_what_torch_makes(rows: int, cols: int, dtype: torch.dtype) -> None:
    w = quantize_fp8(matrix(rows, cols, FP32, generator(rows)), "block")
    w.scale.mul_(torch.rand(w.scale.shape, generator=generator(2)) + 0.5)
    assert (plain(w, dtype) == w.dequantized(dtype)).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("before, rows", [("none", 1), ("branch", 2), ("join", 20), ("norm", 65)])
def test_every_row_count_takes_some_path(kind: str, before: str, rows: int) -> None:
    g = generator(rows)
    dtype = BF16 if rows > 64 else FP16
    x, w = inputs(rows, 128, dtype, g), packed(kind, 32, 128, g)
    prologue = random_prologue(before, rows, 128, dtype, g)
    bias = torch.randn(32, generator=g)
    y, joined = project(x, w, bias, "silu", prologue)
    ready, expected_sum = prepared(x, prologue)
    expected, tolerance = projected(ready, w, bias, "silu")
    assert ((y.double() - expected).abs() <= 4 * tolerance).all()
    check_sum(joined, expected_sum)


@pytest.mark.parametrize("kind", KINDS)
def test_invariant_rows(kind: str) -> None:
    """Bits of a row are the same alone and among others."""
    g = generator(4)
    x, w = inputs(5, 256, BF16, g), packed(kind, 24, 256, g)
    prologue = random_prologue("norm", 5, 256, BF16, g)
    y, _ = project_invariant(x, w, None, "none", prologue)
    alone, _ = project_invariant(x[3:4], w, None, "none", prologue)
    assert (y[3] == alone[0]).all()
    ready, _ = prepared(x, prologue)
    expected, tolerance = projected(ready, w, None, "none")
    assert ((y.double() - expected).abs() <= 4 * tolerance).all()


def test_rows_of_a_product_do_not_depend_on_each_other() -> None:
    g = generator(5)
    x, w = inputs(9, 256, FP16, g), packed("int4", 33, 256, g)
    tile = PackedTile(16, 2, 4, 2)
    together = packed_product(x, w, tile=tile)
    x[4] = torch.nan
    spoiled = packed_product(x, w, tile=tile)
    others = [row for row in range(9) if row != 4]
    assert (together[others] == spoiled[others]).all()
    assert spoiled[4].isnan().all()


@pytest.mark.parametrize("mode", ["int8", "int4", "mxfp4"])
def test_who_takes_them(mode: str) -> None:
    registry = Registry()
    dense.register(registry, fp8=False)
    operands = Operands(((9, 128),), ((9, 64),), ("w",), ((64, 128),), {})
    for tokens in (1, 64, 4096):
        situation = Situation("cuda", "bfloat16", tokens, {"w": (FORMATS[mode],)})
        chosen = registry.choose("linear_act", operands, situation)
        assert chosen is not None
        assert chosen.name == "triton.linear_act"
        assert registry.choose("embed", operands, situation) is None


@pytest.mark.parametrize("kind", ["int8", "int4", "mxfp4"])
@pytest.mark.parametrize("rows", [16, 32, 64])
def test_tiles_give_each_part_of_k_a_run(kind: str, rows: int) -> None:
    for n in (64, 4096, 28672):
        for k in (128, 1024, 4096, 14336):
            tile = packed_tile(rows, n, k, kind)
            runs = -(-k // 128)
            span = -(-runs // tile.split_k)
            assert (tile.split_k - 1) * span < runs
            asked = tile.prefetch * (1 if kind == "int8" else 2)
            assert asked <= span * 128
