"""What host and device exchange in a step, without a copy: its header goes in and its tokens come out through memory
that both see.

Step n has slot n % slots of `headers` and of `results`. The device counts steps itself (`turn`), so a captured step
needs no argument. The host writes a slot's header before it launches the step, and again only when the step that had
the slot last has answered. A result is one 64-bit word per row: the step's number above the token. A word is written
whole, so whoever reads the number has the token with it, in whatever order words arrive.

A header is int32: the number of rows, and of pairs; per row its slot, the most tokens it may feed, the offset of its
first one in the step, and how many positions have pages; then (index, value) pairs to write into the flat state tensor,
no index twice. Offsets ascend, and a row has the places up to the next row's offset, or as many as it really feeds: the
rest are padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tokenspeed.kernels.triton.launch import launch_options

HEAD, ROW_FIELDS = 2, 4
"""Words before the rows of a header, and of each row."""
_HEAD, _ROW_FIELDS = tl.constexpr(HEAD), tl.constexpr(ROW_FIELDS)
SCATTER_BLOCK, SCATTER_PROGRAMS = 1024, 32


@dataclass(frozen=True)
class Mailbox:
    """headers: int32 [slots, words], results: int64 [slots, rows], both shared by host and device; slots is a power of
    two. turn: int32 [1] on the device, the number of the step that was begun last, counted modulo 2**32. rows: int32
    [HEAD + ROW_FIELDS * rows] on the device, the begun step's header up to its rows."""

    headers: torch.Tensor
    results: torch.Tensor
    turn: torch.Tensor
    rows: torch.Tensor

    @staticmethod
    def over(headers: torch.Tensor, results: torch.Tensor, device: torch.device) -> Mailbox:
        """With what the device needs besides."""
        most = HEAD + ROW_FIELDS * results.shape[1]
        turn, rows = (torch.zeros(size, dtype=torch.int32, device=device) for size in (1, most))
        return Mailbox(headers, results, turn, rows)


def header_words(rows: int, pairs: int) -> int:
    """Words of a header."""
    return HEAD + ROW_FIELDS * rows + 2 * pairs


def write_header(
    header: np.ndarray, rows: Sequence[tuple[int, int, int, int]], indices: np.ndarray, values: np.ndarray
) -> None:
    """Write a step's header into int32 words, from (slot, most tokens, offset, positions with pages) rows and pairs;
    what lies behind it stays. Raises ValueError where they are too few."""
    first, needed = header_words(len(rows), 0), header_words(len(rows), len(indices))
    if needed > len(header):
        raise ValueError(f"{len(rows)} rows and {len(indices)} pairs need a header of {needed}, it has {len(header)}")
    header[0], header[1] = len(rows), len(indices)
    header[HEAD:first] = np.array(rows, dtype=np.int32).reshape(-1)
    header[first:needed:2], header[first + 1 : needed : 2] = indices, values


def fetch(mailbox: Mailbox, state: torch.Tensor, rows: int, pdl: bool = False) -> None:
    """Of the next step: write the pairs into the flat int32 `state`, and the header of `rows` rows at most into
    `mailbox.rows`. The turn stays."""
    slots, words = mailbox.headers.shape
    head = header_words(rows, 0)
    programs = min(SCATTER_PROGRAMS, triton.cdiv((words - HEAD) // 2, SCATTER_BLOCK))
    _fetch[(max(1, programs),)](
        mailbox.headers,
        mailbox.turn,
        words,
        mailbox.rows,
        head,
        state,
        state.numel(),
        SLOTS=slots,
        WORDS=triton.next_power_of_2(head),
        BLOCK=SCATTER_BLOCK,
        PDL=pdl,
        num_warps=4,
        **launch_options(pdl),
    )


@triton.jit
def _fetch(
    headers: tl.tensor,
    turn: tl.tensor,
    header_size: tl.tensor,
    rows_out: tl.tensor,
    head_size: tl.tensor,
    state: tl.tensor,
    state_size: tl.tensor,
    SLOTS: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """The host writes headers while kernels run: `.cv` asks memory each time, never a cache. All that a step without
    pairs needs is asked for at once, as every answer takes a microsecond."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    header = headers + ((tl.load(turn) + 1) & (SLOTS - 1)) * header_size
    num_rows = tl.load(header, cache_modifier=".cv")
    num_pairs = tl.load(header + 1, cache_modifier=".cv")
    if tl.program_id(0) == 0:
        at = tl.arange(0, WORDS)
        words = tl.load(header + at, mask=at < head_size, other=0, cache_modifier=".cv")
        tl.store(rows_out + at, words, mask=at < head_size)
    first = _HEAD + _ROW_FIELDS * num_rows
    num_pairs = tl.minimum(num_pairs, (header_size - first) // 2)
    for start in range(tl.program_id(0) * BLOCK, num_pairs, tl.num_programs(0) * BLOCK):
        pair = start + tl.arange(0, BLOCK)
        index = tl.load(header + first + 2 * pair, mask=pair < num_pairs, other=-1, cache_modifier=".cv")
        value = tl.load(header + first + 2 * pair + 1, mask=pair < num_pairs, other=0, cache_modifier=".cv")
        tl.store(state + index, value, mask=(index >= 0) & (index < state_size))


@triton.jit
def answer(
    results: tl.tensor,
    stride: tl.tensor,
    turn: tl.tensor,
    row: tl.tensor,
    token: tl.tensor,
    inside: tl.tensor,
    SLOTS: tl.constexpr,
) -> None:
    """Write the tokens of the begun step's rows where the host looks for them, past the caches."""
    number = tl.load(turn)
    words = (number.to(tl.int64) << 32) | (token.to(tl.int64) & 0xFFFFFFFF)
    tl.store(results + (number & (SLOTS - 1)) * stride + row, words, mask=inside, cache_modifier=".wt")
