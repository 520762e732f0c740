"""Rows of the sampler's own tests, put into slots of the device's sampling state."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import torch

from tests.runner.sampler_reference import reference_tokens
from tests.runner.test_sampler import CPU, history, random_sampling
from tokenspeed.contracts.step import SamplingRow
from tokenspeed.kernels.triton.sample import Tiles, sample
from tokenspeed.kernels.triton.sampling_state import (
    LIST_CAPACITY,
    SEEN_IN_PROMPT,
    WORD_CAPACITY,
    SamplingState,
    excess,
    is_edited,
    slot_entries,
)
from tokenspeed.runner import sampler
from tokenspeed.runner.edits import SampledRow

MIDDLE = Tiles(peaks=32, peaks_warps=1, candidates=128, chunk=8, block=2048, choose_warps=1)
"""Fast in the interpreter."""
SMALL = Tiles(peaks=4, peaks_warps=1, candidates=16, chunk=2, block=1024, choose_warps=1)
"""So small that most rows with filters need passes over the whole row."""


@dataclass(frozen=True)
class DeviceRows:
    state: SamplingState
    slots: torch.Tensor
    positions: torch.Tensor
    pool: torch.Tensor


def fitting(params: SamplingRow) -> SamplingRow:
    """With lists cut to what a slot holds."""
    names = ("stop_ids", "banned_ids", "allowed_ids", "logit_bias")
    lists: dict[str, Any] = {name: getattr(params, name) for name in names}
    cut = {name: ids if ids is None else ids[:LIST_CAPACITY] for name, ids in lists.items()}
    return msgspec.structs.replace(params, bad_words=params.bad_words[:WORD_CAPACITY], **cut)


def device_rows(rows: Sequence[SampledRow], vocab: int, rng: random.Random) -> DeviceRows:
    """Each row in a slot of its own, among slots that nobody uses; what is not set is poisoned."""
    slots = len(rows) + 3
    flat = torch.full((SamplingState.size(slots),), 0x3FFFFFF7, dtype=torch.int32)
    state = SamplingState.over(flat, slots).with_counts(vocab)
    pool = torch.full((slots, 40), -9, dtype=torch.int32)
    chosen = rng.sample(range(slots), len(rows))
    assert state.counts is not None
    state.counts.fill_(3)
    for slot, row in zip(chosen, rows, strict=True):
        assert excess(row.sampling) is None
        indices, values = slot_entries(slot, slots, row.sampling, row.num_prompt)
        flat[torch.from_numpy(indices).long()] = torch.from_numpy(values)
        pool[slot, : row.position] = torch.tensor(row.tokens[: row.position])
        state.counts[slot] = 0
        for at, token in enumerate(row.tokens[: row.position]):
            if at < row.num_prompt:
                state.counts[slot, token] |= SEEN_IN_PROMPT
            else:
                state.counts[slot, token] += 1
    positions = torch.tensor([row.position for row in rows], dtype=torch.int32)
    return DeviceRows(state, torch.tensor(chosen, dtype=torch.int32), positions, pool)


def kernel_tokens(
    logits: torch.Tensor,
    rows: Sequence[SampledRow],
    rng: random.Random,
    mask: torch.Tensor | None = None,
    tiles: Tiles | None = None,
) -> list[int]:
    on_device = device_rows(rows, logits.shape[1], rng)
    edits = any(is_edited(row.sampling) for row in rows)
    before = logits.clone()
    found = sample(
        logits,
        on_device.slots,
        on_device.positions,
        on_device.state,
        edits=edits,
        mask=mask,
        pool=on_device.pool,
        tiles=tiles,
    )
    assert torch.equal(logits, before)
    return [int(token) for token in found]


def check(
    logits: torch.Tensor,
    rows: Sequence[SampledRow],
    rng: random.Random,
    mask: torch.Tensor | None = None,
    tiles: Tiles | None = None,
) -> list[int]:
    """The kernels' tokens, which are the sampler's. Where the last bit of a logarithm decides, either may be."""
    found = kernel_tokens(logits, rows, rng, None if mask is None else bits_of(mask), tiles)
    inputs = sampler.sampler_inputs(rows, logits.shape[1], CPU)
    expected = sampler.sample(logits.float(), inputs, mask).tokens.tolist()
    for at, (row, token) in enumerate(zip(rows, found, strict=True)):
        if token != expected[at]:
            allowed = None if mask is None else mask[at].tolist()
            line = logits[at].double().tolist()
            either = reference_tokens(line, row.sampling, row.tokens, row.num_prompt, row.position, allowed)
            assert {token, expected[at]} <= either, (at, token, expected[at], row)
    return found


def bits_of(mask: torch.Tensor) -> torch.Tensor:
    """A bool mask as int32 words, the lowest bit for the lowest id."""
    padded = torch.nn.functional.pad(mask, (0, -mask.shape[1] % 32)).unflatten(1, (-1, 32)).long()
    return (padded << torch.arange(32)).sum(-1).to(torch.int32)


def random_rows(rng: random.Random, count: int, vocab: int) -> list[SampledRow]:
    """Rows of every kind that a slot holds; those that allow nothing are among them."""
    return [history(rng, vocab, fitting(random_sampling(rng, vocab))) for _ in range(count)]
