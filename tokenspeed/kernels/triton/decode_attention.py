"""Attention of one or a few query tokens per sequence over its pages: keys split over programs, then combined.

A program takes one work item (`queries` consecutive tokens of one sequence), one key head with its group of query heads
as rows of one tile, and one split of the keys. How a sequence's keys are split depends on its own positions and the
tile alone, and partial results are added in one order, so a row's bits do not depend on the other rows of the step.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tokenspeed.kernels.triton.attention_tiles import DecodeTile, pad
from tokenspeed.kernels.triton.launch import launch_options
from tokenspeed.kernels.triton.paged import LOG2E, Heads, PagedLayer, entries, finish, sweep
from tokenspeed.kernels.triton.prefetch import LINE, prefetch_rows

BY_BUCKET = ("num_tokens", "splits", "min_blocks", "window")
"""Not compiled in, so that the buckets share a kernel."""


@triton.jit
def _span(positions, slots, window, num_tokens, splits, min_blocks, start, token, own, KEYS: tl.constexpr):
    """Slot of an item, position of each row (-1: none), its keys [begin, end), blocks of keys, splits in use."""
    slot = tl.load(slots + start, mask=(start >= 0) & (start < num_tokens), other=-1)
    owner = tl.load(slots + token, mask=own, other=-1)
    same = own & (owner == slot) & (owner >= 0)
    position = tl.load(positions + token, mask=same, other=-1)
    end = tl.max(position) + 1
    lowest = tl.min(tl.where(same, position, end))
    begin = tl.where(window > 0, tl.maximum(lowest - window + 1, 0), 0)
    blocks = tl.where(end > 0, tl.cdiv(end, KEYS) - begin // KEYS, 0)
    used = tl.minimum(tl.cdiv(blocks, min_blocks), splits)
    return slot, position, begin, end, blocks, used


@triton.jit
def _first_token(rows, item, QUERIES: tl.constexpr, LISTED: tl.constexpr):
    """The item's first token, -1 for none."""
    if LISTED:
        return tl.load(rows + item)
    else:
        return item * QUERIES


@triton.jit
def _part(item, head, heads, split, splits, ROWS: tl.constexpr):
    """Number of a split's first partial row."""
    return ((item * heads + head).to(tl.int64) * splits + split) * ROWS


