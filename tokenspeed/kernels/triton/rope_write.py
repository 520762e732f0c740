"""[Per-head RMS norms of q and k +] rotary embedding + KV page write, one kernel.

A program holds the query heads of one key head, that key and its value, of one token. Angles are made in the kernel,
from float32 frequencies by the reference's own formula: position * frequency rounded to float32, then cos and sin with
full range reduction. So there is no table to size by the longest context. They stay in float32, where the reference
rounds them to the compute dtype: in float32 both agree within a few ulp, below that the kernel is the more exact.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tokenspeed.kernels.triton.launch import launch_options
from tokenspeed.kernels.triton.paged import PagedLayer
from tokenspeed.ops.definitions import UNSCALED, KvScale
from tokenspeed.ops.reference import frequencies
from tokenspeed.ops.rope import Rope


class HeadNorm(NamedTuple):
    """An RMS norm of each head: weight float32 [head_dim]."""

    weight: torch.Tensor
    eps: float


@lru_cache(maxsize=64)
def device_frequencies(rope: Rope, device: torch.device) -> torch.Tensor:
    """The reference's frequencies, computed on the CPU (a GPU's pow differs in the last bit, which a position of 1e5
    makes visible). A copy to the device: call once per rope before a graph capture."""
    return frequencies(rope, torch.device("cpu")).to(device)


@triton.jit
def _rotated(base, rows, mask, norm, eps, cos, sin, DIM: tl.constexpr,
             DIM_PAD: tl.constexpr, HALF: tl.constexpr, NORMED: tl.constexpr):  # fmt: skip
    """Heads at offsets `rows` of `base`, normed and rotated, float32 [rows, DIM_PAD]; sin is signed by column."""
    d = tl.arange(0, DIM_PAD)
    partner = tl.where(d < HALF, d + HALF, tl.where(d < 2 * HALF, d - HALF, d))
    live = mask[:, None] & (d < DIM)[None, :]
    x = tl.load(base + rows[:, None] + d[None, :], mask=live, other=0).to(tl.float32)
    y = tl.load(base + rows[:, None] + partner[None, :], mask=live, other=0).to(tl.float32)
    if NORMED:
        inverse = tl.rsqrt(tl.sum(x * x, axis=1) / DIM + eps)[:, None]
        here = tl.load(norm + d, mask=d < DIM, other=0)[None, :]
        there = tl.load(norm + partner, mask=d < DIM, other=0)[None, :]
        # The norm's result is rounded to the compute dtype, as where it is an op of its own.
        x = (x * inverse * here).to(base.dtype.element_ty).to(tl.float32)
        y = (y * inverse * there).to(base.dtype.element_ty).to(tl.float32)
    return x * cos[None, :] + y * sin[None, :]


@triton.jit
def _rope_write(q, k, v, q_norm, k_norm, frequency, positions, slots, table, kv, out,
                scale, key_inverse, value_inverse, q_eps, k_eps, q_row, k_row, v_row, table_slot,
                kv_page, kv_which, kv_entry, kv_head, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr,
                DIM: tl.constexpr, DIM_PAD: tl.constexpr, HALF: tl.constexpr, PAGE: tl.constexpr,
                NORMED: tl.constexpr, FP8: tl.constexpr, PDL: tl.constexpr) -> None:  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    d = tl.arange(0, DIM_PAD)
    turn = tl.load(frequency + d % HALF, mask=d < 2 * HALF, other=0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    position = tl.load(positions + token)
    slot = tl.load(slots + token)
    # As a vector: the interpreter makes an int of a scalar truth value that is broadcast.
    alive = tl.zeros_like(d) + slot >= 0
    angle = position.to(tl.float32) * turn
    cos = tl.where(d < 2 * HALF, tl.cos(angle) * scale, 1.0)
    sin = tl.where(d < HALF, -tl.sin(angle), tl.sin(angle)) * scale

    g = tl.arange(0, GROUP_PAD)
    rows = (head * GROUP + g) * DIM
    mine = g < GROUP
    real = mine & (tl.zeros_like(g) + slot >= 0)
    query = _rotated(q + token * q_row, rows, real, q_norm, q_eps, cos, sin, DIM, DIM_PAD, HALF, NORMED)
    at = out + token * (tl.num_programs(1) * GROUP * DIM) + rows[:, None] + d[None, :]
    tl.store(at, query.to(out.dtype.element_ty), mask=mine[:, None] & (d < DIM)[None, :])

    one = tl.arange(0, 1)
    key = _rotated(k + token * k_row, one + head * DIM, one + slot >= 0, k_norm, k_eps, cos, sin, DIM, DIM_PAD, HALF,
                   NORMED)  # fmt: skip
    value = tl.load(v + token * v_row + head * DIM + d, mask=(d < DIM) & alive, other=0).to(tl.float32)
    key = tl.reshape(key.to(k.dtype.element_ty).to(tl.float32), (DIM_PAD,))
    if FP8:
        key = tl.minimum(tl.maximum(key * key_inverse, -448.0), 448.0)
        value = tl.minimum(tl.maximum(value * value_inverse, -448.0), 448.0)
    page = tl.load(table + slot.to(tl.int64) * table_slot + position // PAGE, mask=slot >= 0, other=0).to(tl.int64)
    entry = kv + page * kv_page + (position % PAGE) * kv_entry + head * kv_head + d
    tl.store(entry, key.to(kv.dtype.element_ty), mask=(d < DIM) & alive)
    tl.store(entry + kv_which, value.to(kv.dtype.element_ty), mask=(d < DIM) & alive)


def rope_write(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    paged: PagedLayer,
    rope: Rope,
    norms: tuple[HeadNorm, HeadNorm] | None = None,
    pdl: bool = False,
    kv_scale: KvScale = UNSCALED,
) -> torch.Tensor:
    """Rotate queries and keys by position, after `norms` of both where given, and write keys and values into pages.

    q [T, heads * head_dim], k and v [T, kv_heads * head_dim]: rows may have gaps (views of one projection's output).
    Returns rotated queries, contiguous; zeros for padding, of which nothing is written. An fp8 cache takes keys and
    values over their scale as e4m3, clipped to +-448; others have no scale.
    """
    tokens, (kv_heads, dim) = q.shape[0], paged.kv.shape[-2:]
    group = q.shape[1] // (kv_heads * dim)
    out = torch.empty((tokens, q.shape[1]), dtype=q.dtype, device=q.device)
    turns = device_frequencies(rope, q.device)
    q_norm, k_norm = norms or (HeadNorm(turns, 0.0), HeadNorm(turns, 0.0))
    group_pad, dim_pad = triton.next_power_of_2(group), triton.next_power_of_2(dim)
    options = launch_options(pdl, num_warps=min(4, max(1, group_pad * dim_pad // 512)))
    _rope_write[(tokens, kv_heads)](
        q, k, v, q_norm.weight, k_norm.weight, turns, paged.positions, paged.slots, paged.table, paged.kv, out,
        rope.scale, kv_scale.key_inverse, kv_scale.value_inverse, q_norm.eps, k_norm.eps,
        q.stride(0), k.stride(0), v.stride(0), paged.table.stride(0), *paged.kv.stride()[:4],
        GROUP=group, GROUP_PAD=group_pad, DIM=dim, DIM_PAD=dim_pad, HALF=rope.dim // 2, PAGE=paged.kv.shape[2],
        NORMED=norms is not None, FP8=paged.kv.dtype == torch.float8_e4m3fn, PDL=pdl, **options,
    )  # fmt: skip
    return out
