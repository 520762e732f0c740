"""Which choices each expert has, made on the device with fixed grids: no count comes to the host, no order to chance.

A choice is a token's j-th expert and has the number token * k + j. Choices are put in order by expert, those of one
expert in the order of their numbers, and each expert's part is cut into blocks for a tile of its matrix products.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tokenspeed.kernels.triton.launch import options

CHUNK = 1024
"""Choices that a program looks at together."""
_FEW = tl.constexpr(16)
"""Rows of counts, or blocks, that are handled together."""
_THREADS = 128
"""Of a program; smaller tiles would lie in several of them at once."""


@dataclass(frozen=True)
class ExpertLists:
    """order: int32 [choices], numbers of choices by expert; what no expert has is not among them. blocks: int32 [n, 4]
    of (expert, first place in `order`, choices, 0), at most `rows` each; expert -1 for none."""

    order: torch.Tensor
    blocks: torch.Tensor
    rows: int


@triton.jit
def _count_kernel(ids, counts, total, EXPERTS: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr,
                  PDL: tl.constexpr) -> None:  # fmt: skip
    """counts [chunks, BINS]: how often each expert is chosen in a chunk."""
    chunk = tl.program_id(0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    found = tl.load(ids + at, mask=at < total, other=-1)
    tl.store(counts + chunk * BINS + tl.arange(0, BINS), _histogram(found, EXPERTS, BINS))


@triton.jit
def _histogram(found, EXPERTS: tl.constexpr, BINS: tl.constexpr):
    """Of ids, how many each expert has; the bin behind the experts takes those of none."""
    return tl.histogram(tl.where((found < 0) | (found >= EXPERTS), EXPERTS, found), BINS)


@triton.jit
def _list_kernel(ids, counts, order, blocks, total, chunks, number, EXPERTS: tl.constexpr, BINS: tl.constexpr,
                 CHUNK: tl.constexpr, ROWS: tl.constexpr, COUNTED: tl.constexpr,
                 PDL: tl.constexpr) -> None:  # fmt: skip
    """One program per expert (axis 0) and chunk (axis 1) puts the chunk's choices of the expert in their places. Those
    of the first chunk write the expert's blocks, and the last expert's the blocks that nobody has."""
    expert, chunk = tl.program_id(0), tl.program_id(1)
    bins = tl.arange(0, BINS)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    found = tl.load(ids + at, mask=at < total, other=-1)
    ahead = tl.zeros([BINS], tl.int32)
    if COUNTED:
        each = tl.zeros([BINS], tl.int32)
        for start in range(0, chunks, _FEW):
            rows = start + tl.arange(0, _FEW)
            part = tl.load(counts + rows[:, None] * BINS + bins[None, :], mask=(rows < chunks)[:, None], other=0)
            each += tl.sum(part, axis=0)
            ahead += tl.sum(tl.where((rows < chunk)[:, None], part, 0), axis=0)
    else:
        each = _histogram(found, EXPERTS, BINS)
    before = bins < expert
    own = tl.sum(tl.where(bins == expert, each, 0), axis=0)
    first = tl.sum(tl.where(before, each, 0), axis=0)
    mine = found == expert
    place = first + tl.sum(tl.where(bins == expert, ahead, 0), axis=0) + tl.cumsum(mine.to(tl.int32), axis=0) - 1
    tl.store(order + place, at, mask=mine)
    if chunk == 0:
        first_block = tl.sum(tl.where(before, (each + ROWS - 1) // ROWS, 0), axis=0)
        last_block = first_block + (own + ROWS - 1) // ROWS
        for start in range(first_block, last_block, _FEW):
            block = start + tl.arange(0, _FEW)
            done = (block - first_block) * ROWS
            used, to = block < last_block, blocks + block * 4
            tl.store(to, expert, mask=used)
            tl.store(to + 1, first + done, mask=used)
            tl.store(to + 2, tl.minimum(own - done, ROWS), mask=used)
        if expert == EXPERTS - 1:
            for start in range(last_block, number, CHUNK):
                block = start + tl.arange(0, CHUNK)
                tl.store(blocks + block * 4, -1, mask=block < number)


def most_blocks(choices: int, experts: int, rows: int) -> int:
    """How many blocks of `rows` there are at most, however so many choices fall on the experts."""
    touched = min(choices, experts)
    return (choices + touched * (rows - 1)) // rows


def expert_lists(ids: torch.Tensor, experts: int, rows: int, pdl: bool = False) -> ExpertLists:
    """The lists of ids int32 [T, k], contiguous; ids that are no expert's are in none. rows: most choices of a block.
    pdl: launch ahead of the kernel in front."""
    total, device = ids.numel(), ids.device
    chunks, bins = triton.cdiv(total, CHUNK), max(_THREADS, triton.next_power_of_2(experts + 1))
    number = most_blocks(total, experts, rows)
    order = torch.empty(total, dtype=torch.int32, device=device)
    blocks = torch.empty(number, 4, dtype=torch.int32, device=device)
    counts = torch.empty(chunks, bins, dtype=torch.int32, device=device) if chunks > 1 else None
    chunk = min(CHUNK, max(_THREADS, triton.next_power_of_2(total)))
    shape = {"EXPERTS": experts, "BINS": bins, "CHUNK": chunk, **options(_THREADS // 32, pdl)}
    if counts is not None:
        _count_kernel[(chunks,)](ids, counts, total, **shape)
    _list_kernel[(experts, chunks)](
        ids, counts, order, blocks, total, chunks, number, ROWS=rows, COUNTED=counts is not None, **shape
    )
    return ExpertLists(order, blocks, rows)
