"""Parts of the kernel that finds where min_p, top_k and top_p end in one row of scaled logits (see `runner/draw.py`).

Nothing is sorted. The few tokens that matter, as a rule, are compared each with each; where they are many, the floor
is bisected over the order of float32 bits, with whole passes over the row. Mass is counted in integers, so that sums
do not depend on their order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tokenspeed.kernels.triton.noise import gumbel, token_words

PEAK = 64
"""Tokens under one peak."""
_PEAK = tl.constexpr(PEAK)
_MASS = tl.constexpr(2.0**42)
_NO_TOKEN = tl.constexpr(2**31 - 1)
_BINS = tl.constexpr(256)
"""That peaks are counted in, the first for those outside."""
_WIDEST = tl.constexpr(3.0e38)
_FEW_PEAKS = tl.constexpr(16)
"""Up to this many are looked under one by one."""
_OTHERS = tl.constexpr(16)
"""Candidates that all are compared with at a time."""


@triton.jit
def key_of(values: tl.tensor) -> tl.tensor:
    """int32 in the order of float32 values."""
    bits = values.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def value_of(key: tl.tensor) -> tl.tensor:
    """The float32 value of an int32 key."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def mass_of(scaled: tl.tensor, best: tl.tensor, floor: tl.tensor) -> tl.tensor:
    """exp(scaled - best) as int64 of 42 bits, 0 under `floor`."""
    return tl.where(scaled >= floor, tl.exp(scaled - best) * _MASS, 0.0).to(tl.int64)


@triton.jit
def peaks_bound(peaks: tl.tensor, count: tl.tensor, best: tl.tensor) -> tl.tensor:
    """A value that at least `count` peaks reach, and few more; -inf where the row has fewer finite peaks.

    Peaks between two values are counted in bins of one width, and those of the bin that `count` ends in once more."""
    finite = peaks > float("-inf")
    reached = tl.sum(finite.to(tl.int32), 0)
    low, high = tl.min(tl.where(finite, peaks, best), 0), best
    short = reached < count
    above = 0
    enough = count + count // 4 + 8
    bins = tl.arange(0, _BINS)
    while (reached > enough) & (high > low):
        place = (peaks - low) * ((_BINS - 2) / tl.minimum(high - low, _WIDEST))
        place = 1 + tl.maximum(tl.minimum(place, _BINS - 2.0), 0.0).to(tl.int32)
        place = tl.where((peaks >= low) & (peaks <= high), place, 0)
        held = tl.where(bins > 0, tl.histogram(place, _BINS), 0)
        reach = above + tl.cumsum(held, 0, reverse=True)
        chosen = tl.max(tl.where((reach >= count) & (bins > 0), bins, 1), 0)
        reached = tl.sum(tl.where(bins == chosen, reach, 0), 0)
        above = reached - tl.sum(tl.where(bins == chosen, held, 0), 0)
        low = tl.min(tl.where(place == chosen, peaks, best), 0)
        high = tl.max(tl.where(place == chosen, peaks, low), 0)
    return tl.where(short, float("-inf"), low)


@triton.jit
def scaled_block(row: tl.tensor, ids: tl.tensor, valid: tl.tensor, temperature: tl.tensor) -> tl.tensor:
    """Logits / temperature of token ids of a row; -inf where not valid."""
    values = tl.load(row + ids, mask=valid, other=float("-inf")).to(tl.float32)
    return tl.div_rn(values, temperature)


@triton.jit
def collect(
    row: tl.tensor,
    temperature: tl.tensor,
    peaks: tl.tensor,
    bound: tl.tensor,
    vocab: tl.tensor,
    places: tl.tensor,
    ids_out: tl.tensor,
    values_out: tl.tensor,
    P: tl.constexpr,
    CANDIDATES: tl.constexpr,
    CHUNK: tl.constexpr,
) -> tl.tensor:
    """Write ids and scaled values of the tokens not under `bound`, which is finite; returns how many there are, or a
    number above CANDIDATES where there are more."""
    listed = peaks >= bound
    order = tl.cumsum(listed.to(tl.int32), 0) - 1
    tl.store(places + order, tl.arange(0, P), mask=listed)
    num_listed = tl.sum(listed.to(tl.int32), 0)
    tl.debug_barrier()  # What other threads of this program wrote is read below.
    found = 0
    first = 0
    while (first < num_listed) & (found <= CANDIDATES):
        which = first + tl.arange(0, CHUNK)
        place = tl.load(places + which, mask=which < num_listed, other=0)
        ids = place[:, None] * _PEAK + tl.arange(0, _PEAK)[None, :]
        scaled = scaled_block(row, ids, (which < num_listed)[:, None] & (ids < vocab), temperature)
        kept = scaled >= bound
        upto = tl.cumsum(kept.to(tl.int32), 1)
        each = tl.sum(kept.to(tl.int32), 1)
        at = found + (tl.cumsum(each, 0) - each)[:, None] + upto - 1
        tl.store(ids_out + at, ids, mask=kept & (at < CANDIDATES))
        tl.store(values_out + at, scaled, mask=kept & (at < CANDIDATES))
        found += tl.sum(each, 0)
        first += CHUNK
    tl.debug_barrier()
    return found


