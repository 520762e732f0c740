"""One token per row of logits, on the device: what `runner/sampler.py` draws, in two kernels and without a sort.

`_peaks` reads the logits once and leaves one number per 64 tokens: their largest scaled logit, or, where noise alone
decides, an upper bound of scaled logit plus noise. `_choose`, one program per row, looks closer only under the few
peaks that matter. Rows with edits are first copied and changed (`edits.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tokenspeed.kernels.triton.edits import edited_logits
from tokenspeed.kernels.triton.filters import (
    PEAK,
    best_noisy,
    bisect_floor,
    collect,
    draw_row,
    peaks_bound,
    ranks,
    row_mass,
    scaled_block,
)
from tokenspeed.kernels.triton.launch import launch_options
from tokenspeed.kernels.triton.noise import REACH, block_words, gumbel_screen
from tokenspeed.kernels.triton.sampling_state import Field, SamplingState

_TEMPERATURE = tl.constexpr(Field.TEMPERATURE.value)
_TOP_K = tl.constexpr(Field.TOP_K.value)
_TOP_P = tl.constexpr(Field.TOP_P.value)
_LOG_MIN_P = tl.constexpr(Field.LOG_MIN_P.value)
_SEED_LOW = tl.constexpr(Field.SEED_LOW.value)
_SEED_HIGH = tl.constexpr(Field.SEED_HIGH.value)
_SAMPLE_INDEX = tl.constexpr(Field.SAMPLE_INDEX.value)
_PEAK = tl.constexpr(PEAK)
_LOWEST = tl.constexpr(-3.4028234663852886e38)
_NO_TOKEN = tl.constexpr(2**31 - 1)
_FEW = tl.constexpr(128)
"""Candidates up to which a smaller comparison does: those of a usual top_k."""
_TOP_P_HEAD = tl.constexpr(96)
"""How many peaks are looked under at first for the end of top_p without top_k; four times as many each time after."""


@dataclass(frozen=True)
class Tiles:
    """Sizes of the two kernels. peaks: under one program of `_peaks`. candidates: how many tokens of a row are compared
    each with each. chunk: peaks looked under at once. block: tokens of one turn of a pass over a whole row."""

    peaks: int
    peaks_warps: int
    candidates: int = 1024
    chunk: int = 64
    block: int = 4096
    choose_warps: int = 8


TILES = {4: Tiles(peaks=16, peaks_warps=4), 32: Tiles(peaks=32, peaks_warps=4), 2**31: Tiles(peaks=64, peaks_warps=8)}
"""By the most rows they are for."""


def tiles_for(rows: int) -> Tiles:
    """The tiles of the smallest bucket that holds so many rows."""
    return next(tiles for most, tiles in TILES.items() if rows <= most)


def sample(
    logits: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    state: SamplingState,
    *,
    edits: bool = False,
    mask: torch.Tensor | None = None,
    pool: torch.Tensor | None = None,
    pdl: bool = False,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """Tokens int32 [rows] of raw logits [rows, vocabulary] (float32, bfloat16 or float16; the last dimension dense).

    slots: int32 [rows], -1 for a row that gets token 0 and is not read. positions: int32 [rows], of the tokens to draw.
    edits: whether any row's slot is `is_edited`; known to the host, as it costs two kernels and a copy of the logits.
    mask: int32 [rows, ceil(vocabulary / 32)] for slots that are masked. pool: int32 [slots, length], known tokens, for
    slots with bad words. pdl: launched ahead of the end of the kernel in front, than whose begin slots, positions and
    state must be older. Waits for nothing; sizes depend on shapes alone, so it can be captured in a graph.
    """
    rows, vocab = logits.shape
    tiles = tiles or tiles_for(rows)
    if edits:
        logits = edited_logits(logits, slots, positions, state, mask, pool, pdl)
    num_peaks = triton.cdiv(vocab, PEAK)
    width = max(16, triton.next_power_of_2(num_peaks))

    def scratch(columns: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty((rows, columns), dtype=dtype, device=logits.device)

    peaks, tokens = scratch(width, torch.float32), scratch(1, torch.int32).view(rows)
    shared = (logits, logits.stride(0), slots, positions, state.params, state.params.shape[1], peaks)
    options = launch_options(pdl, enable_fp_fusion=False)
    _peaks[(triton.cdiv(num_peaks, tiles.peaks), rows)](
        *shared, vocab, num_peaks, P=width, PEAKS=tiles.peaks, PDL=pdl, num_warps=tiles.peaks_warps, **options
    )
    _choose[(rows,)](
        *shared,
        tokens,
        scratch(width, torch.int32),
        scratch(tiles.candidates, torch.int32),
        scratch(tiles.candidates, torch.float32),
        vocab,
        num_peaks,
        P=width,
        CANDIDATES=tiles.candidates,
        CHUNK=min(tiles.chunk, width),
        BLOCK=min(tiles.block, width * PEAK),
        PDL=pdl,
        num_warps=tiles.choose_warps,
        **options,
    )
    return tokens


@triton.jit
def _int(fields: tl.tensor, num_slots: tl.tensor, field: tl.constexpr, slot: tl.tensor) -> tl.tensor:
    return tl.load(fields + field * num_slots + slot)


@triton.jit
def _float(fields: tl.tensor, num_slots: tl.tensor, field: tl.constexpr, slot: tl.tensor) -> tl.tensor:
    return tl.load(fields + field * num_slots + slot).to(tl.float32, bitcast=True)


@triton.jit
def _filters(fields: tl.tensor, num_slots: tl.tensor, slot: tl.tensor) -> tl.tuple:
    """top_k (0 is none), top_p (1 is none), and log(min_p) (-inf is none)."""
    top_k = _int(fields, num_slots, _TOP_K, slot)
    return top_k, _float(fields, num_slots, _TOP_P, slot), _float(fields, num_slots, _LOG_MIN_P, slot)


@triton.jit
def _is_filtered(filters: tl.tuple) -> tl.tensor:
    top_k, top_p, log_min_p = filters
    return (top_k > 0) | (top_p < 1) | (log_min_p > float("-inf"))


@triton.jit
def _noise_key(position: tl.tensor, fields: tl.tensor, num_slots: tl.tensor, slot: tl.tensor) -> tl.tuple:
    sample = _int(fields, num_slots, _SAMPLE_INDEX, slot)
    seed_low, seed_high = _int(fields, num_slots, _SEED_LOW, slot), _int(fields, num_slots, _SEED_HIGH, slot)
    return position, sample, seed_low, seed_high


@triton.jit
def _peaks(
    logits: tl.tensor,
    stride: tl.tensor,
    slots: tl.tensor,
    positions: tl.tensor,
    fields: tl.tensor,
    num_slots: tl.tensor,
    peaks_out: tl.tensor,
    vocab: tl.tensor,
    num_peaks: tl.tensor,
    P: tl.constexpr,
    PEAKS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    row = tl.program_id(1)
    place = tl.program_id(0) * PEAKS + tl.arange(0, PEAKS)
    slot = tl.load(slots + row)
    temperature = _float(fields, num_slots, _TEMPERATURE, tl.maximum(slot, 0))
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if slot >= 0:
        ids = place[:, None] * _PEAK + tl.arange(0, _PEAK)[None, :]
        values = tl.load(logits + row.to(tl.int64) * stride + ids, mask=ids < vocab, other=float("-inf"))
        values = values.to(tl.float32)
        if temperature == 0:
            peaks = tl.max(values, 1)
        elif _is_filtered(_filters(fields, num_slots, slot)):
            peaks = tl.div_rn(tl.max(values, 1), temperature)
        else:
            key = _noise_key(tl.load(positions + row), fields, num_slots, slot)
            blocks = place[:, None] * (_PEAK // 4) + tl.arange(0, _PEAK // 4)[None, :]
            w0, w1, w2, w3 = block_words(blocks, key)
            words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
            peaks = tl.max(tl.div_rn(values, temperature) + gumbel_screen(words), 1)
        tl.store(peaks_out + row.to(tl.int64) * P + place, peaks, mask=place < num_peaks)


@triton.jit
def _choose(
    logits: tl.tensor,
    stride: tl.tensor,
    slots: tl.tensor,
    positions: tl.tensor,
    fields: tl.tensor,
    num_slots: tl.tensor,
    peaks_in: tl.tensor,
    tokens: tl.tensor,
    places: tl.tensor,
    candidate_ids: tl.tensor,
    candidate_values: tl.tensor,
    vocab: tl.tensor,
    num_peaks: tl.tensor,
    P: tl.constexpr,
    CANDIDATES: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    slot = tl.load(slots + row)
    known = tl.maximum(slot, 0)
    temperature, filters = _float(fields, num_slots, _TEMPERATURE, known), _filters(fields, num_slots, known)
    key = _noise_key(tl.load(positions + row), fields, num_slots, known)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    token = 0
    if slot >= 0:
        row64 = row.to(tl.int64)
        at = tl.arange(0, P)
        line, peaks_in = logits + row64 * stride, peaks_in + row64 * P
        peaks = tl.load(peaks_in + at, mask=at < num_peaks, other=float("-inf"))
        best = tl.max(peaks, 0)
        if best > float("-inf"):
            first = tl.min(tl.where(peaks == best, at, P - 1), 0)
            ids = first * _PEAK + tl.arange(0, _PEAK)
            if temperature == 0:
                values = scaled_block(line, ids, ids < vocab, 1.0)
                token = tl.min(tl.where(values == best, ids, _NO_TOKEN), 0)
            else:
                floor = _LOWEST
                if _is_filtered(filters):
                    ids_out, values_out = candidate_ids + row64 * CANDIDATES, candidate_values + row64 * CANDIDATES
                    scratch = (places + row64 * P, ids_out, values_out)
                    token, floor = _filtered(
                        line, vocab, temperature, peaks, best, filters, key, scratch, P, CANDIDATES, CHUNK, BLOCK
                    )
                    cut = floor
                else:
                    scaled = scaled_block(line, ids, ids < vocab, temperature)
                    cut, token = best_noisy(ids, scaled, floor, key)
                    if tl.sum((peaks >= cut).to(tl.int32), 0) > 1:
                        token = _NO_TOKEN
                if token == _NO_TOKEN:
                    token = draw_row(line, temperature, vocab, peaks, cut, floor, key, P, BLOCK)
            token = tl.where(token == _NO_TOKEN, 0, token)
    tl.store(tokens + row, token)


@triton.jit
def _filtered(
    line: tl.tensor,
    vocab: tl.tensor,
    temperature: tl.tensor,
    peaks: tl.tensor,
    best: tl.tensor,
    filters: tl.tuple,
    key: tl.tuple,
    scratch: tl.tuple,
    P: tl.constexpr,
    CANDIDATES: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tuple:
    """The token, or _NO_TOKEN where the row is still to be drawn from all tokens that are not under the floor; and
    the floor."""
    top_k, top_p, log_min_p = filters
    places, candidate_ids, candidate_values = scratch
    floor = tl.maximum(best + log_min_p, _LOWEST)
    bound = tl.maximum(floor, best - REACH)
    total = tl.zeros([], tl.int64)
    head = top_k
    if top_k == 0:
        head = _TOP_P_HEAD
        if top_p < 1:
            total = row_mass(line, temperature, vocab, best, floor, BLOCK)
    few: tl.constexpr = _FEW if CANDIDATES > _FEW else CANDIDATES
    token = _NO_TOKEN
    more = True
    while more:
        if (top_k > 0) | (top_p < 1):
            bound = tl.maximum(floor, peaks_bound(peaks, head, best))
        found = collect(
            line, temperature, peaks, bound, vocab, places, candidate_ids, candidate_values, P, CANDIDATES, CHUNK
        )
        if found <= few:
            token, floor = _from_candidates(
                candidate_ids, candidate_values, found, best, floor, total, filters, key, few
            )
        elif found <= CANDIDATES:
            token, floor = _from_candidates(
                candidate_ids, candidate_values, found, best, floor, total, filters, key, CANDIDATES
            )
        # Under more peaks the end of top_p may come into sight; more than all there are is -inf.
        more = (token == _NO_TOKEN) & (top_k == 0) & (top_p < 1) & (found <= CANDIDATES) & (head < P)
        head = head * 4
    if token == _NO_TOKEN:
        if top_k > 0:
            floor = bisect_floor(line, temperature, vocab, best, floor, top_k.to(tl.float64), True, BLOCK)
        if top_p < 1:
            total = row_mass(line, temperature, vocab, best, floor, BLOCK)
            wanted = top_p.to(tl.float64) * total.to(tl.float64)
            floor = bisect_floor(line, temperature, vocab, best, floor, wanted, False, BLOCK)
        floor = tl.maximum(floor, best - REACH)
    return token, floor


@triton.jit
def _from_candidates(
    ids_in: tl.tensor,
    values_in: tl.tensor,
    found: tl.tensor,
    best: tl.tensor,
    floor: tl.tensor,
    total: tl.tensor,
    filters: tl.tuple,
    key: tl.tuple,
    CANDIDATES: tl.constexpr,
) -> tl.tuple:
    """The token and the floor; _NO_TOKEN where top_p does not end within the candidates. `total` is the row's mass,
    which with top_k is that of candidates alone."""
    top_k, top_p, _ = filters
    at = tl.arange(0, CANDIDATES)
    values = tl.load(values_in + at, mask=at < found, other=float("-inf"))
    ids = tl.load(ids_in + at, mask=at < found, other=0)
    number, mass = ranks(values, values_in, found, best)
    if top_k > 0:
        floor = tl.maximum(floor, tl.max(tl.where(number >= top_k, values, float("-inf")), 0))
    end = floor
    if top_p < 1:
        mass = tl.where((values >= floor) & (at < found), mass, 0)
        if top_k > 0:
            total = tl.max(mass, 0)
        enough = (mass.to(tl.float64) >= top_p.to(tl.float64) * total.to(tl.float64)) & (mass > 0)
        end = tl.max(tl.where(enough, values, float("-inf")), 0)
        floor = tl.maximum(floor, end)
    token = _NO_TOKEN
    if end > float("-inf"):
        floor = tl.maximum(floor, best - REACH)
        _, token = best_noisy(ids, values, floor, key)
    return token, floor
