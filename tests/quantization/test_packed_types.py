"""int8, int4 and MXFP4 weights: exact round trips, error bounds against float64, layouts, refusals."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from tests.seeds import SEED
from tokenspeed.contracts.errors import UnsupportedError, WeightError
from tokenspeed.quantization.groups import GPU_MODES, gpu_bytes
from tokenspeed.quantization.int4 import Int4Weight, int4_weight, quantize_int4
from tokenspeed.quantization.int8 import Int8Weight, quantize_int8
from tokenspeed.quantization.mxfp4 import Mxfp4Weight, mxfp4_weight, quantize_mxfp4
from tokenspeed.quantization.narrow import FORMATS, narrow
from tokenspeed.quantization.nibbles import pack_nibbles, unpack_nibbles

PACKED = ("int8", "int4", "mxfp4")
VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)


def generator(*key: int) -> torch.Generator:
    return torch.Generator().manual_seed(SEED + sum(31**i * k for i, k in enumerate(key)))


def weights(rows: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of very different size, with some outliers."""
    g = generator(rows, cols)
    sizes = 10 ** (4 * torch.rand(rows, 1, generator=g) - 3)
    values = torch.randn(rows, cols, generator=g) * sizes
    return torch.where(torch.rand(rows, cols, generator=g) < 0.01, 8 * values, values).to(dtype)