@triton.jit
def ranks(values: tl.tensor, values_in: tl.tensor, found: tl.tensor, best: tl.tensor) -> tl.tuple:
    """For each of `found` candidates, which `values` holds and `values_in` points to, the number of candidates that are
    no smaller, and their mass, int64."""
    number = tl.zeros_like(values).to(tl.int32)
    mass = tl.zeros_like(values).to(tl.int64)
    for first in range(0, found, _OTHERS):
        other = first + tl.arange(0, _OTHERS)
        others = tl.load(values_in + other, mask=other < found, other=float("-inf"))
        reaches = (others[None, :] >= values[:, None]) & (other < found)[None, :]
        number += tl.sum(reaches.to(tl.int32), 1)
        mass += tl.sum(tl.where(reaches, mass_of(others, best, others)[None, :], 0), 1)
    return number, mass


@triton.jit
def row_mass(
    row: tl.tensor, temperature: tl.tensor, vocab: tl.tensor, best: tl.tensor, floor: tl.tensor, BLOCK: tl.constexpr
) -> tl.tensor:
    """Mass of a whole row, int64."""
    total = tl.zeros([BLOCK], tl.int64)
    for first in range(0, vocab, BLOCK):
        ids = first + tl.arange(0, BLOCK)
        total += mass_of(scaled_block(row, ids, ids < vocab, temperature), best, floor)
    return tl.sum(total, 0)


@triton.jit
def bisect_floor(
    row: tl.tensor,
    temperature: tl.tensor,
    vocab: tl.tensor,
    best: tl.tensor,
    floor: tl.tensor,
    wanted: tl.tensor,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """The largest value of a row, none under `floor`, such that the tokens not under it reach `wanted` (float64): in
    number, or in mass. `floor` where all of them do not."""
    low, high = key_of(floor).to(tl.int64), key_of(best).to(tl.int64) + 1
    middle = low
    while high - low > 0:
        at = value_of(middle.to(tl.int32))
        weight = tl.zeros([BLOCK], tl.int64)
        above = tl.full([BLOCK], float("inf"), tl.float32)
        below = tl.full([BLOCK], float("-inf"), tl.float32)
        for first in range(0, vocab, BLOCK):
            ids = first + tl.arange(0, BLOCK)
            scaled = scaled_block(row, ids, ids < vocab, temperature)
            reaches = scaled >= at
            if COUNT:
                weight += reaches.to(tl.int64)
            else:
                weight += mass_of(scaled, best, at)
            above = tl.minimum(above, tl.where(reaches, scaled, float("inf")))
            below = tl.maximum(below, tl.where(reaches, float("-inf"), scaled))
        # Both ends move on to values that occur: between them nothing can be chosen.
        if tl.sum(weight, 0).to(tl.float64) >= wanted:
            low = tl.maximum(middle, key_of(tl.min(above, 0)).to(tl.int64))
        else:
            high = tl.maximum(low, tl.minimum(middle, key_of(tl.max(below, 0)).to(tl.int64) + 1))
        if high - low <= 1:
            high = low
        middle = low + (high - low) // 2
    return value_of(low.to(tl.int32))


@triton.jit
def best_noisy(ids: tl.tensor, scaled: tl.tensor, floor: tl.tensor, key: tl.tuple) -> tl.tuple:
    """Of tokens [n] not under `floor`: the best of scaled logits plus noise, and the lowest id that has it."""
    noisy = gumbel(token_words(ids, key)) + scaled
    noisy = tl.where(scaled >= floor, noisy, float("-inf"))
    best = tl.max(noisy, 0)
    lowest = tl.min(tl.where(noisy == best, ids, _NO_TOKEN), 0)
    return best, tl.where(best > float("-inf"), lowest, _NO_TOKEN)


@triton.jit
def _draw_peaks(
    row: tl.tensor,
    temperature: tl.tensor,
    vocab: tl.tensor,
    peaks: tl.tensor,
    cut: tl.tensor,
    floor: tl.tensor,
    key: tl.tuple,
    P: tl.constexpr,
) -> tl.tensor:
    """The token of a row: of those not under `floor`, looked at under the peaks that reach `cut`, one by one."""
    best = float("-inf")
    token = _NO_TOKEN
    places = tl.where(peaks >= cut, tl.arange(0, P), P)
    place = tl.min(places, 0)
    while place < P:
        ids = place * _PEAK + tl.arange(0, _PEAK)
        top, at = best_noisy(ids, scaled_block(row, ids, ids < vocab, temperature), floor, key)
        if top > best:
            best = top
            token = at
        places = tl.where(places > place, places, P)
        place = tl.min(places, 0)
    return token


@triton.jit
def _draw_blocks(
    row: tl.tensor,
    temperature: tl.tensor,
    vocab: tl.tensor,
    floor: tl.tensor,
    key: tl.tuple,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """The token of a row: of all those not under `floor`."""
    best = float("-inf")
    token = _NO_TOKEN
    for first in range(0, vocab, BLOCK):
        ids = first + tl.arange(0, BLOCK)
        top, at = best_noisy(ids, scaled_block(row, ids, ids < vocab, temperature), floor, key)
        if top > best:
            best = top
            token = at
    return token


@triton.jit
def draw_row(
    row: tl.tensor,
    temperature: tl.tensor,
    vocab: tl.tensor,
    peaks: tl.tensor,
    cut: tl.tensor,
    floor: tl.tensor,
    key: tl.tuple,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """The token of a row: of those not under `floor`, all of which lie under peaks that reach `cut`, or have no chance
    against one that does."""
    if tl.sum((peaks >= cut).to(tl.int32), 0) <= _FEW_PEAKS:
        token = _draw_peaks(row, temperature, vocab, peaks, cut, floor, key, P)
    else:
        token = _draw_blocks(row, temperature, vocab, floor, key, BLOCK)
    return token
