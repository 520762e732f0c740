"""Sampling and the kernels around a step on a GPU: `python -m tokenspeed.bench.gpu.sample [--check] [WORD ...]`.

Prints each case with the table's tiles first, then with one figure changed at a time. Only cases whose name has all the
words are measured; --check first compares tokens with the torch sampler's on the same card, and ends with 1 where they
differ. What sampling adds to a greedy step is the difference to the greedy case of as many rows.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import msgspec
import numpy as np
import torch

from tokenspeed.bench.gpu.graph_timing import Case, Launch, run_table
from tokenspeed.contracts.step import SamplingRow
from tokenspeed.kernels.triton.launch import small_step
from tokenspeed.kernels.triton.logprobs import token_logprobs
from tokenspeed.kernels.triton.mailbox import Mailbox, header_words, write_header
from tokenspeed.kernels.triton.sample import Tiles, sample, tiles_for
from tokenspeed.kernels.triton.sampling_state import SEEN_IN_PROMPT, SamplingState, is_edited, slot_entries
from tokenspeed.kernels.triton.step import SlotLengths, finish, prepare
from tokenspeed.runner import sampler
from tokenspeed.runner.edits import SampledRow

VOCAB = 128256
ROWS = (1, 8, 32, 128)
ROTATED_BYTES = 256 * 2**20
MOST_COPIES = 256
HISTORY, NUM_PROMPT = list(range(9)), 4
"""Known tokens of every row, and how many of them are its prompt."""
SPREAD = {"peaked": 4.0, "flat": 1.0}
"""Standard deviation of random logits."""
KINDS = {
    "greedy": SamplingRow(0.0, 0, 1.0, 7),
    "plain": SamplingRow(0.7, 0, 1.0, 7),
    "top_k50_p95": SamplingRow(0.7, 50, 0.95, 7),
    "top_p95": SamplingRow(0.7, 0, 0.95, 7),
    "top_k2000": SamplingRow(1.0, 2000, 1.0, 7),
    "min_p": SamplingRow(1.0, 0, 1.0, 7, min_p=0.05),
    "penalties": SamplingRow(0.7, 50, 0.95, 7, frequency_penalty=0.5, repetition_penalty=1.1),
    "bias": SamplingRow(0.7, 50, 0.95, 7, logit_bias=[(5, 1.0), (77, -2.0)], banned_ids=[1, 2, 3]),
    "logprobs": SamplingRow(0.0, 0, 1.0, 7, logprobs=20),
}


def state_of(rows: int, sampling: SamplingRow, vocab: int, device: str) -> SamplingState:
    """All slots with one request's parameters, each with its number as seed; counts of HISTORY where it has
    penalties."""
    flat = np.zeros(SamplingState.size(rows), dtype=np.int32)
    for slot in range(rows):
        own = msgspec.structs.replace(sampling, seed=slot)
        indices, values = slot_entries(slot, rows, own, NUM_PROMPT)
        flat[indices] = values
    state = SamplingState.over(torch.from_numpy(flat).to(device), rows)
    if not sampling.frequency_penalty:
        return state
    state = state.with_counts(vocab)
    if state.counts is not None:
        state.counts[:, HISTORY[:NUM_PROMPT]] = SEEN_IN_PROMPT
        state.counts[:, HISTORY[NUM_PROMPT:]] += 1
    return state


def _logits(rows: int, spread: str, copies: int, vocab: int = VOCAB, device: str = "cuda") -> list[torch.Tensor]:
    generator = torch.Generator(device).manual_seed(1)
    whole = torch.randn(rows, vocab, device=device, generator=generator) * SPREAD[spread]
    return [whole.roll(copy, 1).bfloat16() for copy in range(copies)]


def _launch(rows: int, kind: str, spread: str, tiles: Tiles, pdl: bool) -> Launch:
    logits = _logits(rows, spread, max(2, min(MOST_COPIES, ROTATED_BYTES // (2 * rows * VOCAB))))
    sampling, state = KINDS[kind], state_of(rows, KINDS[kind], VOCAB, "cuda")
    slots = torch.arange(rows, dtype=torch.int32, device="cuda")
    positions = torch.full_like(slots, len(HISTORY))
    pdl = pdl and small_step(slots)

    def launch(i: int) -> None:
        line = logits[i % len(logits)]
        tokens = sample(line, slots, positions, state, edits=is_edited(sampling), pdl=pdl, tiles=tiles)
        if sampling.logprobs >= 0:
            token_logprobs(line, tokens, slots, state, sampling.logprobs, pdl=pdl)

    return launch


def around(rows: int, device: str = "cuda") -> Launch:
    """`prepare` and `finish` of a decode step whose sequences stay where they are, with a mailbox of one slot; between
    them the smallest kernel, as `finish` reads ahead of the one in front."""
    flat = torch.zeros(2 * rows + SamplingState.size(rows), dtype=torch.int32, device=device)
    lengths = SlotLengths(flat[:rows], flat[rows : 2 * rows], flat.new_zeros(rows, 4096))
    pairs = np.arange(2 * rows, dtype=np.int32)
    values = np.repeat(np.array([1023, 1024], dtype=np.int32), rows)
    entries = [(slot, 1, slot, 4096) for slot in range(rows)]
    header = torch.zeros((1, header_words(rows, len(pairs))), dtype=torch.int32)
    write_header(header[0].numpy(), entries, pairs, values)
    shared = (header, torch.zeros((1, rows), dtype=torch.int64))
    headers, results = shared if device == "cpu" else (each.pin_memory() for each in shared)
    mailbox = Mailbox.over(headers, results, torch.device(device))
    state = SamplingState.over(flat[2 * rows :], rows)
    drawn = torch.zeros(rows, dtype=torch.int32, device=device)
    pdl = small_step(drawn)

    def launch(i: int) -> torch.Tensor:
        inputs = prepare(mailbox, flat, lengths, rows, rows, pdl=pdl)
        drawn.zero_()
        finish(drawn, inputs, lengths, state, mailbox, pdl=pdl)
        return lengths.num_tokens

    return launch


def candidates(usual: Tiles) -> Iterator[Tiles]:
    """The table's tiles, and those with one figure changed."""
    yield usual
    for peaks, warps in ((8, 2), (16, 2), (16, 4), (32, 4), (32, 8), (64, 4), (64, 8)):
        if (peaks, warps) != (usual.peaks, usual.peaks_warps):
            yield replace(usual, peaks=peaks, peaks_warps=warps)
    for warps in (4, 16):
        yield replace(usual, choose_warps=warps)
    for few in (256, 512, 2048):
        yield replace(usual, candidates=few)
    for chunk in (32, 128):
        yield replace(usual, chunk=chunk)
    yield replace(usual, block=8192)


