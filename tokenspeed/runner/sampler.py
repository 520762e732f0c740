"""From logits to tokens: Gumbel-max with counter-based noise, so a token depends on its key and logits alone.

The noise of token v at position p is a pure function of (seed, sample index, p, v). Hence equal logits give equal
tokens in any batch, slot or order, and temperature 0 is the argmax without noise. The order of everything is vLLM's:
logits processors, allowed and banned ids and mask, logit_bias, penalties, min_tokens, divide by T, min_p, top_k, top_p,
then the argmax of the result and the noise. Of equal values the lowest id wins, which is also what a row gets that
allows no token at all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tokenspeed.contracts.step import SamplingRow
from tokenspeed.runner.draw import DrawRows, draw
from tokenspeed.runner.edits import LogitEdits, SampledRow, logit_edits
from tokenspeed.runner.logprobs import Logprobs, token_logprobs
from tokenspeed.runner.noise import TOKENS_PER_BLOCK, gumbel, noise_keys
from tokenspeed.runner.tiles import tile

SMALL_TOP_K = 1024
"""Rows that keep at most this many tokens are drawn apart from those that may keep the whole vocabulary."""
_ELEMENTS_AT_ONCE = 2**20
"""Logits looked at together by rows that may keep the whole vocabulary; bounds the memory their filters take."""


@dataclass(frozen=True)
class DrawGroup:
    """Rows drawn together: their numbers int64 [n], or None for all rows of the step, and their parameters."""

    rows: torch.Tensor | None
    draw: DrawRows


@dataclass(frozen=True)
class SamplerInputs:
    """What the rows of a step ask for, as tensors on its device; sizes and absences are known to the host.

    greedy: numbers of rows at temperature 0, int64 [n]; None for all rows. logprob_rows: rows that want
    log-probabilities, int64 [n], and `tops`, the alternatives of each; None for none.
    """

    num_rows: int
    greedy: torch.Tensor | None
    groups: list[DrawGroup]
    edits: LogitEdits | None
    logprob_rows: torch.Tensor | None
    tops: list[int]


@dataclass(frozen=True)
class Sampled:
    """Token ids int64 [rows], and the log-probabilities that were asked for, in the order of their rows."""

    tokens: torch.Tensor
    logprobs: Logprobs | None


def sampler_inputs(rows: Sequence[SampledRow], vocab_size: int, device: torch.device) -> SamplerInputs:
    """Inputs of `sample` for one row of logits each. Waits for nothing."""
    greedy: list[int] = []
    small: list[int] = []
    large: list[int] = []
    for number, row in enumerate(rows):
        kind = greedy if row.sampling.temperature == 0 else small if 0 < row.sampling.top_k <= SMALL_TOP_K else large
        kind.append(number)
    step = max(1, _ELEMENTS_AT_ONCE // vocab_size)
    parts = [small, *(large[i : i + step] for i in range(0, len(large), step))]
    wanted = [number for number, row in enumerate(rows) if row.sampling.logprobs >= 0]
    return SamplerInputs(
        num_rows=len(rows),
        greedy=_numbers(greedy, len(rows), device),
        groups=[_group(part, rows, device) for part in parts if part],
        edits=logit_edits(rows, device),
        logprob_rows=torch.tensor(wanted, device=device) if wanted else None,
        tops=[rows[number].sampling.logprobs for number in wanted],
    )


def sample(
    logits: torch.Tensor,
    inputs: SamplerInputs,
    mask: torch.Tensor | None = None,
    narrow: bool | None = None,
    processed: torch.Tensor | None = None,
) -> Sampled:
    """One token per row of raw float32 logits [rows, vocabulary], which are not changed.

    mask: tokens that may be sampled, bool [rows, vocabulary], or int32 [rows, ceil(vocabulary / 32)] with the lowest
    bit for the lowest id. narrow: see `draw`; by default on the CPU alone, where waiting costs nothing. processed: what
    logits processors made of `logits`, to be drawn from; log-probabilities stay those of `logits`.
    """
    narrow = logits.device.type == "cpu" if narrow is None else narrow
    edited = logits if processed is None else processed
    if inputs.edits is not None:
        edited = inputs.edits.apply(edited)
    if mask is not None:
        edited = edited.masked_fill(~_unpacked(mask, logits.shape[1]), -torch.inf)
    if inputs.greedy is None:
        tokens = tile(edited).first_argmax()
    else:
        tokens = torch.zeros(inputs.num_rows, dtype=torch.int64, device=logits.device)
        if len(inputs.greedy):
            tokens[inputs.greedy] = tile(edited[inputs.greedy]).first_argmax()
    for group in inputs.groups:
        if group.rows is None:
            tokens = draw(edited, group.draw, narrow)
        else:
            tokens[group.rows] = draw(edited[group.rows], group.draw, narrow)
    return Sampled(tokens, _logprobs(logits, tokens, inputs))


def settle(candidates: Sequence[tuple[int, float]], row: SampledRow) -> int:
    """The token that `sample` draws for a row that is `drawn_plainly`, out of those (id, logit) that its filters leave
    and that it may be, in ascending order of ids."""
    sampling = row.sampling
    ids, logits = (torch.tensor(column) for column in zip(*candidates, strict=True))
    keys = noise_keys([sampling.seed], [sampling.sample_index], [row.position], ids.device)
    noise = gumbel(keys, ids[None] // TOKENS_PER_BLOCK).view(-1, TOKENS_PER_BLOCK)
    noisy = noise[torch.arange(len(ids)), ids % TOKENS_PER_BLOCK] + logits / sampling.temperature
    values = noisy.tolist()
    return int(ids[values.index(max(values))])


def log_min_p(sampling: SamplingRow) -> float:
    """How far below the best scaled logit min_p cuts; -inf without one."""
    return math.log(sampling.min_p) if sampling.min_p else -math.inf


def _logprobs(logits: torch.Tensor, tokens: torch.Tensor, inputs: SamplerInputs) -> Logprobs | None:
    rows = inputs.logprob_rows
    if rows is None:
        return None
    chosen = logits if len(rows) == inputs.num_rows else logits[rows]
    return token_logprobs(chosen, tokens[rows], max(inputs.tops))


def _unpacked(mask: torch.Tensor, vocab_size: int) -> torch.Tensor:
    if mask.dtype == torch.bool:
        return mask
    bits = (mask[:, :, None] >> torch.arange(32, device=mask.device, dtype=mask.dtype)) & 1
    return bits.flatten(1)[:, :vocab_size].bool()


def _numbers(rows: list[int], total: int, device: torch.device) -> torch.Tensor | None:
    return None if len(rows) == total else torch.tensor(rows, dtype=torch.int64, device=device)


def _group(numbers: list[int], rows: Sequence[SampledRow], device: torch.device) -> DrawGroup:
    chosen = [rows[number] for number in numbers]
    params = [row.sampling for row in chosen]

    def column(values: list[float], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=device)[:, None]

    return DrawGroup(
        rows=_numbers(numbers, len(rows), device),
        draw=DrawRows(
            temperature=column([each.temperature for each in params], torch.float32),
            log_min_p=column([log_min_p(each) for each in params], torch.float32),
            top_k=column([each.top_k for each in params], torch.int64),
            top_p=column([each.top_p for each in params], torch.float64),
            keys=noise_keys(
                [each.seed for each in params],
                [each.sample_index for each in params],
                [row.position for row in chosen],
                device,
            ),
            max_top_k=max(each.top_k for each in params),
            any_top_p=any(each.top_p < 1 for each in params),
        ),
    )
