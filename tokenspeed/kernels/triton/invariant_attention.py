"""Attention whose rows have the same bits in every batch: one kernel for prompts and decoding alike.

A sequence's keys are cut at fixed positions, SPAN keys each; a span gives a partial softmax sum of each query, and the
sums are merged in the order of the spans. Whether a span's keys are read for a query that does not see them changes
nothing of its sum, so it does not matter which queries share a tile of ROWS. In small steps a program takes some of the
spans and leaves their sums to a second kernel; in others one program takes all and merges as it goes. Both merge the
same float32 numbers by the same operations, never contracted, so this choice changes no bit either.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tokenspeed.contracts.errors import UnsupportedError
from tokenspeed.kernels.triton.attention_tiles import HIP, HIP_STAGES, pad
from tokenspeed.kernels.triton.launch import dependent_launch, launch_options
from tokenspeed.kernels.triton.paged import LOG2E, Heads, PagedLayer, finish, sweep

ROWS = 64
"""Query tokens times query heads of one key head in a tile, always."""
SPAN = 256
"""Keys of a partial sum."""
MOST_TOKENS = 64
"""Steps of more tokens have work for all programs without sharing a sequence's spans."""
MOST_SCRATCH = 64 << 20
"""Bytes of partial sums that a step may leave to the second kernel."""
MOST_PROGRAMS = 16
"""Programs that share the spans of a tile."""


class InvariantTile(NamedTuple):
    """keys: per block."""

    keys: int
    warps: int
    stages: int


TILES: dict[tuple[int, int], InvariantTile] = {
    (64, 2): InvariantTile(64, 4, 3),
    (128, 2): InvariantTile(64, 4, 3),
    (256, 2): InvariantTile(32, 8, 2),
    (64, 4): InvariantTile(32, 4, 2),
    (128, 4): InvariantTile(32, 4, 1),
    (256, 4): InvariantTile(16, 4, 1),
}
"""By padded head_dim and bytes of the compute dtype."""


def invariant_tile(head_dim: int, itemsize: int, hip: bool = HIP) -> InvariantTile:
    """The tile of every step; itemsize: bytes of the compute dtype."""
    tile = TILES[max(64, pad(head_dim)), itemsize]
    return tile._replace(stages=min(tile.stages, HIP_STAGES)) if hip else tile


def invariant_item_tokens(heads: int, kv_heads: int) -> int:
    """Most query tokens of one work item."""
    return ROWS // pad(heads // kv_heads)


@triton.jit
def no_sum(ROWS: tl.constexpr, DIM_PAD: tl.constexpr):
    """The softmax sum of no keys."""
    nothing = tl.zeros((ROWS,), tl.float32)
    return tl.zeros((ROWS, DIM_PAD), tl.float32), nothing + float("-inf"), nothing


@triton.jit
def merge(acc, top, total, part, part_top, part_total):
    """Two partial softmax sums as one (`paged.absorb` says what they are). One without keys changes no bit of the
    other."""
    highest = tl.maximum(top, part_top)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    kept = tl.exp2(top - base)
    added = tl.exp2(part_top - base)
    return acc * kept[:, None] + part * added[:, None], highest, total * kept + part_total * added


