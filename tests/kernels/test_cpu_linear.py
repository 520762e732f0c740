"""The packed matrix kernels of every instruction set this processor runs, against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.kernels.blocks import BLOCK_FORMATS, EXPONENTS, random_rows
from tests.kernels.tiers import TIERS_HERE
from tests.quantization.blocks_data import FACTORS_AT as FACTORS
from tests.seeds import SEED
from tokenspeed.kernels.cpu import _walk
from tokenspeed.kernels.cpu.registration import FORMATS
from tokenspeed.quantization.unpack import unpack

TOLERANCE = 1.5e-4
"""Of |x| |W|: activations keep steps of 1 / 32512 of the largest in 32, whose rounding is about 2e-5 of |x|."""


def packed(isa: str, threads: int, segments: list[tuple[str, np.ndarray]], cols: int) -> tuple[_walk.Model, int]:
    model = _walk.Model(threads, isa)
    matrix = model.add_matrix(cols)
    for fmt, data in segments:
        model.add_segment(matrix, FORMATS.index(fmt), data)
    return model, matrix


def multiply(model: _walk.Model, matrix: int, x: np.ndarray, rows: int) -> np.ndarray:
    out = np.full((len(x), rows), np.nan, np.float32)
    model.multiply(matrix, x, out)
    return out


def width(fmt: str, blocks: int) -> int:
    return 256 * blocks if fmt.endswith(("_K", "_XS")) else 32 * blocks


@pytest.mark.parametrize("isa", TIERS_HERE)
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("rows, blocks", [(1, 1), (16, 2), (37, 3)])
def test_against_float64(isa: str, fmt: str, rows: int, blocks: int) -> None:
    rng, cols = np.random.default_rng([SEED, rows]), width(fmt, blocks)
    data, values = random_rows(fmt, rows, cols, rng)
    model, matrix = packed(isa, 2, [(fmt, data)], cols)
    row = np.empty(cols, np.float32)
    for r in range(rows):
        model.unpack_row(matrix, r, row)
        np.testing.assert_allclose(row, values[r], rtol=1e-6, atol=1e-7 * np.abs(values).max())
    for count in (*range(1, 17), 33):
        x = (rng.normal(size=(count, cols)) * rng.choice([1e-3, 1.0, 50.0], size=(count, 1))).astype(np.float32)
        expected = x.astype(np.float64) @ values.T
        error = np.linalg.norm(multiply(model, matrix, x, rows) - expected, axis=1)
        scale = np.linalg.norm(x.astype(np.float64), axis=1) * np.linalg.norm(values) / np.sqrt(cols)
        assert (error <= TOLERANCE * scale).all()


@pytest.mark.parametrize("fmt", FORMATS)
def test_tiers_agree(fmt: str) -> None:
    """Integer sums are exact, so tiers differ by the rounding of a few float32 operations only."""
    rng, cols = np.random.default_rng(SEED), 768
    data, _ = random_rows(fmt, 20, cols, rng)
    x = rng.normal(size=(5, cols)).astype(np.float32)
    results = [multiply(*packed(isa, 1, [(fmt, data)], cols), x, 20) for isa in TIERS_HERE]
    for other in results[1:]:
        np.testing.assert_allclose(other, results[0], atol=3e-6 * np.abs(results[0]).max(), rtol=2e-5)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("isa", TIERS_HERE)
def test_a_row_does_not_depend_on_its_batch_or_the_threads(isa: str, fmt: str) -> None:
    rng, cols = np.random.default_rng(SEED + 1), 512
    data, _ = random_rows(fmt, 100, cols, rng)
    x = rng.normal(size=(19, cols)).astype(np.float32)
    one, many = (packed(isa, threads, [(fmt, data)], cols) for threads in (1, 3))
    together = multiply(*many, x, 100)
    assert (multiply(*one, x, 100) == together).all()
    for i in (0, 7, 18):
        assert (multiply(*many, x[i : i + 1], 100)[0] == together[i]).all()


@pytest.mark.parametrize("isa", TIERS_HERE)
def test_segments_of_different_formats(isa: str) -> None:
    rng, cols = np.random.default_rng(SEED + 2), 256
    parts = [(fmt, *random_rows(fmt, rows, cols, rng)) for fmt, rows in (("Q4_K", 48), ("Q8_0", 5), ("F16", 17))]
    model, matrix = packed(isa, 2, [(fmt, data) for fmt, data, _ in parts], cols)
    values = np.concatenate([value for *_, value in parts])
    x = rng.normal(size=(3, cols)).astype(np.float32)
    expected = x.astype(np.float64) @ values.T
    np.testing.assert_allclose(multiply(model, matrix, x, 70), expected, atol=1e-3 * np.abs(expected).max())


def test_extremes_of_the_codes() -> None:
    """The largest codes against the largest activations: no sum may saturate."""
    cols = 256
    x = np.where(np.arange(cols) % 2, -1.0, 1.0).astype(np.float32)[None] * 127
    for fmt in BLOCK_FORMATS:
        data, _ = random_rows(fmt, 16, cols, np.random.default_rng(0))
        for byte in (0x00, 0x7F, 0x80, 0xFF):
            extreme = np.full_like(data, byte)
            import gguf

            kind = gguf.GGMLQuantizationType[fmt]
            size = gguf.GGML_QUANT_SIZES[kind][1]
            if fmt == EXPONENTS:
                extreme.reshape(16, -1, size)[:, :, 0] = 120
            for at in FACTORS.get(fmt, ()):
                extreme.reshape(16, -1, size)[:, :, at : at + 2] = np.array([0.01], np.float16).view(np.uint8)
            values = gguf.dequantize(extreme, kind).astype(np.float64)
            for isa in TIERS_HERE:
                for signs in (x, np.abs(x), -np.abs(x)):
                    got = multiply(*packed(isa, 1, [(fmt, extreme)], cols), signs, 16)
                    expected = signs.astype(np.float64) @ values.T
                    scale = np.abs(signs).astype(np.float64) @ np.abs(values).T
                    assert (np.abs(got - expected) <= 1e-5 * scale + 1e-6).all(), (fmt, byte, isa)


@pytest.mark.parametrize("isa", TIERS_HERE)
def test_every_exponent_of_mxfp4(isa: str) -> None:
    """From 2^-128, which is subnormal, up to what no float32 holds."""
    data = np.random.default_rng(SEED).integers(0, 256, size=(256, 17), dtype=np.uint8)
    data[:, 0] = np.arange(256)
    expected = np.empty((256, 32), np.float32)
    unpack(torch.from_numpy(data), EXPONENTS, 32, torch.float32, torch.from_numpy(expected))
    model, matrix = packed(isa, 1, [(EXPONENTS, data)], 32)
    row = np.empty(32, np.float32)
    for r in range(256):
        model.unpack_row(matrix, r, row)
        assert (row == expected[r]).all()


def test_zero_and_tiny_activations() -> None:
    data, values = random_rows("Q8_0", 16, 64, np.random.default_rng(1))
    model, matrix = packed("", 1, [("Q8_0", data)], 64)
    assert (multiply(model, matrix, np.zeros((1, 64), np.float32), 16) == 0).all()
    tiny = np.full((1, 64), 1e-30, np.float32)
    np.testing.assert_allclose(multiply(model, matrix, tiny, 16), tiny.astype(float) @ values.T, rtol=1e-3, atol=1e-33)


def test_an_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(ValueError, match="no kernels for instruction set mmx"):
        _walk.Model(1, "mmx")
