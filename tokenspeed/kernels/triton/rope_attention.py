"""A decode step's [per-head norms of q and k +] rotary embedding, KV page write, attention and the adding up of splits,
one kernel. Every token is the only one of its sequence.

A program takes one token, one key head with its group of query heads, and one split of the keys before the token. It
asks for its first keys before it waits for the projection that gives the queries. The last split in use also rotates
the token's key, writes it and its value, and takes both from registers: no program reads what another one of the launch
writes, but for partial results.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tokenspeed.kernels.triton.attention_tiles import FusedTile, pad
from tokenspeed.kernels.triton.launch import launch_options
from tokenspeed.kernels.triton.operands import Matrix
from tokenspeed.kernels.triton.paged import LOG2E, Heads, PagedLayer, attend, entries, finish, load_block, sweep
from tokenspeed.kernels.triton.rope_write import HeadNorm, cos_sin, device_frequencies, rotated, write_entry
from tokenspeed.kernels.triton.skinny import LINE, prefetch_lines
from tokenspeed.kernels.triton.splits import (
    finish_item,
    keep_part,
    last_to_arrive,
    part_of,
    partials,
    splits_at_once,
)
from tokenspeed.ops.rope import Rope
from tokenspeed.quantization.fp8 import Fp8Weight

BY_BUCKET = ("num_tokens", "min_blocks", "programs", "window", "ahead_lines")
"""Not compiled in, so that the buckets share a kernel."""
MOST_TOKENS = 64
BEFORE_WAIT, AFTER_KEYS = 1, 2
"""When programs ask for what the next kernel reads: first of all, or once they have their own keys."""


@triton.jit
def _blocks_before(position, window, KEYS: tl.constexpr):
    """First key that a query sees, and blocks of keys from there to the query, its own not among them."""
    begin = tl.where(window > 0, tl.maximum(position - window + 1, 0), 0)
    return begin, tl.where(position > begin, tl.cdiv(position, KEYS) - begin // KEYS, 0)


@triton.jit
def _fitting(positions, slots, window, num_tokens, most, few, KEYS: tl.constexpr, TOKENS_PAD: tl.constexpr):
    """Blocks of keys per split, so that all sequences' splits are at most `most`; `few` where sequences are more."""
    t = tl.arange(0, TOKENS_PAD)
    alive = tl.load(slots + t, mask=t < num_tokens, other=-1) >= 0
    _, before = _blocks_before(tl.load(positions + t, mask=alive, other=0), window, KEYS)
    blocks = tl.where(alive, tl.maximum(before, 1), 0)
    each = tl.maximum(tl.cdiv(tl.sum(blocks), most), 1)
    if tl.sum(alive.to(tl.int32)) > most:
        each = tl.maximum(each, few)
    else:
        while tl.sum(tl.cdiv(blocks, each)) > most:
            each += tl.cdiv(each, 4)
    return each


