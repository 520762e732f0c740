"""Kernels that write a step's edited logits: bias, penalties, mask, allowed and forbidden ids (see `runner/edits.py`).

Two of them: one over the whole vocabulary, for what touches every token, then one program per row for the slot's
lists, which computes the few listed tokens anew from the raw logits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tokenspeed.kernels.triton.launch import launch_options
from tokenspeed.kernels.triton.sampling_state import (
    EDITED,
    LIST_CAPACITY,
    MASKED,
    PENALIZED,
    SEEN_IN_PROMPT,
    WORD_CAPACITY,
    WORD_LENGTH,
    Field,
    List,
    SamplingState,
)

_EDITED, _PENALIZED, _MASKED = tl.constexpr(EDITED), tl.constexpr(PENALIZED), tl.constexpr(MASKED)
_SEEN_IN_PROMPT = tl.constexpr(SEEN_IN_PROMPT)
_FLAGS = tl.constexpr(Field.FLAGS.value)
_REPETITION = tl.constexpr(Field.REPETITION.value)
_FREQUENCY = tl.constexpr(Field.FREQUENCY.value)
_PRESENCE = tl.constexpr(Field.PRESENCE.value)
_NUM_PROMPT = tl.constexpr(Field.NUM_PROMPT.value)
_MIN_POSITION = tl.constexpr(Field.MIN_POSITION.value)
_NUM_BIAS = tl.constexpr(Field.NUM_BIAS.value)
_NUM_ALLOWED = tl.constexpr(Field.NUM_ALLOWED.value)
_NUM_BANNED = tl.constexpr(Field.NUM_BANNED.value)
_NUM_STOP = tl.constexpr(Field.NUM_STOP.value)
_NUM_WORDS = tl.constexpr(Field.NUM_WORDS.value)
_BIAS_IDS = tl.constexpr(List.BIAS_IDS.value)
_BIAS_VALUES = tl.constexpr(List.BIAS_VALUES.value)
_ALLOWED = tl.constexpr(List.ALLOWED.value)
_BANNED = tl.constexpr(List.BANNED.value)
_STOP = tl.constexpr(List.STOP.value)
_LISTS = tl.constexpr(len(List))
_CAPACITY = tl.constexpr(LIST_CAPACITY)
_WORDS, _WORD_LENGTH = tl.constexpr(WORD_CAPACITY), tl.constexpr(WORD_LENGTH)

TILE, WARPS = 4096, 8
"""Tokens and warps of a program of the pass over the vocabulary."""


def edited_logits(
    logits: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    state: SamplingState,
    mask: torch.Tensor | None,
    pool: torch.Tensor | None,
    pdl: bool,
) -> torch.Tensor:
    """float32 [rows, vocabulary]: `logits` as the rows' slots change them; rows of slot -1 are left unwritten.

    mask: int32 [rows, ceil(vocabulary / 32)], the lowest bit for the lowest id, read for rows with the flag MASKED.
    pool: tokens int32 [slots, length], read for bad words.
    """
    rows, vocab = logits.shape
    edited = torch.empty((rows, vocab), dtype=torch.float32, device=logits.device)
    counts = state.counts
    shared = (logits, logits.stride(0), edited, slots, positions, state.params, state.params.shape[1])
    given = (counts if counts is not None else slots, mask if mask is not None else slots)
    words_of_mask = mask.shape[1] if mask is not None else 0
    flags = {"COUNTS": counts is not None, "MASK": mask is not None, "PDL": pdl}
    options = launch_options(pdl, enable_fp_fusion=False)
    _edit_all[(triton.cdiv(vocab, TILE), rows)](
        *shared, *given, words_of_mask, vocab, TILE=TILE, **flags, num_warps=WARPS, **options
    )
    has_pool = pool is not None
    _edit_listed[(rows,)](
        *shared,
        *given,
        words_of_mask,
        vocab,
        state.lists,
        state.words,
        pool if pool is not None else slots,
        pool.stride(0) if pool is not None else 0,
        POOL=has_pool,
        **flags,
        num_warps=4,
        **options,
    )
    return edited


@triton.jit
def _float(fields: tl.tensor, num_slots: tl.tensor, field: tl.constexpr, slot: tl.tensor) -> tl.tensor:
    return tl.load(fields + field * num_slots + slot).to(tl.float32, bitcast=True)


@triton.jit
def _penalized(
    values: tl.tensor, seen: tl.tensor, fields: tl.tensor, num_slots: tl.tensor, slot: tl.tensor
) -> tl.tensor:
    repetition = _float(fields, num_slots, _REPETITION, slot)
    frequency = _float(fields, num_slots, _FREQUENCY, slot)
    presence = _float(fields, num_slots, _PRESENCE, slot)
    times = (seen & (_SEEN_IN_PROMPT - 1)).to(tl.float32)
    changed = tl.where(values > 0, tl.div_rn(values, repetition), values * repetition)
    changed = changed - frequency * times
    changed = changed - tl.where(times > 0, presence, 0.0)
    return tl.where(seen != 0, changed, values)


@triton.jit
def _shared_edits(
    values: tl.tensor,
    ids: tl.tensor,
    valid: tl.tensor,
    row: tl.tensor,
    slot: tl.tensor,
    flags: tl.tensor,
    fields: tl.tensor,
    num_slots: tl.tensor,
    counts: tl.tensor,
    mask: tl.tensor,
    mask_words: tl.tensor,
    vocab: tl.tensor,
    COUNTS: tl.constexpr,
    MASK: tl.constexpr,
) -> tl.tensor:
    if COUNTS and (flags & _PENALIZED) != 0:
        seen = tl.load(counts + slot.to(tl.int64) * vocab + ids, mask=valid, other=0)
        values = _penalized(values, seen, fields, num_slots, slot)
    if MASK and (flags & _MASKED) != 0:
        word = tl.load(mask + row.to(tl.int64) * mask_words + ids // 32, mask=valid, other=0)
        values = tl.where(((word >> (ids % 32)) & 1) != 0, values, float("-inf"))
    return values


@triton.jit
def _edit_all(
    logits: tl.tensor,
    stride: tl.tensor,
    edited: tl.tensor,
    slots: tl.tensor,
    positions: tl.tensor,
    fields: tl.tensor,
    num_slots: tl.tensor,
    counts: tl.tensor,
    mask: tl.tensor,
    mask_words: tl.tensor,
    vocab: tl.tensor,
    TILE: tl.constexpr,
    COUNTS: tl.constexpr,
    MASK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    row = tl.program_id(1)
    ids = tl.program_id(0) * TILE + tl.arange(0, TILE)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    slot = tl.load(slots + row)
    if slot >= 0:
        flags = tl.load(fields + _FLAGS * num_slots + slot)
        valid = ids < vocab
        values = tl.load(logits + row.to(tl.int64) * stride + ids, mask=valid, other=0.0).to(tl.float32)
        if (flags & _EDITED) != 0:
            values = _shared_edits(
                values, ids, valid, row, slot, flags, fields, num_slots, counts, mask, mask_words, vocab, COUNTS, MASK
            )
            if tl.load(fields + _NUM_ALLOWED * num_slots + slot) >= 0:
                values = tl.full([TILE], float("-inf"), tl.float32)
        tl.store(edited + row.to(tl.int64) * vocab + ids, values, mask=valid)


@triton.jit
def _listed(lists: tl.tensor, slot: tl.tensor, which: tl.constexpr) -> tl.tensor:
    return tl.load(lists + (slot.to(tl.int64) * _LISTS + which) * _CAPACITY + tl.arange(0, _CAPACITY))


@triton.jit
def _forbidden_words(
    words: tl.tensor,
    pool: tl.tensor,
    pool_stride: tl.tensor,
    slot: tl.tensor,
    position: tl.tensor,
    num_prompt: tl.tensor,
    number: tl.tensor,
) -> tl.tensor:
    """The last ids of the bad words whose others were just sampled, -1 in the place of the rest."""
    word = tl.arange(0, _WORDS)
    place = tl.arange(0, _WORD_LENGTH)
    base = words + slot.to(tl.int64) * _WORDS * _WORD_LENGTH + word * _WORD_LENGTH
    expected = tl.load(base[:, None] + place[None, :])
    at = position - (_WORD_LENGTH - 1) + place
    sampled = tl.load(pool + slot.to(tl.int64) * pool_stride + at, mask=(at >= num_prompt) & (at < position), other=-2)
    differs = (expected != sampled[None, :]) & (expected >= 0) & (place < _WORD_LENGTH - 1)[None, :]
    complete = tl.sum(differs.to(tl.int32), 1) == 0
    last = tl.load(base + _WORD_LENGTH - 1)
    return tl.where(complete & (word < number), last, -1)


@triton.jit
def _forbid(
    out: tl.tensor,
    words: tl.tensor,
    pool: tl.tensor,
    pool_stride: tl.tensor,
    slot: tl.tensor,
    position: tl.tensor,
    lists: tl.tensor,
    fields: tl.tensor,
    num_slots: tl.tensor,
    vocab: tl.tensor,
    POOL: tl.constexpr,
) -> None:
    place = tl.arange(0, _CAPACITY)
    never = tl.full([_CAPACITY], float("-inf"), tl.float32)
    banned = _listed(lists, slot, _BANNED)
    tl.store(out + banned, never, mask=(place < tl.load(fields + _NUM_BANNED * num_slots + slot)) & (banned < vocab))
    if position < tl.load(fields + _MIN_POSITION * num_slots + slot):
        stop = _listed(lists, slot, _STOP)
        tl.store(out + stop, never, mask=(place < tl.load(fields + _NUM_STOP * num_slots + slot)) & (stop < vocab))
    if POOL:
        num_words = tl.load(fields + _NUM_WORDS * num_slots + slot)
        num_prompt = tl.load(fields + _NUM_PROMPT * num_slots + slot)
        last = _forbidden_words(words, pool, pool_stride, slot, position, num_prompt, num_words)
        tl.store(out + last, tl.full([_WORDS], float("-inf"), tl.float32), mask=(last >= 0) & (last < vocab))


@triton.jit
def _biased(
    raw: tl.tensor, ids: tl.tensor, valid: tl.tensor, bias_ids: tl.tensor, lists: tl.tensor, slot: tl.tensor
) -> tl.tensor:
    values = tl.load(raw + ids, mask=valid, other=0.0).to(tl.float32)
    biases = _listed(lists, slot, _BIAS_VALUES).to(tl.float32, bitcast=True)
    same = (ids[:, None] == bias_ids[None, :]) & (bias_ids >= 0)[None, :]
    changed = values + tl.sum(tl.where(same, biases[None, :], 0.0), 1)
    return tl.where(tl.sum(same.to(tl.int32), 1) > 0, changed, values)


@triton.jit
def _edit_listed(
    logits: tl.tensor,
    stride: tl.tensor,
    edited: tl.tensor,
    slots: tl.tensor,
    positions: tl.tensor,
    fields: tl.tensor,
    num_slots: tl.tensor,
    counts: tl.tensor,
    mask: tl.tensor,
    mask_words: tl.tensor,
    vocab: tl.tensor,
    lists: tl.tensor,
    words: tl.tensor,
    pool: tl.tensor,
    pool_stride: tl.tensor,
    COUNTS: tl.constexpr,
    MASK: tl.constexpr,
    POOL: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    slot = tl.load(slots + row)
    flags = 0
    if slot >= 0:
        flags = tl.load(fields + _FLAGS * num_slots + slot)
    if (flags & _EDITED) != 0:
        place = tl.arange(0, _CAPACITY)
        raw, out = logits + row.to(tl.int64) * stride, edited + row.to(tl.int64) * vocab
        num_allowed = tl.load(fields + _NUM_ALLOWED * num_slots + slot)
        num_bias = tl.load(fields + _NUM_BIAS * num_slots + slot)
        allowed_ids = tl.where(place < num_allowed, _listed(lists, slot, _ALLOWED), -1)
        bias_ids = tl.where(place < num_bias, _listed(lists, slot, _BIAS_IDS), -1)
        for of_bias in tl.static_range(2):
            ids = bias_ids if of_bias else allowed_ids
            valid = (ids >= 0) & (ids < vocab)
            values = _biased(raw, ids, valid, bias_ids, lists, slot)
            values = _shared_edits(
                values, ids, valid, row, slot, flags, fields, num_slots, counts, mask, mask_words, vocab, COUNTS, MASK
            )
            if num_allowed >= 0:
                inside = tl.sum((ids[:, None] == allowed_ids[None, :]).to(tl.int32), 1) > 0
                values = tl.where(inside, values, float("-inf"))
            tl.store(out + ids, values, mask=valid)
        tl.debug_barrier()  # An id may be listed above and forbidden below: the later store must win.
        _forbid(out, words, pool, pool_stride, slot, tl.load(positions + row), lists, fields, num_slots, vocab, POOL)
