"""The attention kernels of every instruction set this processor runs: what pages hold, and attention over them against
float64 on the values that they hold."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.kernels.tiers import TIERS_HERE
from tests.seeds import SEED
from tokenspeed.kernels.cpu import _walk
from tokenspeed.ops.kv import decode, encode, entry_columns
from tokenspeed.runner.cpu_backend import KV_FORMATS

TOLERANCE = 2e-6
"""Of the largest value seen: sums of float32 products, and an exp good to 2e-7."""


def store(isa: str, dtype: torch.dtype, x: torch.Tensor) -> torch.Tensor:
    """Entries of [n, head_dim] as the kernels write them."""
    entries = torch.full((len(x), entry_columns(dtype, x.shape[1])), 0, dtype=dtype)
    _walk.store_kv(isa, KV_FORMATS.index(dtype), x.numpy(), entries.view(torch.uint8).numpy())
    return entries


def all_magnitudes() -> torch.Tensor:
    """Every sign, exponent and leading 12 bits of a mantissa, with the bits behind them at, below and above a tie."""
    top = torch.arange(1 << 16, dtype=torch.int64) << 16
    bits = torch.cat([top + low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)])
    values = bits.to(torch.int32).view(torch.float32)
    return values[values.isfinite()]


@pytest.mark.parametrize("isa", TIERS_HERE)
@pytest.mark.parametrize("dtype", KV_FORMATS, ids=str)
def test_stores_what_the_reference_stores(isa: str, dtype: torch.dtype) -> None:
    values = all_magnitudes()
    if dtype != torch.int8:  # scaled entries mix magnitudes: those come below
        x = values[: len(values) // 16 * 16].view(-1, 16)
        assert (store(isa, dtype, x).view(torch.uint8) == encode(x, dtype).view(torch.uint8)).all()
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(301, 48, generator=generator) * 10.0 ** torch.randint(-42, 20, (301, 1), generator=generator)
    x[::7] *= 0
    x[1::7] = torch.randint(-127, 128, x[1::7].shape, generator=generator) / 2 + 63.5  # ties, were the scale one
    assert (store(isa, dtype, x).view(torch.uint8) == encode(x, dtype).view(torch.uint8)).all()


def naive(
    q: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    first: int,
    window: int,
    scale: float,
    sinks: np.ndarray | None = None,
) -> np.ndarray:
    """One query row at a time in float64: q [queries, group, d], keys and values [positions, d], sinks [group]."""
    out = np.zeros(q.shape)
    for i in range(len(q)):
        seen = slice(max(0, first + i - window + 1) if window else 0, first + i + 1)
        scores = q[i].astype(np.float64) @ keys[seen].T * scale
        if sinks is not None:
            scores = np.concatenate([scores, sinks[:, None]], -1)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out[i] = (weights / weights.sum(-1, keepdims=True))[:, : len(values[seen])] @ values[seen]
    return out


@pytest.mark.parametrize("isa", TIERS_HERE)
@pytest.mark.parametrize("dtype", KV_FORMATS, ids=str)
@pytest.mark.parametrize(
    "queries, group, head_dim, first, window, page_size",
    [
        (1, 1, 16, 0, 0, 1),
        (1, 4, 256, 300, 0, 16),
        (1, 3, 80, 100, 37, 5),
        (7, 2, 64, 20, 0, 16),
        (13, 5, 48, 0, 6, 3),
        (9, 1, 128, 61, 64, 16),
        (1, 7, 112, 95, 0, 16),
        (1, 6, 32, 530, 200, 7),
        (6, 1, 240, 13, 5, 32),
    ],
)
def test_against_float64(
    isa: str, dtype: torch.dtype, queries: int, group: int, head_dim: int, first: int, window: int, page_size: int
) -> None:
    generator = torch.Generator().manual_seed(SEED + first)
    length = first + queries
    spread = 10.0 ** torch.randint(-2, 2, (2, length, 1), generator=generator)
    known = torch.randn(2, length, head_dim, generator=generator) * spread
    q = torch.randn(queries, group, head_dim, generator=generator)
    entries = encode(known, dtype)
    held = decode(entries, head_dim, torch.float64).numpy()

    count = -(-length // page_size)
    pages = torch.empty(2 * count, 2, page_size, entries.shape[-1], dtype=dtype)
    pages.view(torch.uint8).fill_(0xFF)  # what is read before it is written makes the result wrong
    table = torch.randperm(2 * count, generator=generator)[:count].int()
    unseen = max(0, first - window + 1) if window else 0
    for p in range(unseen, length):
        pages.view(torch.uint8)[table[p // page_size], :, p % page_size] = entries.view(torch.uint8)[:, p]
    table[: unseen // page_size] = -1  # pages behind the window are gone

    scale, out = head_dim**-0.5, np.full(q.shape, np.nan, np.float32)
    stored = pages.view(torch.uint8).numpy()
    _walk.attend(isa, KV_FORMATS.index(dtype), q.numpy(), stored, table.numpy(), first, window, scale, out)
    expected = naive(q.numpy(), held[0], held[1], first, window, scale)
    assert np.abs(out - expected).max() <= TOLERANCE * np.abs(held[1][unseen:]).max()
    alone = np.full((queries, 1, group, head_dim), np.nan, np.float32)
    for i in range(queries):
        one = q[i : i + 1].contiguous().numpy()
        _walk.attend(isa, KV_FORMATS.index(dtype), one, stored, table.numpy(), first + i, window, scale, alone[i])
    sinks = (3 * torch.randn(group, generator=generator)).numpy()
    sunk = np.full(q.shape, np.nan, np.float32)
    _walk.attend(isa, KV_FORMATS.index(dtype), q.numpy(), stored, table.numpy(), first, window, scale, sunk, sinks)
    expected = naive(q.numpy(), held[0], held[1], first, window, scale, sinks)
    assert np.abs(sunk - expected).max() <= TOLERANCE * np.abs(held[1][unseen:]).max()
    assert (alone[:, 0] == out).all(), "a query depends on those fed beside it"
    single = np.full((queries, 1, 1, head_dim), np.nan, np.float32)
    for head in {0, group - 1}:
        for i in range(queries):
            one = q[i : i + 1, head : head + 1].contiguous().numpy()
            _walk.attend(isa, KV_FORMATS.index(dtype), one, stored, table.numpy(), first + i, window, scale, single[i])
        assert (single[:, 0, 0] == out[:, head]).all(), "a head depends on those of its group"
