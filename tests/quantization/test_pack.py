"""Packers against float64 rounding: how far values may move, exact cases, refusals."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from tests.quantization.blocks_data import oracle
from tests.seeds import SEED
from tokenspeed.contracts.errors import FormatError, WeightError
from tokenspeed.quantization import pack as module
from tokenspeed.quantization.pack import pack

FORMATS = ("Q8_0", "Q4_1")
LEVELS = {"Q8_0": (-127, 127), "Q4_1": (0, 15)}
HALF_ULP = 2.0**-11
SMALLEST_HALF = 2.0**-25
"""Half the distance of float16 values near zero."""


def random_values(rows: int, cols: int, seed: int) -> torch.Tensor:
    """Blocks of very different magnitudes, some of one sign, some of zeros."""
    rng = np.random.default_rng(seed)
    blocks = rng.standard_normal((rows, cols // 32, 32)) * 10.0 ** rng.integers(-5, 3, (rows, cols // 32, 1))
    blocks[:, ::3] += np.abs(blocks[:, ::3]).max(-1, keepdims=True) * rng.choice([-1, 1], (rows, 1, 1))
    blocks[:: max(2, rows // 3), -1] = 0
    return torch.from_numpy(blocks.reshape(rows, cols).astype(np.float32))


def factors(packed: np.ndarray, fmt: str) -> tuple[np.ndarray, np.ndarray]:
    """d and m of each block, float64 [blocks, 1]."""
    blocks = packed.reshape(-1, gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[fmt]][1])
    halves = [np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float64) for at in (0, 2)]
    return halves[0], halves[1] if fmt == "Q4_1" else 0 * halves[0]


@pytest.mark.parametrize("seed", [SEED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows, cols", [(1, 32), (37, 96), (65, 640)])
@pytest.mark.parametrize("fmt", FORMATS)
def test_codes_are_the_nearest(fmt, rows, cols, dtype, seed, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 1000)
    values = random_values(rows, cols, seed).to(dtype)
    packed = pack(values, fmt).numpy()
    got = oracle(packed, fmt).astype(np.float64).reshape(-1, 32)
    wide = values.double().numpy().reshape(-1, 32)
    d, m = factors(packed, fmt)
    low, high = LEVELS[fmt]
    codes = np.clip(np.rint(np.divide(wide - m, d, out=np.zeros_like(wide), where=d != 0)), low, high)
    # Float32 may pick the other of two codes that are equally near, within its rounding.
    assert (np.abs(got - wide) <= np.abs(d * codes + m - wide) + 1e-5 * np.abs(d) + 1e-6 * np.abs(wide)).all()


@pytest.mark.parametrize("seed", [SEED])
@pytest.mark.parametrize("fmt", FORMATS)
def test_no_value_moves_further_than_stated(fmt, seed):
    values = random_values(211, 320, seed)
    packed = pack(values, fmt).numpy()
    wide = values.double().numpy().reshape(-1, 32)
    error = np.abs(oracle(packed, fmt).astype(np.float64).reshape(-1, 32) - wide)
    d, _ = factors(packed, fmt)
    largest = np.abs(wide).max(-1, keepdims=True)
    bound = np.abs(d) / 2 + (2 * HALF_ULP * largest + 16 * SMALLEST_HALF if fmt == "Q4_1" else 127 * SMALLEST_HALF)
    # Dividing by d rounds twice in float32, which moves a value that lies halfway.
    assert (error <= bound * (1 + 1e-6) + 2.0**-23 * largest).all()
    span = wide.max(-1, keepdims=True) - wide.min(-1, keepdims=True)
    ideal = {"Q8_0": largest / 127, "Q4_1": span / 15}[fmt]
    assert (np.abs(np.abs(d) - ideal) <= 2 * HALF_ULP * (ideal + largest / 15) + 2 * SMALLEST_HALF).all()


@pytest.mark.parametrize("seed", [SEED])
def test_q4_1_errs_less_than_q4_0(seed):
    for scale in (torch.ones(400, 1), torch.rand(400, 1, generator=torch.Generator().manual_seed(seed))):
        values = torch.randn(400, 320, generator=torch.Generator().manual_seed(seed)) * scale
        q4_0 = gguf.quants.quantize(values.numpy(), gguf.GGMLQuantizationType.Q4_0)
        packed = {"Q4_0": q4_0} | {fmt: pack(values, fmt).numpy() for fmt in FORMATS}
        errors = {fmt: np.linalg.norm(oracle(data, fmt) - values.numpy()) for fmt, data in packed.items()}
        assert errors["Q8_0"] < errors["Q4_1"] / 10
        assert errors["Q4_1"] < 0.95 * errors["Q4_0"]


@pytest.mark.parametrize("fmt", FORMATS)
def test_representable_values_come_back(fmt):
    low, high = LEVELS[fmt]
    codes = torch.arange(64 * 32).reshape(64, 32) * 7 % (high - low + 1) + low
    codes[:, 0], codes[:, 1] = low, high
    values = codes * 0.125 + (3.0 if fmt == "Q4_1" else 0.0)
    assert (torch.from_numpy(oracle(pack(values, fmt).numpy(), fmt)) == values).all()


def test_writes_into_out():
    values = random_values(5, 64, SEED)
    out = torch.full((7, 68), 9, dtype=torch.uint8)
    pack(values, "Q8_0", out[1:6])
    assert (out[1:6] == pack(values, "Q8_0")).all()
    assert (out[[0, 6]] == 9).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1e8])
@pytest.mark.parametrize("fmt", FORMATS)
def test_refuses_what_it_cannot_hold(fmt, bad):
    values = torch.zeros(3, 64)
    values[2, 40] = bad
    with pytest.raises(WeightError, match="not finite, or too large"):
        pack(values, fmt)


def test_refuses_odd_widths():
    with pytest.raises(FormatError, match="multiple of 32 elements, not 48"):
        pack(torch.zeros(1, 48), "Q8_0")
