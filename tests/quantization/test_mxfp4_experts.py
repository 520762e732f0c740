"""MXFP4 experts: words and exponents round trip, values against the matrices' type, limits, what files hold."""

from __future__ import annotations

import pytest
import torch

from tests.seeds import SEED
from tokenspeed.contracts.errors import UnsupportedError
from tokenspeed.formats.blocks import row_bytes
from tokenspeed.quantization.groups import gpu_bytes
from tokenspeed.quantization.mxfp4 import mxfp4_weight, quantize_mxfp4
from tokenspeed.quantization.mxfp4_experts import (
    LEAST,
    MOST,
    Mxfp4Experts,
    empty_experts,
    pack_words,
    put_expert,
    quantize_experts,
    unpack_words,
)
from tokenspeed.quantization.narrow import narrow
from tokenspeed.quantization.unpack import unpack
from tokenspeed.weights.packed import PackedTensor, Weight
from tokenspeed.weights.packed_experts import load_experts, packed_experts
from tokenspeed.weights.spec import WeightSpec

CPU = torch.device("cpu")


def random(*size: int, low: int = 0, high: int = 16) -> torch.Tensor:
    return torch.randint(low, high, size, generator=torch.Generator().manual_seed(SEED + sum(size)))


def file_rows(rows: int, cols: int) -> torch.Tensor:
    """As GGUF files have them."""
    blocks = random(rows * cols // 32, 17, high=256).to(torch.uint8)
    blocks[:, 0] = random(len(blocks), low=LEAST, high=MOST + 1)
    return blocks.view(rows, -1)


@pytest.mark.parametrize("rows, cols", [(1, 128), (7, 384)])
def test_words_come_back(rows: int, cols: int) -> None:
    codes = random(rows, cols).to(torch.uint8)
    words = pack_words(codes)
    assert (words.dtype, words.shape) == (torch.int16, (rows, cols // 4))
    assert torch.equal(unpack_words(words), codes)


def test_where_each_bit_lies() -> None:
    """Turned by their block's bits, two columns of a word lie where two bfloat16 have sign, exponent and mantissa."""
    places = (6, 7, 8, 15)
    for column in random(40, high=128).tolist():
        for bit in range(4):
            codes = torch.zeros(1, 128, dtype=torch.uint8)
            codes[0, column] = 1 << bit
            block, at = divmod(column, 32)
            found = (pack_words(codes).view(torch.int32)[0].to(torch.int64) & 0xFFFFFFFF).tolist()
            turn = (0, 6, 12, 2 if bit == 0 else 10)[block]
            word = found.pop(at // 2)
            assert not any(found)
            assert word == 1 << (places[bit] + 16 * (at % 2) - turn) % 32


@pytest.mark.parametrize("cols", [96, 256])
def test_values_are_those_of_the_matrix(cols: int) -> None:
    codes, exponents = random(3, 5, cols), random(3, 5, cols // 32, low=LEAST, high=MOST + 1)
    made = empty_experts(3, 5, cols, CPU)
    for expert in range(3):
        put_expert(made, expert, codes[expert], exponents[expert])
        matrix = mxfp4_weight(codes[expert], exponents[expert])
        assert torch.equal(made.dequantized(torch.float64)[expert], matrix.dequantized(torch.float64))
        assert torch.equal(made.dequantized(torch.bfloat16)[expert].double(), matrix.dequantized(torch.float64))
    assert made.shape == (3, 5, cols)
    assert made.nbytes == gpu_bytes("mxfp4", 15, cols)


def test_exponents_that_no_byte_holds_are_refused_but_for_zeros() -> None:
    made = empty_experts(1, 2, 64, CPU)
    for exponent in (LEAST - 1, MOST + 1):
        codes, exponents = torch.zeros(2, 64, dtype=torch.uint8), torch.full((2, 2), 127)
        exponents[1, 0] = exponent
        put_expert(made, 0, codes, exponents)
        assert (made.dequantized(torch.float32) == 0).all()
        codes[1, 3] = 1
        with pytest.raises(UnsupportedError, match=r"\(supported: 2\^-96 to 2\^37\)"):
            put_expert(made, 0, codes, exponents)


def test_quantized_as_matrices_are() -> None:
    values = torch.randn(3, 6, 160, generator=torch.Generator().manual_seed(SEED))
    values[1, 2, :32] = 1e-35
    made = quantize_experts(values)
    for expert, matrix in enumerate(values):
        expected = quantize_mxfp4(matrix).dequantized(torch.float32)
        expected[expected.abs() < 2.0**-96] = 0
        assert torch.equal(made.dequantized(torch.float32)[expert], expected)
    assert isinstance(narrow(values, "mxfp4", "up"), Mxfp4Experts)
    with pytest.raises(UnsupportedError, match=r"--quantization mxfp4: weight up: .* groups of 32, not 40"):
        narrow(torch.zeros(2, 3, 40), "mxfp4", "up")


def test_parts_that_do_not_fit_are_refused() -> None:
    q, scale = torch.zeros(2, 6, 64, dtype=torch.int16), torch.zeros(2, 2, 6, dtype=torch.int32)
    assert Mxfp4Experts(q, scale, 160).shape == (2, 6, 160)
    for wrong in ((q.int(), scale, 160), (q, scale.mT, 160), (q, scale, 96)):
        with pytest.raises(UnsupportedError, match=r"supported: torch.int16 .* with scales torch.int32"):
            Mxfp4Experts(*wrong)


@pytest.mark.parametrize("parts", [(12,), (3, 1, 4, 4), (4, 8)])
def test_what_files_hold(parts: tuple[int, ...]) -> None:
    """Three experts of four rows, in segments that end anywhere, some with rows by turns."""
    cols = 96
    data = file_rows(12, cols)
    segments = [
        PackedTensor(each, "MXFP4", len(each), cols, heads=len(each) // 4 if len(each) % 4 == 0 else 0)
        for each in data.split(parts)
    ]
    weight = Weight(WeightSpec("up", (3, 4, cols), "experts", (), ()), segments)
    assert torch.equal(load_experts(weight, CPU).dequantized(torch.float32), weight.unpacked(torch.float32))
    plain = torch.cat([unpack(each.rows_at(0, each.rows), "MXFP4", cols, torch.float32) for each in segments])
    assert torch.equal(weight.unpacked(torch.float32).flatten(0, 1), plain)


def test_experts_stay_packed_where_all_are() -> None:
    def made(fmt: str) -> Weight:
        data = torch.zeros(4, row_bytes(fmt, 64), dtype=torch.uint8)
        return Weight(WeightSpec("x", (2, 2, 64), "experts", (), ()), [PackedTensor(data, fmt, 4, 64)])

    assert packed_experts({"a": made("MXFP4"), "b": made("MXFP4")}) == {"a", "b"}
    assert packed_experts({"a": made("MXFP4"), "b": made("Q8_0")}) == frozenset()


def test_a_scale_too_large_names_the_weight() -> None:
    data = file_rows(4, 64)
    data[3, 0] = MOST + 1
    weight = Weight(WeightSpec("layers.0.up", (2, 2, 64), "experts", (), ()), [PackedTensor(data, "MXFP4", 4, 64)])
    with pytest.raises(UnsupportedError, match=r"weight layers\.0\.up: .* 2\^38 "):
        load_experts(weight, CPU)
