"""The prefill kernel's work list, made on the device from the step's rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from tokenspeed.kernels.triton.attention_tiles import pad


@triton.jit(do_not_specialize=("tokens", "num_items"))
def _make_items(slots, starts, counts, positions, num_rows, items, decode_rows, tokens, num_items,
                ROWS: tl.constexpr, ROWS_PAD: tl.constexpr, ITEM: tl.constexpr, BLOCK: tl.constexpr,
                LISTED: tl.constexpr) -> None:  # fmt: skip
    """BLOCK items per program. Entry 2i of the pieces is what row i computes, entry 2i + 1 the padding behind it."""
    e = tl.arange(0, 2 * ROWS_PAD)
    row = e // 2
    padding = e % 2 == 1
    rows = tl.load(num_rows)
    alive = row < rows
    start = tl.load(starts + row, mask=alive, other=0)
    used = tl.load(slots + row, mask=alive, other=-1) >= 0
    count = tl.where(used, tl.load(counts + row, mask=alive, other=0), 0)
    after = tl.where(row + 1 < rows, tl.load(starts + row + 1, mask=row + 1 < rows, other=0), tokens)
    listed = tl.where(count == 1, 1, 0) if LISTED else tl.zeros_like(count)
    length = tl.where(padding, after - start - count, count - listed)
    pieces = tl.where(alive, tl.cdiv(tl.maximum(length, 0), ITEM), 0)
    upto = tl.cumsum(pieces, axis=0)

    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    before = upto[None, :] <= j[:, None]
    entry = tl.sum(before.to(tl.int32), axis=1)
    piece = j - tl.max(tl.where(before, upto[None, :], 0), axis=1)
    at = entry // 2
    found = entry < 2 * ROWS_PAD
    slot = tl.load(slots + at, mask=found, other=-1)
    fed = tl.where(slot >= 0, tl.load(counts + at, mask=found, other=0), 0)
    begin = tl.load(starts + at, mask=found, other=0)
    limit = tl.where(at + 1 < rows, tl.load(starts + at + 1, mask=found & (at + 1 < rows), other=0), tokens)
    gap = entry % 2 == 1
    done = piece * ITEM
    first = begin + done + tl.where(gap, fed, 0)
    size = tl.minimum(tl.where(gap, limit - begin - fed, fed) - done, ITEM)
    position = tl.load(positions + at, mask=found, other=0) + done
    out = items + j * 4
    keep = j < num_items
    tl.store(out, tl.where(found & (gap == 0), slot, -1), mask=keep)
    tl.store(out + 1, tl.where(found, first, 0), mask=keep)
    tl.store(out + 2, tl.where(found, size, 0), mask=keep)
    tl.store(out + 3, tl.where(found & (gap == 0), position, 0), mask=keep)
    if LISTED:
        mine = (row + tl.program_id(0) * ROWS < ROWS) & (padding == 0)
        tl.store(decode_rows + row, tl.where(listed == 1, start, -1), mask=mine)


class StepRows(NamedTuple):
    """The rows of a step, on the device: int32 [R] each, `number` int32 [1].

    Of each row its slot (-1: not fed), its first token in the step, the tokens really fed, and the first's position.
    starts ascend from 0. Rows from `number` on are not read.
    """

    slots: torch.Tensor
    starts: torch.Tensor
    counts: torch.Tensor
    positions: torch.Tensor
    number: torch.Tensor


def make_items(
    rows: StepRows,
    tokens: int,
    item_tokens: int,
    items: torch.Tensor,
    decode_rows: torch.Tensor | None = None,
) -> None:
    """Cut the rows of a step into work items of at most `item_tokens` tokens, without asking the device anything.

    tokens: the bucket's size. What follows a row's tokens, up to the next row or to the end, is padding.
    items: int32 [n, 4], n by `attention_tiles.max_items`, is filled with (slot, first token, tokens, first position),
    in order of the step; padding has slot -1, what is left over also no tokens.
    decode_rows: int32 [R], where given takes the token of each row that feeds one, else -1; those rows get no item.
    """
    count, block = rows.slots.shape[0], 32
    _make_items[(triton.cdiv(items.shape[0], block),)](
        *rows, items, items if decode_rows is None else decode_rows, tokens, items.shape[0], ROWS=count,
        ROWS_PAD=pad(max(count, 2)), ITEM=item_tokens, BLOCK=block, LISTED=decode_rows is not None, num_warps=4,
    )  # fmt: skip
