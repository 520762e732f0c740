"""Log-probabilities of drawn tokens under the raw logits, on the device, for the rows whose slots ask for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tokenspeed.contracts.errors import UnsupportedError
from tokenspeed.kernels.triton.filters import PEAK
from tokenspeed.kernels.triton.launch import launch_options
from tokenspeed.kernels.triton.sampling_state import MAX_TOP, Field, SamplingState

_NUM_TOP = tl.constexpr(Field.NUM_TOP.value)
_PEAK = tl.constexpr(PEAK)
_NO_TOKEN = tl.constexpr(2**31 - 1)

PEAKS, WARPS, SUMMARY_WARPS = 64, 8, 4
"""Peaks of a program of the pass over the vocabulary, its warps, and those of the program that sums a row up."""


@dataclass(frozen=True)
class DeviceLogprobs:
    """Of the rows that ask: log-probability float32 [rows] and rank int32 [rows] of the token (1 is the argmax), and
    the best ids int32 and log-probabilities float32 [rows, top], best first, the lowest id first among equals, as many
    as the slot asks for. All else is 0."""

    logprobs: torch.Tensor
    ranks: torch.Tensor
    top_ids: torch.Tensor
    top_logprobs: torch.Tensor


def token_logprobs(
    logits: torch.Tensor, tokens: torch.Tensor, slots: torch.Tensor, state: SamplingState, top: int, pdl: bool = False
) -> DeviceLogprobs:
    """Of tokens int32 [rows] in raw logits [rows, vocabulary], with at most `top` alternatives; slots int32 [rows], -1
    for none.

    Raises UnsupportedError where `top` is above MAX_TOP.
    """
    if top > MAX_TOP:
        raise UnsupportedError(f"{top} alternatives per token, at most {MAX_TOP} are reported")
    rows, vocab = logits.shape
    num_peaks = triton.cdiv(vocab, PEAK)
    parts = triton.cdiv(num_peaks, PEAKS)
    width = max(PEAKS, triton.next_power_of_2(num_peaks))

    def tensor(columns: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty((rows, columns), dtype=dtype, device=logits.device)

    peaks, sums, above = tensor(width, torch.float32), tensor(parts, torch.float32), tensor(parts, torch.int32)
    found = DeviceLogprobs(
        tensor(1, torch.float32).view(rows),
        tensor(1, torch.int32).view(rows),
        tensor(top, torch.int32),
        tensor(top, torch.float32),
    )
    shared = (logits, logits.stride(0), tokens, slots, state.params, state.params.shape[1], peaks, sums, above)
    options = launch_options(pdl, enable_fp_fusion=False)
    _summaries[(parts, rows)](
        *shared, vocab, num_peaks, parts, P=width, PEAKS=PEAKS, PDL=pdl, num_warps=WARPS, **options
    )
    _logprobs[(rows,)](
        *shared,
        found.logprobs,
        found.ranks,
        found.top_ids,
        found.top_logprobs,
        vocab,
        num_peaks,
        parts,
        top,
        P=width,
        PEAKS=PEAKS,
        TOP=max(1, triton.next_power_of_2(top)),
        PDL=pdl,
        num_warps=SUMMARY_WARPS,
        **options,
    )
    return found


@triton.jit
def _summaries(
    logits: tl.tensor,
    stride: tl.tensor,
    tokens: tl.tensor,
    slots: tl.tensor,
    fields: tl.tensor,
    num_slots: tl.tensor,
    peaks_out: tl.tensor,
    sums: tl.tensor,
    above: tl.tensor,
    vocab: tl.tensor,
    num_peaks: tl.tensor,
    parts: tl.tensor,
    P: tl.constexpr,
    PEAKS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Per part of a row: its peaks, the sum of exp(logit - its best), and how many logits are above the token's."""
    part, row = tl.program_id(0), tl.program_id(1)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    slot = tl.load(slots + row)
    wanted = -1
    if slot >= 0:
        wanted = tl.load(fields + _NUM_TOP * num_slots + slot)
    if wanted >= 0:
        line = logits + row.to(tl.int64) * stride
        own = tl.load(line + tl.load(tokens + row)).to(tl.float32)
        place = part * PEAKS + tl.arange(0, PEAKS)
        ids = place[:, None] * _PEAK + tl.arange(0, _PEAK)[None, :]
        values = tl.load(line + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
        peaks = tl.max(values, 1)
        best = tl.max(peaks, 0)
        weights = tl.exp(values - tl.where(best > float("-inf"), best, 0.0))
        at = row.to(tl.int64) * parts + part
        tl.store(sums + at, tl.sum(tl.sum(weights, 1), 0))
        tl.store(above + at, tl.sum(tl.sum((values > own).to(tl.int32), 1), 0))
        tl.store(peaks_out + row.to(tl.int64) * P + place, peaks, mask=place < num_peaks)


@triton.jit
def _best_places(values: tl.tensor, ids: tl.tensor, count: tl.tensor, TOP: tl.constexpr) -> tl.tuple:
    """The `count` largest of values [n], and their ids, in order; the lowest id first among equals."""
    at = tl.arange(0, TOP)
    top_values = tl.full([TOP], float("-inf"), tl.float32)
    top_ids = tl.full([TOP], 2**31 - 1, tl.int32)
    for number in range(count):
        best = tl.max(tl.where(ids < _NO_TOKEN, values, float("-inf")), 0)
        first = tl.min(tl.where(values == best, ids, _NO_TOKEN), 0)
        top_values = tl.where(at == number, best, top_values)
        top_ids = tl.where(at == number, first, top_ids)
        ids = tl.where(ids == first, _NO_TOKEN, ids)
    return top_values, top_ids


@triton.jit
def _log_total(peaks: tl.tensor, sums: tl.tensor, parts: tl.tensor, P: tl.constexpr, PEAKS: tl.constexpr) -> tl.tensor:
    """Log of the sum of exp(logit - the row's best), from the parts' sums in their order."""
    part_best = tl.max(tl.reshape(peaks, [P // PEAKS, PEAKS]), 1)
    part = tl.arange(0, P // PEAKS)
    part_sum = tl.load(sums + part, mask=part < parts, other=0.0)
    return tl.log(tl.sum(part_sum * tl.exp(part_best - tl.max(peaks, 0)), 0))


@triton.jit
def _alternatives(
    line: tl.tensor,
    vocab: tl.tensor,
    peaks: tl.tensor,
    num_peaks: tl.tensor,
    wanted: tl.tensor,
    P: tl.constexpr,
    TOP: tl.constexpr,
) -> tl.tuple:
    """Logits and ids of the `wanted` best tokens: they lie under the peaks that are best by the same order."""
    at = tl.arange(0, P)
    _, places = _best_places(peaks, tl.where(at < num_peaks, at, _NO_TOKEN), wanted, TOP)
    ids = tl.where(places < _NO_TOKEN, places, 0)[:, None] * _PEAK + tl.arange(0, _PEAK)[None, :]
    inside = (places < _NO_TOKEN)[:, None] & (ids < vocab)
    values = tl.load(line + ids, mask=inside, other=float("-inf")).to(tl.float32)
    ids = tl.where(inside, ids, _NO_TOKEN)
    return _best_places(tl.reshape(values, [TOP * _PEAK]), tl.reshape(ids, [TOP * _PEAK]), wanted, TOP)


@triton.jit
def _logprobs(
    logits: tl.tensor,
    stride: tl.tensor,
    tokens: tl.tensor,
    slots: tl.tensor,
    fields: tl.tensor,
    num_slots: tl.tensor,
    peaks_in: tl.tensor,
    sums: tl.tensor,
    above: tl.tensor,
    logprobs: tl.tensor,
    ranks: tl.tensor,
    top_ids: tl.tensor,
    top_logprobs: tl.tensor,
    vocab: tl.tensor,
    num_peaks: tl.tensor,
    parts: tl.tensor,
    top: tl.tensor,
    P: tl.constexpr,
    PEAKS: tl.constexpr,
    TOP: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    row64 = row.to(tl.int64)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    slot = tl.load(slots + row)
    wanted = -1
    if slot >= 0:
        wanted = tl.minimum(tl.load(fields + _NUM_TOP * num_slots + slot), tl.minimum(top, vocab))
    place = tl.arange(0, TOP)
    ids, values = tl.full([TOP], 0, tl.int32), tl.full([TOP], 0.0, tl.float32)
    logprob, rank = 0.0, 0
    if wanted >= 0:
        line, at = logits + row64 * stride, tl.arange(0, P)
        peaks = tl.load(peaks_in + row64 * P + at, mask=at < num_peaks, other=float("-inf"))
        total = _log_total(peaks, sums + row64 * parts, parts, P, PEAKS)
        best, part = tl.max(peaks, 0), tl.arange(0, P // PEAKS)
        logprob = tl.load(line + tl.load(tokens + row)).to(tl.float32) - best - total
        rank = 1 + tl.sum(tl.load(above + row64 * parts + part, mask=part < parts, other=0), 0)
        found, found_ids = _alternatives(line, vocab, peaks, num_peaks, wanted, P, TOP)
        ids, values = tl.where(place < wanted, found_ids, 0), tl.where(place < wanted, found - best - total, 0.0)
    tl.store(logprobs + row, logprob)
    tl.store(ranks + row, rank)
    tl.store(top_ids + row64 * top + place, ids, mask=place < top)
    tl.store(top_logprobs + row64 * top + place, values, mask=place < top)
