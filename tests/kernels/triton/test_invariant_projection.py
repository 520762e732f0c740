"""Batch-invariant projections in the interpreter: bit-equal rows, however many there are, and right ones."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.triton.dense_reference import prepared, projected, random_prologue
from tests.kernels.triton.test_dense_projection import BF16, FP16, FP32, check, check_sum, generator, inputs, matrix
from tests.seeds import SEED
from tokenspeed.contracts.errors import UnsupportedError
from tokenspeed.kernels.triton.invariant_linear import ROWS, invariant_tile, product, project_invariant
from tokenspeed.kernels.triton.operands import Multiplied, Prologue, Rows
from tokenspeed.kernels.triton.tiles import SkinnyTile
from tokenspeed.quantization.fp8 import quantize_fp8, quantize_rows

TILE = SkinnyTile(16, 64, 3, 4, 2)
FORMATS = ("plain", "channel", "block")


def weight_of(kind: str, rows: int, cols: int, dtype: torch.dtype, g: torch.Generator) -> Multiplied:
    if kind == "plain":
        return matrix(rows, cols, dtype, g)
    return quantize_fp8(matrix(rows, cols, FP32, g), kind)  # type: ignore[arg-type]


def part_of(prologue: Prologue | None, chosen: slice) -> Prologue | None:
    if prologue is None or prologue.branch is None:
        return prologue
    return Prologue(prologue.norm, prologue.branch[chosen], prologue.branch_norm)


@pytest.mark.parametrize("seed", [SEED])
@pytest.mark.parametrize(
    "kind, act, dtype, n, cols, around",
    [
        ("plain", "none", BF16, 37, 300, "none"),
        ("plain", "silu", FP32, 24, 1100, "join"),  # no rounding hides another order of sums
        ("channel", "gelu_tanh", FP16, 9, 384, "branch"),
        ("block", "none", BF16, 140, 256, "norm"),
    ],
)
def test_a_row_has_the_same_bits_beside_any_others(
    seed: int, kind: str, act: str, dtype: torch.dtype, n: int, cols: int, around: str
) -> None:
    g = generator(seed % 1000, n)
    most = ROWS + 7
    stored = n if act == "none" else 2 * n
    x, weight = inputs(most, cols, dtype, g), weight_of(kind, stored, cols, dtype, g)
    prologue, bias = random_prologue(around, most, cols, dtype, g), torch.randn(stored, generator=g)
    together, joined = project_invariant(x, weight, bias, act, prologue)
    assert together.abs().sum() > 0
    sizes = [1, ROWS, ROWS + 1, int(torch.randint(2, ROWS, (), generator=g))]
    for size in sizes:
        first = int(torch.randint(0, most - size + 1, (), generator=g))
        chosen = slice(first, first + size)
        y, part = project_invariant(x[chosen], weight, bias, act, part_of(prologue, chosen))
        assert torch.equal(y, together[chosen]), size
        if joined is not None:
            assert part is not None
            assert torch.equal(part, joined[chosen])


@pytest.mark.parametrize("seed", [SEED])
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("act", ["none", "silu"])
def test_parts_of_k_add_up_alike_in_one_program_and_in_many(seed: int, kind: str, act: str) -> None:
    g = generator(seed % 1000, len(kind))
    x, weight = inputs(5, 1000, FP16, g), weight_of(kind, 60, 1000, FP16, g)
    rows = Rows(x) if kind == "plain" else Rows(*quantize_rows(x))
    bias = torch.randn(60, generator=g)
    tile = SkinnyTile(32, 128, 4, 4, 2)
    apart, alone = (product(rows, weight, FP16, bias, act, tile, programs) for programs in (99, 0))
    assert torch.equal(apart, alone)
    check(apart, *projected(x, weight, bias, act))


@pytest.mark.parametrize("seed", [SEED])
@pytest.mark.parametrize("rows", [1, 64, 131, 600])
def test_every_block_of_rows_and_of_weights_is_computed_once(seed: int, rows: int) -> None:
    g = generator(seed % 1000, rows)
    x, w = inputs(rows, 64, FP16, g), matrix(70, 64, FP16, g)
    y = product(Rows(x), w, FP16, tile=TILE)
    check(y, *projected(x, w, None, "none"))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("rows", [3, 70])
@pytest.mark.parametrize("around, act", [("branch", "silu"), ("none", "none"), ("norm", "gelu_tanh")])
def test_projections_against_float64(kind: str, rows: int, around: str, act: str) -> None:
    g = generator(rows, len(kind))
    n, cols = 21, 256
    stored = n if act == "none" else 2 * n
    x, weight = inputs(rows, cols, FP16, g), weight_of(kind, stored, cols, FP16, g)
    prologue, bias = random_prologue(around, rows, cols, FP16, g), torch.randn(stored, generator=g)
    y, joined = project_invariant(x, weight, bias, act, prologue)
    ready, expected_sum = prepared(x, prologue)
    expected, tolerance = projected(ready, weight, bias, act)
    assert ((y.double() - expected).abs() <= 4 * tolerance).all()
    check_sum(joined, expected_sum)


@pytest.mark.parametrize("n, k", [(1, 64), (2048, 2048), (4096, 14336), (6144, 4096), (28672, 4096), (128256, 2048)])
@pytest.mark.parametrize("item", [1, 2, 4])
def test_tiles_follow_from_the_weight_alone(n: int, k: int, item: int) -> None:
    tile = invariant_tile(n, k, item)
    assert tile.block_n >= 64  # less is not what a warp group multiplies
    assert tile.stages * (tile.block_n + ROWS) * tile.block_k * item <= 200 << 10
    assert -(-n // tile.block_n) * tile.split_k >= min(132, n // 16)
    assert tile.split_k == 1 or k // tile.split_k >= 512
    assert 128 % invariant_tile(n, k, 1, 128).block_k == 0


def test_a_weight_that_cannot_be_read_by_rows_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"64 columns by a weight \(64, 8\)"):
        project_invariant(torch.zeros(1, 64), torch.zeros(64, 8))