@triton.jit
def _ask(pages, keys, begin, end, blocks, split, used, kv_page, kv_which, kv_entry, KEYS: tl.constexpr,
         PAGE: tl.constexpr, DIM: tl.constexpr) -> None:  # fmt: skip
    """Have a split's first block brought into the second-level cache, with keys that are still to be written."""
    item: tl.constexpr = keys.dtype.element_ty.primitive_bitwidth // 8
    if DIM & (DIM - 1) == 0 and DIM * item >= LINE and split < used:
        n = (begin // KEYS + split * blocks // used) * KEYS + tl.arange(0, KEYS)
        offsets = entries(pages, n, n < end, kv_page, kv_entry, PAGE)
        prefetch_rows(keys + offsets, 0, item, DIM)
        prefetch_rows(keys + kv_which + offsets, 0, item, DIM)


@triton.jit(do_not_specialize=BY_BUCKET)
def _decode(q, kv, table, positions, slots, rows, out, partial, tops, totals, sinks,
            num_tokens, min_blocks, window, q_row, table_slot, kv_page, kv_which, kv_entry, kv_head, scale,
            value_scale, QUERIES: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, ROWS: tl.constexpr,
            DIM: tl.constexpr, DIM_PAD: tl.constexpr, PAGE: tl.constexpr, KEYS: tl.constexpr, CAP: tl.constexpr,
            LISTED: tl.constexpr, SINKS: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr) -> None:  # fmt: skip
    head = tl.program_id(0)
    split = tl.program_id(1)
    item = tl.program_id(2)
    if PDL:
        gdc_launch_dependents()
    if PDL and not EARLY:
        gdc_wait()
    r = tl.arange(0, ROWS)
    t = r // GROUP_PAD
    g = r % GROUP_PAD
    start = _first_token(rows, item, QUERIES, LISTED)
    token = start + t
    own = (t < QUERIES) & (g < GROUP) & (token >= t) & (token < num_tokens)
    slot, position, begin, end, blocks, used = _span(
        positions, slots, window, num_tokens, tl.num_programs(1), min_blocks, start, token, own, KEYS
    )
    pages = table + slot.to(tl.int64) * table_slot
    if PDL and EARLY:
        _ask(pages, kv + head * kv_head, begin, end, blocks, split, used, kv_page, kv_which, kv_entry, KEYS, PAGE, DIM)
        gdc_wait()

    d = tl.arange(0, DIM_PAD)
    wide = d < DIM
    heads = head * GROUP + g
    at = out + (token.to(tl.int64) * (tl.num_programs(0) * GROUP * DIM) + heads * DIM)[:, None] + d[None, :]
    if not LISTED:
        zeros = tl.zeros((ROWS, DIM_PAD), out.dtype.element_ty)
        empty = own & (tl.zeros_like(r) + used + split == 0)
        tl.store(at, zeros, mask=empty[:, None] & wide[None, :])
    if split >= used:
        return

    live = own & (position >= 0)
    query = q + (token.to(tl.int64) * q_row + heads * DIM)[:, None] + d[None, :]
    queries = tl.load(query, mask=live[:, None] & wide[None, :], other=0)
    acc = tl.zeros((ROWS, DIM_PAD), tl.float32)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    lowest = tl.where(window > 0, position - window, -1)
    first = begin // KEYS
    acc, top, total = sweep(
        acc, top, total, queries, position, lowest, begin, end, first + split * blocks // used,
        first + (split + 1) * blocks // used, pages, kv + head * kv_head, scale,
        kv_page, kv_which, kv_entry, DIM, DIM_PAD, PAGE, KEYS, CAP, True,
    )  # fmt: skip
    if used == 1:
        result = finish(acc, top, total, sinks, heads, own, SINKS) * value_scale
        # Rows of an item that hold no token of its sequence are padding, but of a listed item may be anybody's.
        kept = live if LISTED else own
        tl.store(at, result.to(out.dtype.element_ty), mask=kept[:, None] & wide[None, :])
    else:
        part = _part(item, head, tl.num_programs(0), split, tl.num_programs(1), QUERIES * GROUP) + t * GROUP + g
        tl.store(partial + part[:, None] * DIM + d[None, :], acc, mask=own[:, None] & wide[None, :])
        tl.store(tops + part, top, mask=own)
        tl.store(totals + part, total, mask=own)


@triton.jit(do_not_specialize=BY_BUCKET)
def _combine(positions, slots, rows, out, partial, tops, totals, sinks, num_tokens, splits, min_blocks, window,
             value_scale, QUERIES: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, ROWS: tl.constexpr,
             DIM: tl.constexpr, DIM_PAD: tl.constexpr, KEYS: tl.constexpr, SPLITS_PAD: tl.constexpr,
             LISTED: tl.constexpr, SINKS: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr) -> None:  # fmt: skip
    """One query head of one token: its splits in order."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    item = tl.program_id(2)
    if PDL:
        gdc_launch_dependents()
    if PDL and not EARLY:
        gdc_wait()
    t = tl.arange(0, ROWS) // GROUP_PAD
    start = _first_token(rows, item, QUERIES, LISTED)
    own = (t < QUERIES) & (start + t >= t) & (start + t < num_tokens)
    _, _, _, _, _, used = _span(positions, slots, window, num_tokens, splits, min_blocks, start, start + t, own, KEYS)
    if PDL and EARLY:
        gdc_wait()
    token = start + row // GROUP
    if (used <= 1) | (token >= num_tokens):
        return
    s = tl.arange(0, SPLITS_PAD)
    d = tl.arange(0, DIM_PAD)
    part = _part(item, head, tl.num_programs(1), s, splits, QUERIES * GROUP) + row
    at_top = tl.load(tops + part, mask=s < used, other=float("-inf"))
    highest = tl.max(at_top)
    weight = tl.exp2(at_top - tl.where(highest == float("-inf"), 0.0, highest))
    total = tl.sum(tl.load(totals + part, mask=s < used, other=0) * weight)
    sums = tl.load(partial + part[:, None] * DIM + d[None, :], mask=(s < used)[:, None] & (d < DIM)[None, :], other=0)
    acc = tl.sum(sums * weight[:, None], axis=0)
    one = tl.arange(0, 1)
    heads = one + head * GROUP + row % GROUP
    result = finish(acc[None, :], one + highest, one + total, sinks, heads, one == 0, SINKS) * value_scale
    at = token.to(tl.int64) * (tl.num_programs(1) * GROUP * DIM) + heads[:, None] * DIM + d[None, :]
    width = tl.where(highest == float("-inf"), 0, DIM) if LISTED else DIM
    tl.store(out + at, result.to(out.dtype.element_ty), mask=(d < width)[None, :])


def decode_attention(
    q: torch.Tensor,
    paged: PagedLayer,
    heads: Heads,
    tile: DecodeTile,
    sinks: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    queries: int = 1,
    early: bool = False,
    pdl: bool = False,
) -> torch.Tensor:
    """softmax(q k^T * scale) v over the pages; the query at position p sees keys p - window + 1 .. p.
    With a soft cap c scores x are c * tanh(x / c).

    q [T, heads * head_dim], rows contiguous. Work items are the T tokens in runs of `queries` (1 to 8, tokens of one
    sequence, padding last), or those that begin at the tokens of `rows` (int32 [n], -1 for none).
    sinks: float32 [heads], logits that join the softmax's denominator.
    early: positions, slots and block tables were written by a kernel that had ended before this one could start, so
    they are read before the wait of dependent launch, and keys asked for.
    Writes into `out` where given, then only the rows listed. Returns [T, heads * head_dim]; zeros for padding.
    """
    if out is None:
        out = torch.empty((q.shape[0], heads.heads * heads.head_dim), dtype=q.dtype, device=q.device)
    items = -(-q.shape[0] // queries) if rows is None else rows.shape[0]
    parts = (items, heads.kv_heads, tile.splits, queries * heads.group)
    needed = parts if tile.splits > 1 else (1,)
    partial = torch.empty((*needed, heads.head_dim), dtype=torch.float32, device=q.device)
    tops, totals = torch.empty((2, *needed), dtype=torch.float32, device=q.device)
    group_pad = pad(heads.group)
    shape = {
        "QUERIES": queries, "GROUP": heads.group, "GROUP_PAD": group_pad, "ROWS": max(16, pad(queries) * group_pad),
        "DIM": heads.head_dim, "DIM_PAD": pad(heads.head_dim), "KEYS": tile.keys, "LISTED": rows is not None,
        "SINKS": sinks is not None, "EARLY": early, "PDL": pdl,
    }  # fmt: skip
    listed, sink = out if rows is None else rows, out if sinks is None else sinks
    _decode[(heads.kv_heads, tile.splits, items)](
        q, paged.kv, paged.table, paged.positions, paged.slots, listed, out, partial, tops, totals, sink, q.shape[0],
        tile.min_blocks, heads.window, q.stride(0), paged.table.stride(0), *paged.kv.stride()[:4],
        heads.key_scale, heads.kv_scale.value, PAGE=paged.kv.shape[2], CAP=heads.softcap * LOG2E.value, **shape,
        **launch_options(pdl, num_warps=tile.warps, num_stages=tile.stages),
    )  # fmt: skip
    if tile.splits > 1:
        # A thread holds 64 of the partial sums: more spills.
        combine_warps = min(16, max(1, pad(tile.splits) * pad(heads.head_dim) // 2048))
        _combine[(queries * heads.group, heads.kv_heads, items)](
            paged.positions, paged.slots, listed, out, partial, tops, totals, sink, q.shape[0], tile.splits,
            tile.min_blocks, heads.window, heads.kv_scale.value, SPLITS_PAD=pad(tile.splits), **shape,
            **launch_options(pdl, num_warps=combine_warps),
        )  # fmt: skip
    return out
