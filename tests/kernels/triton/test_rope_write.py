"""Rope, per-head norms and the KV page write against the references, in the interpreter."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.triton.paged_step import GROUP, LAYER, DeviceStep
from tests.seeds import SEED
from tokenspeed.kernels.triton.paged import PagedLayer
from tokenspeed.kernels.triton.rope_write import HeadNorm, rope_write
from tokenspeed.ops.definitions import KvScale
from tokenspeed.ops.reference import frequencies
from tokenspeed.ops.rope import Rope, linear_rope, no_rope

FAR = 131071
TOLERANCE = {torch.float32: 4e-6, torch.float16: 4e-3}
"""Absolute, for values of unit scale. float32: sums and sines within some ulp of 4."""


def paged_step(
    positions: list[int], slots: list[int], page: int, kv_heads: int, dim: int, dtype: torch.dtype
) -> DeviceStep:
    """Tokens of slots whose tables name the pages they need; the rest of a table is -1."""
    kv = torch.full((8, 3, 2, page, kv_heads, dim), 7.0).to(dtype)
    tables = torch.full((2, 4, FAR // page + 1), -1, dtype=torch.int32)
    free = iter(torch.randperm(8).tolist())
    for slot, position in zip(slots, positions, strict=True):
        if slot >= 0 and tables[GROUP, slot, position // page] < 0:
            tables[GROUP, slot, position // page] = next(free)
    at, owners = (torch.tensor(each, dtype=torch.int32) for each in (positions, slots))
    return DeviceStep(at, owners, tables, kv, page, kv_heads, dim)


def expected_heads(x: torch.Tensor, positions: torch.Tensor, rope: Rope, norm: HeadNorm | None) -> torch.Tensor:
    """[T, heads, dim] normed, rounded, and rotated in float64 by the reference's float32 angles."""
    if norm is not None:
        wide = x.double()
        wide = wide * (wide.square().mean(-1, keepdim=True) + norm.eps).rsqrt() * norm.weight
        x = wide.to(x.dtype)
    angle = (positions.float()[:, None, None] * frequencies(rope, positions.device)).double()
    half = rope.dim // 2
    cos, sin = angle.cos() * rope.scale, angle.sin() * rope.scale
    a, b, rest = x.double().split([half, half, x.shape[-1] - rope.dim], dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)


def interpreter_rounds(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Where the interpreter's cast is right: to fp8 it loses the carry of values that round up to a power of two."""
    return ((torch.frexp(x)[0].abs() < 0.96) & (x.abs() > 2**-5)) | torch.tensor(dtype.itemsize > 1)


@pytest.mark.parametrize("seed", [SEED])
@pytest.mark.parametrize(
    "group, kv_heads, dim, rope, normed, page, dtype, kv_dtype",
    [
        (2, 2, 64, Rope(5e5, 64), False, 16, torch.float32, torch.float32),
        (3, 1, 128, Rope(1e4, 64, scale=0.8), True, 64, torch.float32, torch.float16),
        (4, 1, 256, linear_rope(1e6, 256, 8.0), True, 32, torch.float16, torch.float16),
        (1, 2, 80, Rope(1e4, 80), False, 16, torch.float16, torch.float8_e4m3fn),
        (2, 1, 64, no_rope(64), False, 16, torch.float32, torch.float32),
    ],
    ids=["plain", "part of a head, scaled, norms", "f16, norms", "fp8 pages", "none"],
)
def test_heads_turn_and_land_in_their_pages(seed, group, kv_heads, dim, rope, normed, page, dtype, kv_dtype):
    torch.manual_seed(seed)
    near = seed % 1000
    positions, slots = [0, near, near + 1, 0, FAR], [2, 0, 0, -1, 3]
    step = paged_step(positions, slots, page, kv_heads, dim, kv_dtype)
    sizes = [group * kv_heads * dim, kv_heads * dim, kv_heads * dim]
    q, k, v = (torch.randn(5, sum(sizes)).to(dtype) * 1.5).split(sizes, dim=-1)
    norms = tuple(HeadNorm(1 + 0.3 * torch.randn(dim), eps) for eps in (1e-6, 1e-2)) if normed else None
    before = step.kv.clone()
    paged = PagedLayer(step.kv[:, LAYER], step.block_tables[GROUP], step.positions, step.slots)
    out = rope_write(q, k, v, paged, rope, norms)

    real = torch.tensor(slots) >= 0
    each = enumerate((q.reshape(5, -1, dim), k.reshape(5, -1, dim)))
    turned = [expected_heads(x, step.positions, rope, norms and norms[i]) for i, x in each]
    torch.testing.assert_close(out[real].double(), turned[0].flatten(1)[real], rtol=0, atol=TOLERANCE[dtype])
    assert (out[~real] == 0).all()
    for i in real.nonzero()[:, 0].tolist():
        place = (int(step.block_tables[GROUP, slots[i], positions[i] // page]), LAYER, slice(None), positions[i] % page)
        key, value = step.kv[place].float()
        rounding = 0.0626 if kv_dtype.itemsize == 1 else 1e-3
        kept, given = v[i].reshape(kv_heads, dim).to(kv_dtype).float(), v[i].reshape(kv_heads, dim).double()
        trusted = interpreter_rounds(turned[1][i], kv_dtype), interpreter_rounds(given, kv_dtype)
        torch.testing.assert_close(key.double()[trusted[0]], turned[1][i][trusted[0]], rtol=rounding, atol=4e-3)
        # Among two nearest values the interpreter takes the larger, torch the even one.
        torch.testing.assert_close(
            value[trusted[1]], kept[trusted[1]], rtol=0.13 if kv_dtype.itemsize == 1 else 0, atol=0
        )
        before[place] = step.kv[place]
    assert torch.equal(step.kv.float(), before.float())


@pytest.mark.parametrize("seed", [SEED])
def test_an_fp8_cache_holds_keys_and_values_over_their_scale(seed):
    torch.manual_seed(seed)
    scale, dim = KvScale(*(0.01 + 40 * torch.rand(2)).tolist()), 64
    step = paged_step([5, 2], [1, 0], 16, 2, dim, torch.float8_e4m3fn)
    q, k, v = ((torch.randn(2, 2 * dim) * size).half() for size in (1.0, 80 * scale.key, 30 * scale.value))
    paged = PagedLayer(step.kv[:, LAYER], step.block_tables[GROUP], step.positions, step.slots)
    rope_write(q, k, v, paged, no_rope(dim), kv_scale=scale)
    for i, (position, slot) in enumerate(((5, 1), (2, 0))):
        stored = step.kv[int(step.block_tables[GROUP, slot, 0]), LAYER, :, position]
        for entry, given, by in zip(stored, (k[i], v[i]), scale, strict=True):
            wanted = (given.double() / by).clamp(-448, 448).view(2, dim)
            trusted = interpreter_rounds(wanted, torch.float8_e4m3fn)
            torch.testing.assert_close(entry.double()[trusted], wanted[trusted], rtol=0.0626, atol=0)


def test_an_fp8_cache_clips():
    step = paged_step([5], [1], 16, 1, 64, torch.float8_e4m3fn)
    q, k, v = (torch.full((1, 64), value, dtype=torch.float32) for value in (1.0, -1e4, 3e3))
    paged = PagedLayer(step.kv[:, LAYER], step.block_tables[GROUP], step.positions, step.slots)
    rope_write(q, k, v, paged, Rope(1e4, 2))
    key, value = step.kv[int(step.block_tables[GROUP, 1, 0]), LAYER, :, 5, 0].float()
    assert (key[2:32] == -448).all()
    assert (value == 448).all()
