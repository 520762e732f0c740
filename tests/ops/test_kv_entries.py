"""Entries of KV pages against rounding written another way."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.seeds import SEED
from tokenspeed.config.engine import KV_DTYPES
from tokenspeed.ops.definitions import KV_ITEM_BYTES, kv_entry_bytes
from tokenspeed.ops.kv import KV_TORCH, decode, encode, entry_columns, kv_dtype_name

E4M3 = np.array([(1 + m / 8) * 2.0 ** (e - 7) if e else m / 8 * 2.0**-6 for e in range(16) for m in range(8)][:-1])
"""The finite magnitudes of e4m3, ascending."""


def random_values(rows: int, cols: int, seed: int) -> torch.Tensor:
    """Rows of very different magnitudes."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(rows, cols)) * 10.0 ** rng.integers(-6, 4, size=(rows, 1))
    return torch.from_numpy(values.astype(np.float32))


def test_every_setting_has_a_type_and_a_size() -> None:
    assert set(KV_DTYPES) == {"auto", *KV_TORCH}
    assert KV_TORCH.keys() == KV_ITEM_BYTES.keys()
    for name, dtype in KV_TORCH.items():
        assert KV_TORCH[kv_dtype_name(dtype)] == dtype
        scales = 2 * 2 if name == "int8" else 0
        assert entry_columns(dtype, 64) * dtype.itemsize == kv_entry_bytes(name, 64) == 64 * dtype.itemsize + scales
    with pytest.raises(ValueError, match="cannot hold"):
        kv_dtype_name(torch.int32)


@pytest.mark.parametrize("seed", [SEED])
@pytest.mark.parametrize("head_dim, columns", [(1, 4), (6, 8), (32, 34), (63, 68), (80, 86), (256, 272)])
def test_int8_is_within_half_a_step_of_its_group(head_dim: int, columns: int, seed: int) -> None:
    x = random_values(37, head_dim, seed)
    entries = encode(x, torch.int8)
    assert entries.shape == (37, columns) == (37, entry_columns(torch.int8, head_dim))
    error = (decode(entries, head_dim, torch.float64) - x.double()).abs()
    for start in range(0, head_dim, 32):
        group = slice(start, start + 32)
        step = x[:, group].double().abs().amax(-1, keepdim=True) / 127 * (1 + 2**-8)
        assert (error[:, group] <= step * 0.5).all()
        assert (entries[:, group][:, : head_dim - start].abs().amax(-1) >= 126).all()


def test_int8_of_nothing_and_of_almost_nothing_is_zero() -> None:
    x = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1e-36, -1e-39, 0.0, 1e-45]])
    assert (decode(encode(x, torch.int8), 4, torch.float32) == 0).all()


@pytest.mark.parametrize("seed", [SEED])
def test_fp8_is_the_nearest_value_and_saturates(seed: int) -> None:
    x = random_values(50, 64, seed)
    got = decode(encode(x, torch.float8_e4m3fn), 64, torch.float64).numpy()
    wide = x.double().numpy()
    nearest = np.abs(np.abs(wide)[..., None] - E4M3).min(-1)
    assert (np.abs(got - wide) == nearest).all()
    assert E4M3.max() == 448
    extremes = decode(encode(torch.tensor([[449.0, -1e30, torch.inf, 464.0]]), torch.float8_e4m3fn), 4, torch.float32)
    assert extremes.tolist() == [[448.0, -448.0, 448.0, 448.0]]