@triton.jit(do_not_specialize=("window", "spans"))
def _attend(q, kv, table, items, out, partial, tops, totals, sinks, window, spans, q_row, table_slot, kv_page,
            kv_which, kv_entry, kv_head, scale, value_scale, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr,
            ROWS: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, PAGE: tl.constexpr, KEYS: tl.constexpr,
            SPAN: tl.constexpr, CAP: tl.constexpr, APART: tl.constexpr, SINKS: tl.constexpr,
            PDL: tl.constexpr) -> None:  # fmt: skip
    """One item and key head. APART: every num_programs(2)-th span, whose sums go to `partial` [T, heads, spans, DIM],
    `tops` and `totals` [T, heads, spans]; else all spans, and the result to `out`."""
    head = tl.program_id(0)
    lane = tl.program_id(2)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    # Later pieces of a prompt have more keys: the longest work starts first.
    item = items + (tl.num_programs(1) - 1 - tl.program_id(1)) * 4
    slot = tl.load(item)
    first = tl.load(item + 1)
    count = tl.load(item + 2)
    start = tl.load(item + 3)
    r = tl.arange(0, ROWS)
    t = r // GROUP_PAD
    g = r % GROUP_PAD
    d = tl.arange(0, DIM_PAD)
    heads = head * GROUP + g
    own = (t < count) & (g < GROUP)
    wide = d < DIM
    inside = own[:, None] & wide[None, :]
    token = (first + t).to(tl.int64)
    number = token * (tl.num_programs(0) * GROUP) + heads
    at = out + (number * DIM)[:, None] + d[None, :]
    if slot < 0:
        tl.store(
            at, tl.zeros((ROWS, DIM_PAD), out.dtype.element_ty), mask=inside & (tl.zeros_like(r) + lane == 0)[:, None]
        )
        return

    queries = tl.load(q + (token * q_row + heads * DIM)[:, None] + d[None, :], mask=inside, other=0)
    position = start + t
    end = start + count
    begin = tl.where(window > 0, tl.maximum(start - window + 1, 0), 0)
    lowest = tl.where(window > 0, position - window, -1)
    pages = table + slot.to(tl.int64) * table_slot
    keys = kv + head * kv_head
    acc, top, total = no_sum(ROWS, DIM_PAD)
    for span in range(begin // SPAN + lane, tl.cdiv(end, SPAN), tl.num_programs(2)):
        part, part_top, part_total = no_sum(ROWS, DIM_PAD)
        part, part_top, part_total = sweep(
            part, part_top, part_total, queries, position, lowest, begin, end, tl.maximum(span * SPAN, begin) // KEYS,
            tl.cdiv(tl.minimum(span * SPAN + SPAN, end), KEYS), pages, keys, scale, kv_page, kv_which, kv_entry, DIM,
            DIM_PAD, PAGE, KEYS, CAP, True,
        )  # fmt: skip
        if APART:
            place = number * spans + span
            tl.store(partial + (place * DIM)[:, None] + d[None, :], part, mask=inside)
            tl.store(tops + place, part_top, mask=own)
            tl.store(totals + place, part_total, mask=own)
        else:
            acc, top, total = merge(acc, top, total, part, part_top, part_total)
    if not APART:
        result = finish(acc, top, total, sinks, heads, own, SINKS) * value_scale
        tl.store(at, result.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=("window", "spans"))
def _merge_spans(positions, slots, out, partial, tops, totals, sinks, window, spans, value_scale, GROUP: tl.constexpr,
                 GROUP_PAD: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, SPAN: tl.constexpr,
                 SINKS: tl.constexpr, PDL: tl.constexpr) -> None:  # fmt: skip
    """The query heads of one key head of one token: its spans in order."""
    token = tl.program_id(0).to(tl.int64)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if tl.load(slots + token) < 0:
        return
    position = tl.load(positions + token)
    g = tl.arange(0, GROUP_PAD)
    d = tl.arange(0, DIM_PAD)
    own = g < GROUP
    inside = own[:, None] & (d < DIM)[None, :]
    heads = tl.program_id(1) * GROUP + g
    number = token * (tl.num_programs(1) * GROUP) + heads
    begin = tl.where(window > 0, tl.maximum(position - window + 1, 0), 0)
    acc, top, total = no_sum(GROUP_PAD, DIM_PAD)
    for span in tl.range(begin // SPAN, position // SPAN + 1, num_stages=4):
        place = number * spans + span
        part = tl.load(partial + (place * DIM)[:, None] + d[None, :], mask=inside, other=0.0)
        part_top = tl.load(tops + place, mask=own, other=0.0)
        part_total = tl.load(totals + place, mask=own, other=0.0)
        acc, top, total = merge(acc, top, total, part, part_top, part_total)
    result = finish(acc, top, total, sinks, heads, own, SINKS) * value_scale
    tl.store(out + (number * DIM)[:, None] + d[None, :], result.to(out.dtype.element_ty), mask=inside)


def invariant_attention(
    q: torch.Tensor,
    paged: PagedLayer,
    items: torch.Tensor,
    heads: Heads,
    sinks: torch.Tensor | None = None,
    programs: int | None = None,
    tile: InvariantTile | None = None,
) -> torch.Tensor:
    """softmax(q k^T * scale) v over the pages; the query at position p sees keys p - window + 1 .. p.
    With a soft cap c scores x are c * tanh(x / c).

    q [T, heads * head_dim], rows contiguous. items: int32 [n, 4] of (slot, first token, tokens, first position), at
    most `invariant_item_tokens` each, that together hold every token; slot -1 with tokens: rows to fill with zeros.
    sinks: float32 [heads], logits that join the softmax's denominator. programs: how many share the spans of an item, 0
    for one that also merges them; by default what suits the step.
    Returns [T, heads * head_dim]. Raises UnsupportedError where a key head has more query heads than a tile has rows.
    """
    if pad(heads.group) > ROWS:
        raise UnsupportedError(f"batch-invariant attention takes {ROWS} heads per key head, got {heads.group}")
    tokens = q.shape[0]
    spans = triton.cdiv(paged.table.shape[1] * paged.kv.shape[2], SPAN)
    programs = shared_by(tokens, heads, spans) if programs is None else programs
    tile = tile or invariant_tile(heads.head_dim, q.element_size())
    out = torch.empty((tokens, heads.heads * heads.head_dim), dtype=q.dtype, device=q.device)
    sums = (tokens, heads.heads, spans) if programs else (1,)
    partial = torch.empty((*sums, heads.head_dim), dtype=torch.float32, device=q.device)
    tops, totals = torch.empty((2, *sums), dtype=torch.float32, device=q.device)
    pdl, sink = dependent_launch(q.device), out if sinks is None else sinks
    shape = {"GROUP": heads.group, "GROUP_PAD": pad(heads.group), "DIM": heads.head_dim, "DIM_PAD": pad(heads.head_dim),
             "SPAN": SPAN, "SINKS": sinks is not None, "PDL": pdl}  # fmt: skip
    exact = launch_options(pdl, enable_fp_fusion=False)
    _attend[(heads.kv_heads, items.shape[0], max(1, programs))](
        q, paged.kv, paged.table, items, out, partial, tops, totals, sink, heads.window, spans, q.stride(0),
        paged.table.stride(0), *paged.kv.stride()[:4], heads.key_scale, heads.kv_scale.value, ROWS=ROWS,
        PAGE=paged.kv.shape[2], KEYS=tile.keys, CAP=heads.softcap * LOG2E.value, APART=programs > 0, **shape,
        num_warps=tile.warps, num_stages=tile.stages, **exact,
    )  # fmt: skip
    if programs:
        _merge_spans[(tokens, heads.kv_heads)](
            paged.positions, paged.slots, out, partial, tops, totals, sink, heads.window, spans, heads.kv_scale.value,
            **shape, num_warps=4, **exact,
        )  # fmt: skip
    return out


def shared_by(tokens: int, heads: Heads, spans: int) -> int:
    """How many programs share the spans of an item in a step of so many tokens; 0 where each has a single one."""
    scratch = 4 * tokens * heads.heads * spans * heads.head_dim
    return min(spans, MOST_PROGRAMS) if tokens <= MOST_TOKENS and spans > 1 and scratch <= MOST_SCRATCH else 0
