"""A sequence's keys split over programs of one launch: their partial results, and who adds them up.

A split leaves, per query row, the sum of 2^(score - top) * value, its top and the sum of 2^(score - top), all float32.
The last program of an item and key head to finish adds them in the order of the splits, whichever it is.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from tokenspeed.kernels.triton.attention_tiles import MAX_SPLITS, pad
from tokenspeed.kernels.triton.paged import finish

_HELD_SUMS = 64
"""Partial sums that a thread holds at once: more spills."""


class Partials(NamedTuple):
    """sums: float32 [items, kv_heads, splits, rows, head_dim]. tops, totals: float32 [items, kv_heads, splits, rows].
    arrived: int32, at least items * kv_heads zeros."""

    sums: torch.Tensor
    tops: torch.Tensor
    totals: torch.Tensor
    arrived: torch.Tensor


def partials(items: int, kv_heads: int, splits: int, rows: int, head_dim: int, device: torch.device) -> Partials:
    """Room for the partial results of a launch; nothing to speak of where nothing is split."""
    needed = (items, kv_heads, splits, rows) if splits > 1 else (1,)
    sums = torch.empty((*needed, head_dim), dtype=torch.float32, device=device)
    tops, totals = torch.empty((2, *needed), dtype=torch.float32, device=device)
    return Partials(sums, tops, totals, arrivals(device, pad(max(1024, items * kv_heads))))


@cache
def arrivals(device: torch.device, size: int) -> torch.Tensor:
    """Counters int32 [size] that are zero between launches: whoever adds up sets them back, so a captured graph can be
    replayed. All launches of a device share them, so those must follow one another. Made by the first launch of a
    size, which must not be one that is captured."""
    return torch.zeros(size, dtype=torch.int32, device=device)


def splits_at_once(rows: int, head_dim: int, warps: int) -> int:
    """How many splits of `rows` rows are added at once. Not by how many there are, so that buckets share a kernel."""
    return max(1, min(MAX_SPLITS, _HELD_SUMS * 32 * warps // (pad(rows) * pad(head_dim))))


@triton.jit
def part_of(item, head, heads, split, splits, ROWS: tl.constexpr):
    """Number of a split's first partial row."""
    return ((item * heads + head).to(tl.int64) * splits + split) * ROWS


@triton.jit
def keep_part(sums, tops, totals, part, acc, top, total, own, DIM: tl.constexpr, DIM_PAD: tl.constexpr) -> None:
    """Store a split's result, row by row at `part`."""
    d = tl.arange(0, DIM_PAD)
    tl.store(sums + part[:, None] * DIM + d[None, :], acc, mask=own[:, None] & (d < DIM)[None, :])
    tl.store(tops + part, top, mask=own)
    tl.store(totals + part, total, mask=own)


@triton.jit
def last_to_arrive(counter, used):
    """Whether all others of the `used` programs have arrived; then what each stored before is visible here."""
    # The atomic is one thread's: what the other threads of this program stored must come before it.
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel") == used - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def add_splits(sums, tops, totals, part, used, ROWS: tl.constexpr, ROWS_PAD: tl.constexpr, DIM: tl.constexpr,
               DIM_PAD: tl.constexpr, AT_ONCE: tl.constexpr):  # fmt: skip
    """Sum [ROWS_PAD, DIM_PAD], top and total [ROWS_PAD] of the splits whose first partial row is `part`.

    Loads pass by the first-level cache: it may hold what a launch before left at these addresses."""
    r = tl.arange(0, ROWS_PAD)
    d = tl.arange(0, DIM_PAD)
    acc = tl.zeros((ROWS_PAD, DIM_PAD), tl.float32)
    top = tl.full((ROWS_PAD,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS_PAD,), tl.float32)
    for begin in range(0, used, AT_ONCE):
        s = begin + tl.arange(0, AT_ONCE)
        at = part + s[:, None] * ROWS + r[None, :]
        live = (s < used)[:, None] & (r < ROWS)[None, :]
        inside = live[:, :, None] & (d < DIM)[None, None, :]
        terms = tl.load(sums + at[:, :, None] * DIM + d[None, None, :], mask=inside, other=0, cache_modifier=".cg")
        its_top = tl.load(tops + at, mask=live, other=float("-inf"), cache_modifier=".cg")
        its_total = tl.load(totals + at, mask=live, other=0, cache_modifier=".cg")
        highest = tl.maximum(top, tl.max(its_top, axis=0))
        base = tl.where(highest == float("-inf"), 0.0, highest)
        shrink = tl.exp2(top - base)
        weight = tl.exp2(its_top - base[None, :])
        acc = acc * shrink[:, None] + tl.sum(terms * weight[:, :, None], axis=0)
        total = total * shrink + tl.sum(its_total * weight, axis=0)
        top = highest
    return acc, top, total


@triton.jit
def finish_item(sums, tops, totals, part, used, out, sinks, start, head, num_tokens, kv_heads, COUNT: tl.constexpr,
                ROWS_PAD: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
                AT_ONCE: tl.constexpr, LISTED: tl.constexpr, SINKS: tl.constexpr) -> None:  # fmt: skip
    """Add up an item's splits and write its rows, which are GROUP query heads of each token from `start` on. LISTED:
    only those that have keys."""
    acc, top, total = add_splits(sums, tops, totals, part, used, COUNT, ROWS_PAD, DIM, DIM_PAD, AT_ONCE)
    row = tl.arange(0, ROWS_PAD)
    d = tl.arange(0, DIM_PAD)
    token = start + row // GROUP
    heads = head * GROUP + row % GROUP
    kept = (row < COUNT) & (token < num_tokens)
    result = finish(acc, top, total, sinks, heads, kept, SINKS)
    if LISTED:
        kept = kept & (top > float("-inf"))
    at = token.to(tl.int64)[:, None] * (kv_heads * GROUP * DIM) + (heads * DIM)[:, None] + d[None, :]
    tl.store(out + at, result.to(out.dtype.element_ty), mask=kept[:, None] & (d < DIM)[None, :])
