"""The first and the last kernels of a step: from the host's header (see `mailbox`) to inputs on the device, and from
tokens to the state of the next step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tokenspeed.kernels.triton.launch import launch_options
from tokenspeed.kernels.triton.mailbox import HEAD, ROW_FIELDS, Mailbox, answer, fetch
from tokenspeed.kernels.triton.sampling_state import PENALIZED, SEEN_IN_PROMPT, Field, SamplingState

_PENALIZED, _SEEN_IN_PROMPT = tl.constexpr(PENALIZED), tl.constexpr(SEEN_IN_PROMPT)
_HEAD, _ROW_FIELDS = tl.constexpr(HEAD), tl.constexpr(ROW_FIELDS)
_FAR = tl.constexpr(2**31 - 1)

EXPAND_BLOCK = 64
"""Tokens of one program of the expansion."""
COUNT_BLOCK = 1024


@dataclass(frozen=True)
class SlotLengths:
    """Known tokens of all slots: how many are computed and how many there are, int32 [slots] each, and the tokens,
    int32 [slots, most tokens]."""

    num_computed: torch.Tensor
    num_tokens: torch.Tensor
    pool: torch.Tensor


@dataclass(frozen=True)
class StepInputs:
    """Inputs of a step of T tokens and R rows, int32.

    tokens, positions, slots: [T]; slot -1, token and position 0 for padding. row_slots, row_counts: [R], slot of each
    row and how many tokens it feeds; -1 and 0 beyond the last. row_starts, row_firsts: [R], offset and position of its
    first one. sample_rows: [R], offset of the last token of each row that reaches the end of what is known, else -1;
    sample_slots, sample_positions: [R], its slot (else -1) and the position of the token to draw (else 0).
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    row_slots: torch.Tensor
    row_counts: torch.Tensor
    row_starts: torch.Tensor
    row_firsts: torch.Tensor
    sample_rows: torch.Tensor
    sample_slots: torch.Tensor
    sample_positions: torch.Tensor


def prepare(
    mailbox: Mailbox, state: torch.Tensor, lengths: SlotLengths, tokens: int, rows: int, pdl: bool = False
) -> StepInputs:
    """Begin the next step: write its header's pairs into the flat int32 `state`, of which `lengths` may hold views,
    then expand its rows into inputs of a bucket of `tokens` tokens and `rows` rows. A row feeds what is known and not
    computed, its most tokens at most, and nothing without a page."""

    def new(size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.int32, device=state.device)

    inputs = StepInputs(*(new(size) for size in [tokens] * 3 + [rows] * 7))
    options = launch_options(pdl)
    fetch(mailbox, state, rows, pdl)
    _expand[(triton.cdiv(tokens, EXPAND_BLOCK) + 1,)](
        mailbox.rows,
        mailbox.turn,
        lengths.num_computed,
        lengths.num_tokens,
        lengths.pool,
        lengths.pool.stride(0),
        inputs.tokens,
        inputs.positions,
        inputs.slots,
        inputs.row_slots,
        inputs.row_counts,
        inputs.row_starts,
        inputs.row_firsts,
        inputs.sample_rows,
        inputs.sample_slots,
        inputs.sample_positions,
        tokens,
        rows,
        ROWS=triton.next_power_of_2(rows),
        BLOCK=EXPAND_BLOCK,
        PDL=pdl,
        num_warps=4,
        **options,
    )
    return inputs


def finish(
    drawn: torch.Tensor,
    inputs: StepInputs,
    lengths: SlotLengths,
    state: SamplingState,
    mailbox: Mailbox,
    pdl: bool = False,
) -> None:
    """Take in a step's tokens int32 [rows]: append each to its slot's known tokens, count it where its slot has
    penalties, move the lengths on, and answer the host: per row the token, -1 where it drew none. pdl: launched ahead
    of the end of the kernel in front, than whose begin all but the tokens must be older."""
    rows = drawn.shape[0]
    counts = state.counts
    _finish[(1,)](
        drawn,
        inputs.row_slots,
        inputs.row_counts,
        inputs.sample_rows,
        lengths.num_computed,
        lengths.num_tokens,
        lengths.pool,
        lengths.pool.stride(0),
        lengths.pool.shape[1],
        state.params[Field.FLAGS],
        counts if counts is not None else drawn,
        counts.shape[1] if counts is not None else 0,
        mailbox.results,
        mailbox.results.stride(0),
        mailbox.turn,
        rows,
        SLOTS=mailbox.results.shape[0],
        ROWS=triton.next_power_of_2(rows),
        COUNTS=counts is not None,
        PDL=pdl,
        num_warps=4,
        **launch_options(pdl),
    )


def count_tokens(slots: torch.Tensor, prompts: torch.Tensor, lengths: SlotLengths, counts: torch.Tensor) -> None:
    """Count anew the known tokens of slots int32 [n] with penalties, whose prompts are int32 [n] tokens long. To be
    called when a sequence enters, before the first step that names it; no slot twice."""
    counts.index_fill_(0, slots.long(), 0)
    longest = lengths.pool.shape[1]
    _count[(triton.cdiv(longest, COUNT_BLOCK), slots.shape[0])](
        slots,
        prompts,
        lengths.num_tokens,
        lengths.pool,
        lengths.pool.stride(0),
        counts,
        counts.shape[1],
        BLOCK=COUNT_BLOCK,
        num_warps=4,
    )