@triton.jit
def _ask_ahead(ahead, lines, LINES: tl.constexpr) -> None:
    """This program's share of `lines` cache lines from `ahead` on, to be brought into the second-level cache."""
    programs = tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2)
    number = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    ITEM: tl.constexpr = ahead.dtype.element_ty.primitive_bitwidth // 8
    share = tl.cdiv(lines, programs)
    end = tl.minimum((number + 1) * share, lines)
    for first in range(number * share, end, LINES):
        line = tl.minimum(first + tl.arange(0, LINES), end - 1).to(tl.int64)
        prefetch_lines(ahead + line * (LINE // ITEM))


@triton.jit
def _ask_keys(pages, keys, begin, position, first, last, kv_page, kv_which, kv_entry, DIM: tl.constexpr,
              DIM_PAD: tl.constexpr, PAGE: tl.constexpr, KEYS: tl.constexpr) -> None:  # fmt: skip
    """Blocks [first, last) of keys and values, to be brought into the second-level cache."""
    ITEM: tl.constexpr = keys.dtype.element_ty.primitive_bitwidth // 8
    LINES: tl.constexpr = DIM_PAD * ITEM // LINE if DIM_PAD * ITEM > LINE else 1
    column = tl.minimum(tl.arange(0, LINES) * (LINE // ITEM), DIM - 1)
    for i in range(first, last):
        n = tl.minimum(tl.maximum(i * KEYS + tl.arange(0, KEYS), begin), position - 1)
        offsets = entries(pages, n, n >= 0, kv_page, kv_entry, PAGE)[:, None] + column[None, :]
        prefetch_lines(keys + offsets)
        prefetch_lines(keys + kv_which + offsets)


@triton.jit
def _own_key(queries, k, v, head, norm, eps, cos, sin, position, pages, keys, kv_page, kv_which, kv_entry, scale,
             DIM: tl.constexpr, DIM_PAD: tl.constexpr, HALF: tl.constexpr, PAGE: tl.constexpr,
             NORMED: tl.constexpr, FP8: tl.constexpr):  # fmt: skip
    """Rotate and write the token's own key and value: scores [rows] of the queries, and the value [DIM_PAD], of what
    was written. In the compute dtype, as keys that come from pages."""
    page = tl.load(pages + position // PAGE).to(tl.int64)
    entry = keys + page * kv_page + (position % PAGE) * kv_entry
    key, value = write_entry(
        k, v, head, norm, eps, cos, sin, entry, kv_which, 1, DIM, DIM_PAD, HALF, NORMED, FP8
    )  # fmt: skip
    key = key.to(queries.dtype).to(tl.float32)
    scores = tl.sum(queries.to(tl.float32) * key[None, :], axis=1) * scale
    return scores, value.to(queries.dtype).to(tl.float32)


@triton.jit
def _share(positions, slots, window, num_tokens, programs, min_blocks, KEYS: tl.constexpr, TOKENS_PAD: tl.constexpr):
    """Of the program's token: slot, position, first key, blocks of keys, and splits in use."""
    slot = tl.load(slots + tl.program_id(2))
    position = tl.load(positions + tl.program_id(2))
    begin, blocks = _blocks_before(position, window, KEYS)
    if TOKENS_PAD > 0:
        most = tl.maximum(programs // tl.num_programs(0), 1)
        min_blocks = _fitting(positions, slots, window, num_tokens, most, min_blocks, KEYS, TOKENS_PAD)
    used = tl.minimum(tl.cdiv(tl.maximum(blocks, 1), min_blocks), tl.num_programs(1))
    return slot, position, begin, blocks, tl.where(slot >= 0, used, 0)


@triton.jit
def _settle(acc, top, total, used, out, sums, tops, totals, arrived, sinks, num_tokens, GROUP: tl.constexpr,
            GROUP_PAD: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
            AT_ONCE: tl.constexpr, SINKS: tl.constexpr) -> None:  # fmt: skip
    """Write the result, or leave it to whoever finishes last."""
    head, split, token = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kv_heads = tl.num_programs(0)
    r = tl.arange(0, ROWS)
    own = r < GROUP
    if used == 1:
        result = finish(acc, top, total, sinks, head * GROUP + r, own, SINKS).to(out.dtype.element_ty)
        at, inside = _places(out, GROUP, ROWS, DIM, DIM_PAD)
        tl.store(at, result, mask=inside)
    else:
        first_part = part_of(token, head, kv_heads, 0, tl.num_programs(1), GROUP)
        keep_part(sums, tops, totals, first_part + split * GROUP + r, acc, top, total, own, DIM, DIM_PAD)
        if last_to_arrive(arrived + token * kv_heads + head, used):
            finish_item(
                sums, tops, totals, first_part, used, out, sinks, token, head, num_tokens, kv_heads, GROUP,
                GROUP_PAD, GROUP, DIM, DIM_PAD, AT_ONCE, False, SINKS,
            )  # fmt: skip


@triton.jit
def _places(out, GROUP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr):
    """Where the program's rows of the result lie, and which of them there are."""
    r = tl.arange(0, ROWS)
    d = tl.arange(0, DIM_PAD)
    row = out + (tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * (GROUP * DIM)
    return row + r[:, None] * DIM + d[None, :], (r < GROUP)[:, None] & (d < DIM)[None, :]


@triton.jit
def _leave(out, empty, GROUP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
           PDL: tl.constexpr) -> None:  # fmt: skip
    """What a program without work does: zeros for padding, one program per key head."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if empty:
        at, inside = _places(out, GROUP, ROWS, DIM, DIM_PAD)
        tl.store(at, tl.zeros((ROWS, DIM_PAD), out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=BY_BUCKET)
def _rope_attention(q, k, v, q_norm, k_norm, frequency, kv, table, positions, slots, out, sums, tops, totals, arrived,
                    sinks, ahead, num_tokens, min_blocks, programs, window, ahead_lines, q_eps, k_eps, q_row, k_row,
                    v_row, table_slot, kv_page, kv_which, kv_entry, kv_head, scale,
                    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr,
                    DIM_PAD: tl.constexpr, HALF: tl.constexpr, PAGE: tl.constexpr, KEYS: tl.constexpr,
                    TOKENS_PAD: tl.constexpr, HELD: tl.constexpr, WARM: tl.constexpr, NORMED: tl.constexpr,
                    SINKS: tl.constexpr, FP8: tl.constexpr, AT_ONCE: tl.constexpr, AHEAD: tl.constexpr,
                    PDL: tl.constexpr) -> None:  # fmt: skip
    head, split, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    if AHEAD == 1:
        _ask_ahead(ahead, ahead_lines, 128)
    # What is read before the wait is older than the kernel in front (see `launch`): inputs of the step, and keys that
    # earlier steps wrote.
    slot, position, begin, blocks, used = _share(
        positions, slots, window, num_tokens, programs, min_blocks, KEYS, TOKENS_PAD
    )  # fmt: skip
    if split >= used:
        if AHEAD == 2:
            _ask_ahead(ahead, ahead_lines, 128)
        _leave(out, used + split == 0, GROUP, ROWS, DIM, DIM_PAD, PDL)
        return

    pages, keys = table + slot.to(tl.int64) * table_slot, kv + head * kv_head
    first = begin // KEYS + split * blocks // used
    last = begin // KEYS + (split + 1) * blocks // used
    n = first * KEYS + tl.arange(0, KEYS)
    if HELD:
        seen = (n >= begin) & (n < position)
        held_key, held_value = load_block(pages, keys, n, seen, kv_page, kv_which, kv_entry, DIM, DIM_PAD, PAGE)
    if WARM > 0:
        to = tl.minimum(first + HELD + WARM, last)
        _ask_keys(pages, keys, begin, position, first + HELD, to, kv_page, kv_which, kv_entry, DIM, DIM_PAD, PAGE, KEYS)
    cos, sin = cos_sin(frequency, position, DIM_PAD, HALF)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    r = tl.arange(0, ROWS)
    queries = rotated(q + row * q_row, (head * GROUP + r) * DIM, r < GROUP, q_norm, q_eps, cos, sin, DIM, DIM_PAD, HALF,
                      NORMED).to(q.dtype.element_ty)  # fmt: skip
    acc, total = tl.zeros((ROWS, DIM_PAD), tl.float32), tl.zeros((ROWS,), tl.float32)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    if split == used - 1:
        top, value = _own_key(
            queries, k + row * k_row, v + row * v_row, head, k_norm, k_eps, cos, sin, position, pages, keys, kv_page,
            kv_which, kv_entry, scale, DIM, DIM_PAD, HALF, PAGE, NORMED, FP8,
        )  # fmt: skip
        total += 1.0
        acc += value[None, :]
    before = tl.zeros_like(r) + position - 1
    lowest = tl.zeros_like(r) + tl.where(window > 0, position - window, -1)
    if HELD:
        acc, top, total = attend(acc, top, total, queries, held_key, held_value, n, before, lowest, scale, True)
    acc, top, total = sweep(
        acc, top, total, queries, before, lowest, begin, position, first + HELD, last, pages, keys, scale,
        kv_page, kv_which, kv_entry, DIM, DIM_PAD, PAGE, KEYS, True,
    )  # fmt: skip
    if AHEAD == 2:
        _ask_ahead(ahead, ahead_lines, 128)
    _settle(acc, top, total, used, out, sums, tops, totals, arrived, sinks, num_tokens, GROUP, GROUP_PAD, ROWS, DIM,
            DIM_PAD, AT_ONCE, SINKS)  # fmt: skip


def rope_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    paged: PagedLayer,
    rope: Rope,
    heads: Heads,
    tile: FusedTile,
    norms: tuple[HeadNorm, HeadNorm] | None = None,
    sinks: torch.Tensor | None = None,
    ahead: Matrix | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """`rope_write`, then `decode_attention` of its queries, for tokens of sequences of their own.

    q [T, heads * head_dim], k and v [T, kv_heads * head_dim]: rows may have gaps; T at most MOST_TOKENS. Keys before a
    token's position must lie in its pages; of the same sequence there may be no other token.
    norms: of queries and keys, before the rotation. sinks: float32 [heads], logits that join the softmax's denominator.
    ahead: what the next kernel reads, with contiguous rows; launched ahead, programs ask for it as the tile says.
    pdl: launched ahead of the kernel in front, which must write neither the step's inputs nor keys.
    Returns [T, heads * head_dim]; zeros for padding, of which nothing is written to pages.
    """
    tokens, group = q.shape[0], heads.group
    out = torch.empty((tokens, q.shape[1]), dtype=q.dtype, device=q.device)
    frequency = device_frequencies(rope, q.device)
    q_norm, k_norm = norms or (HeadNorm(frequency, 0.0), HeadNorm(frequency, 0.0))
    matrix = ahead.q if isinstance(ahead, Fp8Weight) else ahead
    lines = _lines(matrix, tile.ahead_bytes) if pdl and tile.ahead else 0
    _rope_attention[(heads.kv_heads, tile.splits, tokens)](
        q, k, v, q_norm.weight, k_norm.weight, frequency, paged.kv, paged.table, paged.positions, paged.slots, out,
        *partials(tokens, heads.kv_heads, tile.splits, group, heads.head_dim, q.device),
        out if sinks is None else sinks, q if matrix is None else matrix, tokens, tile.min_blocks, tile.programs,
        heads.window, lines, q_norm.eps, k_norm.eps, q.stride(0), k.stride(0), v.stride(0), paged.table.stride(0),
        *paged.kv.stride()[:4], heads.scale * LOG2E.value, GROUP=group, GROUP_PAD=pad(group), ROWS=max(16, pad(group)),
        DIM=heads.head_dim, DIM_PAD=pad(heads.head_dim), HALF=rope.dim // 2, PAGE=paged.kv.shape[2], KEYS=tile.keys,
        TOKENS_PAD=0 if tile.programs == 0 else 1 if tokens == 1 else MOST_TOKENS, HELD=int(tile.held),
        WARM=tile.warm if pdl else 0, NORMED=norms is not None, SINKS=sinks is not None,
        FP8=paged.kv.dtype == torch.float8_e4m3fn, AT_ONCE=splits_at_once(group, heads.head_dim, tile.warps),
        AHEAD=tile.ahead if lines else 0, PDL=pdl,
        **launch_options(pdl, num_warps=tile.warps, num_stages=tile.stages),
    )  # fmt: skip
    return out


def _lines(matrix: torch.Tensor | None, most_bytes: int) -> int:
    """How many of a weight's first cache lines are asked for."""
    if matrix is None or not matrix.is_contiguous():
        return 0
    return min(matrix.nbytes, most_bytes) // LINE.value