def cases() -> Iterator[Case]:
    """Every case; bytes are those of the logits, once."""
    for rows in ROWS:
        moved, usual = 2 * rows * VOCAB, tiles_for(rows)
        for kind in KINDS:
            for spread in SPREAD:
                name = f"{kind} B={rows} {spread}"
                full = kind in ("greedy", "plain", "top_k50_p95", "top_p95")
                for tiles in candidates(usual) if full else (usual,):
                    text = f"{name} {_text(tiles)}{'' if tiles != usual else ' usual'}"
                    yield Case(text, moved, 0, partial(_launch, rows, kind, spread, tiles, True))
                yield Case(f"{name} no-pdl", moved, 0, partial(_launch, rows, kind, spread, usual, False))
        yield Case(f"prepare+finish B={rows}", 0, 0, partial(around, rows))


def _text(tiles: Tiles) -> str:
    return " ".join(f"{name}={value}" for name, value in vars(tiles).items())


def check(rows: int = 256, vocab: int = VOCAB, device: str = "cuda") -> bool:
    """Whether the kernels draw the torch sampler's tokens on this device. One in some thousand rows may differ, where
    the last bit of a logarithm decides."""
    good = True
    for kind, sampling in KINDS.items():
        for spread, deviation in SPREAD.items():
            (logits,) = _logits(rows, spread, 1, vocab, device)
            logits[:, HISTORY] += 3 * deviation
            slots = torch.arange(rows, dtype=torch.int32, device=device)
            positions, state = torch.full_like(slots, len(HISTORY)), state_of(rows, sampling, vocab, device)
            if slots.is_cuda:
                torch.cuda.synchronize()
            tokens = sample(
                logits,
                slots,
                positions,
                state,
                edits=is_edited(sampling),
                pdl=small_step(slots),
            )
            own = [msgspec.structs.replace(sampling, seed=slot) for slot in range(rows)]
            asked = [SampledRow(each, HISTORY, NUM_PROMPT, len(HISTORY)) for each in own]
            expected = sampler.sample(logits.float(), sampler.sampler_inputs(asked, vocab, logits.device)).tokens
            different = int((tokens.long() != expected).sum())
            good &= different <= 1
            print(f"{'ok' if different <= 1 else 'WRONG':6} {different} of {rows} differ  {kind} {spread}", flush=True)
    return good


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, then measure what is asked for; 1 where the check fails."""
    return run_table("sample", __doc__, cases(), check, arguments)


if __name__ == "__main__":
    sys.exit(main())