@triton.jit
def _fed(
    header: tl.tensor, row: tl.tensor, valid: tl.tensor, num_computed: tl.tensor, num_tokens: tl.tensor
) -> tl.tuple:
    """Of rows: slot, offset, first position, number of tokens fed, and whether they reach the end of what is known."""
    entry = header + _HEAD + _ROW_FIELDS * row
    slot = tl.load(entry, mask=valid, other=-1)
    live = slot >= 0
    most, reserved = tl.load(entry + 1, mask=live, other=0), tl.load(entry + 3, mask=live, other=0)
    start = tl.load(num_computed + slot, mask=live, other=0)
    known = tl.load(num_tokens + slot, mask=live, other=0)
    count = tl.maximum(tl.minimum(tl.minimum(most, known - start), reserved - start), 0)
    return slot, tl.load(entry + 2, mask=live, other=0), start, count, (count > 0) & (start + count == known)


@triton.jit
def _expand(
    header: tl.tensor,
    turn: tl.tensor,
    num_computed: tl.tensor,
    num_tokens: tl.tensor,
    pool: tl.tensor,
    pool_stride: tl.tensor,
    tokens: tl.tensor,
    positions: tl.tensor,
    slots: tl.tensor,
    row_slots: tl.tensor,
    row_counts: tl.tensor,
    row_starts: tl.tensor,
    row_firsts: tl.tensor,
    sample_rows: tl.tensor,
    sample_slots: tl.tensor,
    sample_positions: tl.tensor,
    bucket: tl.tensor,
    max_rows: tl.tensor,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    num_rows = tl.minimum(tl.load(header), max_rows)
    row = tl.arange(0, ROWS)
    if tl.program_id(0) == tl.num_programs(0) - 1:
        tl.store(turn, tl.load(turn) + 1)  # no other program of this kernel looks at it
        slot, offset, start, count, ends = _fed(header, row, row < num_rows, num_computed, num_tokens)
        inside = row < max_rows
        tl.store(row_slots + row, slot, mask=inside)
        tl.store(row_counts + row, count, mask=inside)
        tl.store(row_starts + row, offset, mask=inside)
        tl.store(row_firsts + row, start, mask=inside)
        tl.store(sample_rows + row, tl.where(ends, offset + count - 1, -1), mask=inside)
        tl.store(sample_slots + row, tl.where(ends, slot, -1), mask=inside)
        tl.store(sample_positions + row, tl.where(ends, start + count, 0), mask=inside)
    else:  # names of their own: the branches' shapes differ
        token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        offsets = tl.load(header + _HEAD + 2 + _ROW_FIELDS * row, mask=row < num_rows, other=_FAR)
        before = tl.sum((offsets[None, :] <= token[:, None]).to(tl.int32), 1)
        its_slot, its_offset, its_start, its_count, _ = _fed(header, before - 1, before > 0, num_computed, num_tokens)
        place = token - its_offset
        real = (its_slot >= 0) & (place < its_count)
        in_bucket = token < bucket
        position = its_start + place
        known = tl.load(pool + its_slot.to(tl.int64) * pool_stride + position, mask=real, other=0)
        tl.store(tokens + token, known, mask=in_bucket)
        tl.store(positions + token, tl.where(real, position, 0), mask=in_bucket)
        tl.store(slots + token, tl.where(real, its_slot, -1), mask=in_bucket)


@triton.jit
def _finish(
    drawn: tl.tensor,
    row_slots: tl.tensor,
    row_counts: tl.tensor,
    sample_rows: tl.tensor,
    num_computed: tl.tensor,
    num_tokens: tl.tensor,
    pool: tl.tensor,
    pool_stride: tl.tensor,
    pool_length: tl.tensor,
    flags: tl.tensor,
    counts: tl.tensor,
    vocab: tl.tensor,
    results: tl.tensor,
    results_stride: tl.tensor,
    turn: tl.tensor,
    rows: tl.tensor,
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    COUNTS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Only what was drawn is younger than the step's inputs, so waited for."""
    row = tl.arange(0, ROWS)
    inside = row < rows
    slot = tl.load(row_slots + row, mask=inside, other=-1)
    live = slot >= 0
    count = tl.load(row_counts + row, mask=inside, other=0)
    draws = live & (tl.load(sample_rows + row, mask=inside, other=-1) >= 0)
    computed = tl.load(num_computed + slot, mask=live, other=0)
    length = tl.load(num_tokens + slot, mask=draws, other=0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    token = tl.load(drawn + row, mask=draws, other=-1)
    tl.store(num_computed + slot, computed + count, mask=live)
    tl.store(pool + slot.to(tl.int64) * pool_stride + length, token, mask=draws & (length < pool_length))
    tl.store(num_tokens + slot, length + 1, mask=draws)
    if COUNTS:
        counted = draws & ((tl.load(flags + slot, mask=live, other=0) & _PENALIZED) != 0)
        at = counts + slot.to(tl.int64) * vocab + token
        tl.store(at, tl.load(at, mask=counted, other=0) + 1, mask=counted)
    answer(results, results_stride, turn, row, token, inside, SLOTS)


@triton.jit
def _count(
    slots: tl.tensor,
    prompts: tl.tensor,
    num_tokens: tl.tensor,
    pool: tl.tensor,
    pool_stride: tl.tensor,
    counts: tl.tensor,
    vocab: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    slot = tl.load(slots + tl.program_id(1))
    prompt = tl.load(prompts + tl.program_id(1))
    length = tl.load(num_tokens + slot)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(pool + slot.to(tl.int64) * pool_stride + at, mask=at < length, other=0)
    line = counts + slot.to(tl.int64) * vocab + token
    tl.atomic_or(line, _SEEN_IN_PROMPT, mask=at < tl.minimum(prompt, length))
    tl.atomic_add(line, 1, mask=(at >= prompt) & (at < length))