@pytest.mark.parametrize("rows, cols", [(1, 128), (37, 384), (6, 2048)])
def test_nibbles_come_back(rows: int, cols: int) -> None:
    codes = torch.randint(0, 16, (rows, cols), generator=generator(rows))
    words = pack_nibbles(codes)
    assert words.shape == (rows, cols // 8)
    assert (unpack_nibbles(words) == codes).all()


def test_where_each_nibble_lies() -> None:
    """Thread p of four reads words 4 p to 4 p + 3; word j of them holds columns of the j-th 32."""
    for column in torch.randint(0, 256, (40,), generator=generator(1)).tolist():
        codes = torch.zeros(1, 256, dtype=torch.uint8)
        codes[0, column] = 15
        word = int(pack_nibbles(codes)[0].nonzero())
        run, within = divmod(column, 128)
        j, p, c = within // 32, within % 32 // 8, within % 8
        assert word == 16 * run + 4 * p + j
        assert int(pack_nibbles(codes)[0, word]) & 0xFFFFFFFF == 15 << (4 * (c // 2) + 16 * (c % 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows, cols", [(1, 16), (130, 301)])
def test_int8_is_off_by_half_a_step(dtype: torch.dtype, rows: int, cols: int) -> None:
    w = weights(rows, cols, dtype)
    packed = quantize_int8(w)
    scale = packed.scale.double()
    torch.testing.assert_close(packed.scale, w.float().abs().amax(1) / 127)
    assert (packed.q.abs().amax(1) == 127).all()
    error = (packed.dequantized(torch.float64) - w.double()).abs()
    assert (error <= scale[:, None] * (0.5 + 1e-4)).all()
    exact = packed.q.double() * scale[:, None]
    assert (packed.dequantized(torch.float64) == exact).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows, cols", [(1, 128), (130, 384)])
def test_int4_is_off_by_half_a_step(dtype: torch.dtype, rows: int, cols: int) -> None:
    w = weights(rows, cols, dtype)
    packed = quantize_int4(w)
    assert packed.scale.shape == (cols // 128, rows)
    scale = packed.scale.t().double().repeat_interleave(128, 1)
    error = (packed.dequantized(torch.float64) - w.double()).abs()
    assert (error <= scale * (0.5 + 1e-3)).all()
    largest = w.double().abs().view(rows, -1, 128).amax(2)
    torch.testing.assert_close(packed.scale.t().double(), largest / 7, rtol=2**-8, atol=0)


@pytest.mark.parametrize("dtype, group", [(torch.bfloat16, 128), (torch.float16, 64), (torch.float32, 32)])
@pytest.mark.parametrize("with_zero", [False, True])
def test_int4_codes_of_files_come_back_exactly(with_zero: bool, dtype: torch.dtype, group: int) -> None:
    g = generator(2)
    codes = torch.randint(0, 16, (19, 256), generator=g)
    scale = (torch.rand(19, 256 // group, generator=g) + 0.1).to(dtype)
    zero = torch.randint(0, 17, scale.shape, generator=g) if with_zero else None
    packed = int4_weight(codes, scale, zero)
    assert (packed.scale.dtype, packed.per_run) == (dtype, 128 // group)
    assert packed.nbytes == 19 * 128 + scale.nbytes + (0 if zero is None else scale.numel())
    from_zero = codes - (8 if zero is None else zero.repeat_interleave(group, 1))
    expected = from_zero.double() * scale.double().repeat_interleave(group, 1)
    assert (packed.dequantized(torch.float64) == expected).all()
    assert (packed.dequantized(torch.bfloat16) == expected.float().to(torch.bfloat16)).all()
    again = quantize_int4(expected) if zero is None else None
    assert again is None or (again.dequantized(torch.float64) - expected).abs().max() <= 0.6 * scale.max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows, cols", [(1, 32), (67, 416), (5, 256)])
def test_mxfp4_takes_the_nearest_value(dtype: torch.dtype, rows: int, cols: int) -> None:
    w = weights(rows, cols, dtype)
    packed = quantize_mxfp4(w)
    blocks = w.double().view(rows, -1, 32)
    scale = 2.0 ** (blocks.abs().amax(2, keepdim=True).log2().floor() - 2)
    table = torch.cat((-VALUES.flip(0), VALUES))
    nearest = (blocks[..., None] / scale[..., None] - table).abs().amin(-1) * scale
    got = packed.dequantized(torch.float64).view(rows, -1, 32)
    assert ((got - blocks).abs() <= nearest * (1 + 1e-9)).all()
    assert (packed.dequantized(torch.bfloat16).double() == got.flatten(1)).all()
    assert (quantize_mxfp4(packed.dequantized(torch.float32)).dequantized(torch.float64) == got.flatten(1)).all()


def test_mxfp4_codes_of_files_come_back_exactly() -> None:
    g = generator(3)
    codes = torch.randint(0, 16, (11, 96), generator=g)
    exponents = torch.randint(1, 250, (11, 3), generator=g)
    packed = mxfp4_weight(codes, exponents)
    signed = torch.cat((VALUES, -VALUES))[codes]
    expected = signed * (2.0 ** (exponents.double() - 127)).repeat_interleave(32, 1)
    assert (packed.dequantized(torch.float64) == expected).all()
    assert packed.shape == (11, 96)


def test_ties_go_to_even_codes() -> None:
    w = torch.zeros(1, 32)
    w[0, :9] = torch.tensor([4, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, -5.0, 7.9])
    w[0, 9] = -7.9
    expected = torch.tensor([4, 0, 1, 1, 2, 2, 4, -4.0, 6, -6])
    assert (quantize_mxfp4(w).dequantized(torch.float32)[0, :10] == expected).all()


@pytest.mark.parametrize("mode", GPU_MODES)
def test_zeros_stay_zeros(mode: str) -> None:
    w = torch.zeros(3, 256)
    w[1, :200] = 1
    made = narrow(w, mode, "w").dequantized(torch.float32)
    assert (made[[0, 2]] == 0).all()
    assert (made[1, 200:] == 0).all()


@pytest.mark.parametrize("mode", GPU_MODES)
@pytest.mark.parametrize("rows, cols", [(1, 128), (33, 512)])
def test_bytes_are_what_floors_count(mode: str, rows: int, cols: int) -> None:
    assert narrow(torch.ones(rows, cols), mode, "w").nbytes == gpu_bytes(mode, rows, cols)


def test_padded_runs_count_as_well() -> None:
    assert narrow(torch.ones(5, 416), "mxfp4", "w").nbytes == gpu_bytes("mxfp4", 5, 416) == 5 * 4 * 68


@pytest.mark.parametrize("mode, bad", list(product(GPU_MODES, [float("nan"), float("inf"), float("-inf")])))
def test_values_that_are_not_finite_are_refused_by_name(mode: str, bad: float) -> None:
    w = torch.ones(4, 128)
    w[2, 77] = bad
    with pytest.raises(WeightError, match=r"weight layers\.0\.o: values that are not finite"):
        narrow(w, mode, "layers.0.o")


@pytest.mark.parametrize("mode, cols, group", [("int4", 160, 128), ("mxfp4", 144, 32)])
def test_ragged_groups_are_refused_by_name(mode: str, cols: int, group: int) -> None:
    with pytest.raises(UnsupportedError, match=rf"--quantization {mode}: weight o: .* groups of {group}, not {cols}"):
        narrow(torch.ones(4, cols), mode, "o")


def test_wrong_parts_are_refused() -> None:
    q = torch.zeros(6, 32, dtype=torch.int32)
    with pytest.raises(UnsupportedError, match=r"supported: torch.int32 with scales torch.bfloat16, .* \(2, 6\), "):
        Int4Weight(q, torch.ones(6, 2, dtype=torch.bfloat16))
    with pytest.raises(UnsupportedError, match=r"zero points torch.int32"):
        Int4Weight(q, torch.ones(2, 6, dtype=torch.bfloat16), torch.ones(2, 6, dtype=torch.int32))
    with pytest.raises(UnsupportedError, match=r"scales torch.uint8 \(2, 6, 4\)"):
        Mxfp4Weight(q, torch.ones(6, 8, dtype=torch.uint8), 256)
    with pytest.raises(UnsupportedError, match=r"torch.float32 \(6,\)"):
        Int8Weight(torch.zeros(6, 32, dtype=torch.int8), torch.ones(32))


def test_every_mode_has_a_format_of_its_own() -> None:
    assert set(FORMATS) == set(GPU_MODES)
    assert len(set(FORMATS.values())) == len(GPU_MODES)


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_experts_are_refused_by_name(mode: str) -> None:
    experts = torch.zeros(3, 8, 128)
    with pytest.raises(UnsupportedError, match=f"{mode}: weight layers.0.up: experts are supported in fp8 and mxfp4"):
        narrow(experts, mode, "layers.0.up")
    assert narrow(experts, "fp8", "layers.0.up").shape == experts.shape
