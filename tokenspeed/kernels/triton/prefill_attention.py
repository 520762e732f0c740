"""Attention of many query tokens per sequence over its pages, by work items that lie on the device.

A program takes one item (some consecutive tokens of one sequence) and one key head; its tile's rows are the item's
tokens times the group's query heads. Keys are read block by block from the first that any query sees to the last query.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tokenspeed.contracts.errors import UnsupportedError
from tokenspeed.kernels.triton.attention_tiles import PrefillTile, pad
from tokenspeed.kernels.triton.paged import LOG2E, Heads, PagedLayer, finish, sweep


@triton.jit(do_not_specialize=("window",))
def _prefill(q, kv, table, items, out, sinks, window, q_row, table_slot, kv_page, kv_which, kv_entry, kv_head, scale,
             value_scale, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr,
             DIM_PAD: tl.constexpr, PAGE: tl.constexpr, KEYS: tl.constexpr, WINDOWED: tl.constexpr,
             CAP: tl.constexpr, SINKS: tl.constexpr) -> None:  # fmt: skip
    head = tl.program_id(0)
    # Later chunks of a sequence have more keys: the longest work starts first.
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
    inside = own[:, None] & (d < DIM)[None, :]
    token = (first + t).to(tl.int64)
    at = out + (token * (tl.num_programs(0) * GROUP * DIM) + heads * DIM)[:, None] + d[None, :]
    if slot < 0:
        tl.store(at, tl.zeros((ROWS, DIM_PAD), out.dtype.element_ty), mask=inside)
        return

    queries = tl.load(q + (token * q_row + heads * DIM)[:, None] + d[None, :], mask=inside, other=0)
    position = start + t
    end = start + count
    begin = 0
    lowest = tl.full((ROWS,), -1, tl.int32)
    unmasked = 0
    last = tl.cdiv(end, KEYS)
    if WINDOWED:
        begin = tl.maximum(start - window + 1, 0)
        lowest = position - window
        unmasked = tl.minimum(tl.cdiv(tl.maximum(end - window, 0), KEYS), last)
    masked = tl.maximum((start + 1) // KEYS, unmasked)
    acc = tl.zeros((ROWS, DIM_PAD), tl.float32)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    pages = table + slot.to(tl.int64) * table_slot
    keys = kv + head * kv_head
    if WINDOWED:
        acc, top, total = sweep(
            acc, top, total, queries, position, lowest, begin, end, begin // KEYS, unmasked, pages, keys, scale,
            kv_page, kv_which, kv_entry, DIM, DIM_PAD, PAGE, KEYS, CAP, True,
        )  # fmt: skip
    acc, top, total = sweep(
        acc, top, total, queries, position, lowest, begin, end, unmasked, masked, pages, keys, scale,
        kv_page, kv_which, kv_entry, DIM, DIM_PAD, PAGE, KEYS, CAP, False,
    )  # fmt: skip
    acc, top, total = sweep(
        acc, top, total, queries, position, lowest, begin, end, masked, last, pages, keys, scale,
        kv_page, kv_which, kv_entry, DIM, DIM_PAD, PAGE, KEYS, CAP, True,
    )  # fmt: skip
    result = finish(acc, top, total, sinks, heads, own, SINKS) * value_scale
    tl.store(at, result.to(out.dtype.element_ty), mask=inside)


def prefill_attention(
    q: torch.Tensor,
    paged: PagedLayer,
    items: torch.Tensor,
    heads: Heads,
    tile: PrefillTile,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(q k^T * scale) v over the pages; the query at position p sees keys p - window + 1 .. p.
    With a soft cap c scores x are c * tanh(x / c).

    q [T, heads * head_dim], rows contiguous. items: int32 [n, 4] of (slot, first token, tokens, first position), at
    most tile.rows / padded group tokens each; slot -1 with tokens: rows to fill with zeros; without: nothing.
    sinks: float32 [heads], logits that join the softmax's denominator.
    Returns [T, heads * head_dim]; rows in no item are not written. Raises UnsupportedError where a key head has more
    query heads than the tile has rows.
    """
    if pad(heads.group) > tile.rows:
        raise UnsupportedError(f"prefill attention takes at most {tile.rows} heads per key head, got {heads.group}")
    out = torch.empty((q.shape[0], heads.heads * heads.head_dim), dtype=q.dtype, device=q.device)
    _prefill[(heads.kv_heads, items.shape[0])](
        q, paged.kv, paged.table, items, out, out if sinks is None else sinks, heads.window, q.stride(0),
        paged.table.stride(0), *paged.kv.stride()[:4], heads.key_scale, heads.kv_scale.value,
        GROUP=heads.group, GROUP_PAD=pad(heads.group), ROWS=tile.rows, DIM=heads.head_dim, DIM_PAD=pad(heads.head_dim),
        PAGE=paged.kv.shape[2], KEYS=tile.keys, WINDOWED=heads.window > 0, CAP=heads.softcap * LOG2E.value,
        SINKS=sinks is not None, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out
