"""Small-row projections in the interpreter against float64."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.triton.dense_reference import prepared, projected, random_prologue
from tests.seeds import SEED
from tokenspeed.contracts.errors import UnsupportedError
from tokenspeed.kernels.triton import linear
from tokenspeed.kernels.triton.linear import gemv, project, skinny
from tokenspeed.kernels.triton.norm import norm_rows, quantized_twin
from tokenspeed.kernels.triton.operands import Rows
from tokenspeed.kernels.triton.tiles import FP8_SMALL_ROWS, GemvTile, SkinnyTile
from tokenspeed.quantization.fp8 import quantize_fp8, quantize_rows

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


def generator(*key: int) -> torch.Generator:
    return torch.Generator().manual_seed(SEED + sum(31**i * k for i, k in enumerate(key)))


def matrix(rows: int, cols: int, dtype: torch.dtype, g: torch.Generator) -> torch.Tensor:
    """Rows of different size, as a slice of a wider matrix."""
    wide = torch.randn(rows, cols + 16, generator=g) * torch.rand(rows, 1, generator=g) / cols**0.5
    return wide.to(dtype)[:, :cols]


def inputs(rows: int, cols: int, dtype: torch.dtype, g: torch.Generator) -> torch.Tensor:
    """Column slices of wider rows."""
    return (2 * torch.randn(rows, cols + 8, generator=g)).to(dtype)[:, 8:]


def check_sum(got: torch.Tensor | None, expected: torch.Tensor | None) -> None:
    """Branches are a few units large; one of their elements may round to the neighbour."""
    if expected is None:
        assert got is None
    else:
        eps = torch.finfo(expected.dtype).eps
        torch.testing.assert_close(got, expected, rtol=eps, atol=8 * eps)


def check(got: torch.Tensor, expected: torch.Tensor, tolerance: torch.Tensor) -> None:
    assert got.shape == expected.shape
    excess = (got.double() - expected).abs() - tolerance
    assert (excess <= 0).all(), excess.max()


def check_gemv(dtype: torch.dtype, kind: str, act: str, rows: int, n: int, cols: int) -> None:
    g = generator(rows, n)
    stored = n if act == "none" else 2 * n
    x, w = inputs(rows, cols, dtype, g), matrix(stored, cols, dtype, g)
    bias = torch.randn(stored, generator=g) if kind in ("none", "join") else None
    prologue = random_prologue(kind, rows, cols, dtype, g)
    y, joined = gemv(x, w, bias, act, prologue, GemvTile(8, 128, 4))
    ready, expected_sum = prepared(x, prologue)
    check(y, *projected(ready, w, bias, act))
    check_sum(joined, expected_sum)


SHAPES = [("none", 1, 37, 300), ("silu", 2, 21, 512), ("gelu_tanh", 3, 9, 129)]


@pytest.mark.parametrize("kind", ["none", "norm", "join", "branch"])
@pytest.mark.parametrize("dtype, shape", [(FP32, SHAPES[0]), (FP16, SHAPES[2]), (BF16, SHAPES[1])])
def test_gemv_with_everything_around_it(dtype: torch.dtype, kind: str, shape: tuple[str, int, int, int]) -> None:
    check_gemv(dtype, kind, *shape)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize("kind", ["none", "norm", "join", "branch"])
@pytest.mark.parametrize("shape", [*SHAPES, ("none", 4, 34, 640), ("silu", 1, 13, 1000)])
def test_gemv_products(dtype: torch.dtype, kind: str, shape: tuple[str, int, int, int]) -> None:
    check_gemv(dtype, kind, *shape)


def check_skinny(dtype: torch.dtype, split: int, act: str, rows: int, n: int, cols: int) -> None:
    g = generator(rows, n, split)
    stored = n if act == "none" else 2 * n
    x, w = inputs(rows, cols, dtype, g), matrix(stored, cols, dtype, g)
    bias = torch.randn(stored, generator=g)
    y = skinny(Rows(x), w, dtype, bias, act, SkinnyTile(16, 64, split, 4, 2))
    check(y, *projected(x, w, bias, act))


WIDE_SHAPES = [("none", 5, 37, 300), ("silu", 16, 24, 256), ("gelu_tanh", 33, 9, 129)]


@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize("dtype, shape", [(FP32, WIDE_SHAPES[0]), (FP16, WIDE_SHAPES[2]), (BF16, WIDE_SHAPES[1])])
def test_skinny_against_float64(dtype: torch.dtype, split: int, shape: tuple[str, int, int, int]) -> None:
    check_skinny(dtype, split, *shape)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize("split", [1, 2, 3, 8])
@pytest.mark.parametrize("shape", [*WIDE_SHAPES, ("none", 64, 34, 640)])
def test_skinny_products(dtype: torch.dtype, split: int, shape: tuple[str, int, int, int]) -> None:
    check_skinny(dtype, split, *shape)


@pytest.mark.parametrize("granularity", ["channel", "tensor", "block"])
@pytest.mark.parametrize("act, rows, n, cols", [("none", 1, 37, 300), ("silu", 2, 14, 256), ("none", 17, 200, 384)])
def test_fp8_weights(granularity: str, act: str, rows: int, n: int, cols: int) -> None:
    """Tensor-core and multiply-and-sum paths, rows quantised to e4m3 with a scale each."""
    g = generator(rows, n)
    x = inputs(rows, cols, FP16, g)
    w = quantize_fp8(matrix(n if act == "none" else 2 * n, cols, FP32, g), granularity)  # type: ignore[arg-type]
    expected = projected(x, w, None, act)
    q, scale = quantize_rows(x)
    tile = SkinnyTile(32, 128, 2, 4, 2)
    check(skinny(Rows(q, scale), w, FP16, None, act, tile), *expected)
    check(project(x, w, None, act)[0], *expected)


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_fp8_with_a_join_in_front(rows: int) -> None:
    g = generator(rows)
    x, w = inputs(rows, 256, FP16, g), quantize_fp8(matrix(48, 256, FP32, g))
    prologue = random_prologue("branch", rows, 256, FP16, g)
    y, joined = project(x, w, None, "silu", prologue)
    ready, expected_sum = prepared(x, prologue)
    expected, tolerance = projected(ready, w, None, "silu")
    # A row's scale follows its largest element, and a step of e4m3 is 2^-4 of a value.
    assert ((y.double() - expected).abs() <= 3 * tolerance).all()
    check_sum(joined, expected_sum)


@pytest.mark.parametrize(
    "kind, rows", [("none", 1), ("branch", 1), ("norm", 3), ("branch", 3), ("join", 20), ("norm", 65)]
)
@pytest.mark.parametrize("fp8", [False, True])
def test_every_row_count_takes_some_path(kind: str, rows: int, fp8: bool) -> None:
    g = generator(rows, fp8)
    dtype = BF16 if rows > 64 and fp8 else FP16
    x = inputs(rows, 128, dtype, g)
    w = matrix(32, 128, FP32, g)
    weight = quantize_fp8(w) if fp8 else w.to(dtype)
    prologue = random_prologue(kind, rows, 128, dtype, g)
    bias = torch.randn(32, generator=g)
    y, joined = project(x, weight, bias, "silu", prologue)
    ready, expected_sum = prepared(x, prologue)
    expected, tolerance = projected(ready, weight, bias, "silu")
    assert ((y.double() - expected).abs() <= 4 * tolerance).all()
    check_sum(joined, expected_sum)


@pytest.mark.parametrize("tile", [GemvTile(4, 128, 4), GemvTile(16, 512, 4)])
def test_a_row_does_not_depend_on_the_rows_beside_it(tile: GemvTile) -> None:
    """Bit-equal with neighbours that are not numbers."""
    g = generator(tile.block_n)
    x, w = inputs(2, 640, FP16, g), matrix(16, 640, FP16, g)
    prologue = random_prologue("branch", 2, 640, FP16, g)
    assert prologue is not None
    both, _ = gemv(x, w, None, "none", prologue, tile)
    x[1] = torch.nan
    spoiled, _ = gemv(x, w, None, "none", prologue, tile)
    assert (both[0] == spoiled[0]).all()
    assert spoiled[1].isnan().all()


def test_rows_of_a_split_product_do_not_depend_on_each_other() -> None:
    g = generator(1)
    x, w = inputs(9, 300, FP16, g), matrix(33, 300, FP16, g)
    tile = SkinnyTile(16, 64, 2, 4, 2)
    together = skinny(Rows(x), w, FP16, tile=tile)
    alone = torch.cat([skinny(Rows(x[i : i + 1]), w, FP16, tile=tile) for i in range(9)])
    assert (together == alone).all()


def test_what_an_activation_has_quantised_is_not_quantised_again() -> None:
    """Of many rows, by the library: the next product takes what stands beside the rows themselves."""
    g = generator(8)
    x = inputs(FP8_SMALL_ROWS + 2, 64, BF16, g)
    gate_up, down = (quantize_fp8(matrix(rows, cols, BF16, g)) for rows, cols in ((96, 64), (32, 48)))
    y, _ = project(x, gate_up, act="silu")
    given, _ = linear.prepared(y, down, None)
    assert given is quantized_twin(y)
    fresh, _ = norm_rows(y.clone(), None, quantize=True)
    assert torch.equal(given.values.float(), fresh.values.float())
    assert given.scale is not None
    assert fresh.scale is not None
    assert torch.equal(given.scale, fresh.scale)
    given, _ = linear.prepared(y[:, :16], down, None)
    assert given.values.shape == (len(x), 16)


def test_a_weight_that_cannot_be_read_by_rows_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"64 columns by a weight \(64, 8\)"):
        project(torch.zeros(1, 64), torch.zeros(64, 8))
    with pytest.raises(UnsupportedError, match="contiguous rows"):
        project(torch.zeros(1, 64), torch.zeros(64, 8).t())
