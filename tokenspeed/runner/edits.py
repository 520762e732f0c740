"""What a request changes in its logits before they are drawn from: bias, penalties, forbidden and allowed tokens.

Only the tokens concerned are touched: lists of (row, token id) pairs, no array over the vocabulary.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from tokenspeed.contracts.step import SamplingRow


class SeenTokens:
    """The distinct tokens of one sequence, and how often each was sampled; kept for a sequence with penalties."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self._ids = array("q", dict.fromkeys(prompt))
        self._counts = array("q", bytes(8 * len(self._ids)))
        self._places = {token: place for place, token in enumerate(self._ids)}
        self.length = len(prompt)
        """Tokens taken in, prompt included."""

    def extend(self, tokens: Sequence[int]) -> None:
        """Count sampled tokens."""
        self.length += len(tokens)
        for token in tokens:
            place = self._places.setdefault(token, len(self._ids))
            if place == len(self._ids):
                self._ids.append(token)
                self._counts.append(0)
            self._counts[place] += 1

    def entries(self, more: Sequence[int] = ()) -> tuple[np.ndarray, np.ndarray]:
        """Ids and counts, int64 [n] each, as if `more` had been sampled too; a token of the prompt alone counts 0."""
        ids, counts = np.array(self._ids), np.array(self._counts)
        if not len(more):
            return ids, counts
        extra = dict.fromkeys(more, 0)
        for token in more:
            extra[token] += 1
        for token in list(extra):
            if token in self._places:
                counts[self._places[token]] += extra.pop(token)
        new_ids, new_counts = (np.fromiter(part, np.int64, len(extra)) for part in (extra.keys(), extra.values()))
        return np.concatenate((ids, new_ids)), np.concatenate((counts, new_counts))


@dataclass(frozen=True, slots=True)
class SampledRow:
    """A row of logits to sample from: the sequence's sampling, its tokens, and how many of them come before the new
    one, which is also the new one's position. With drafts, a sequence has several rows in a step.

    seen: counts of tokens before `position` (extended by the caller as tokens are accepted); counted here without it.
    """

    sampling: SamplingRow
    tokens: Sequence[int]
    num_prompt: int
    position: int
    seen: SeenTokens | None = None


@dataclass
class _Pairs:
    """(row, id) pairs in the making, with a value each where there is one."""

    rows: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def add(self, row: int, ids: Sequence[int]) -> None:
        self.rows += [row] * len(ids)
        self.ids += ids

    def index(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor(self.rows, device=device), torch.tensor(self.ids, device=device)


Index = tuple[torch.Tensor, torch.Tensor]
"""Rows and token ids, int64 [n] each, of the logits an edit touches. No pair comes twice, but for forbidden tokens."""


@dataclass(frozen=True)
class Penalties:
    """Seen tokens, how often each was sampled (float32 [n]), and its row's penalties (float32 [n])."""

    index: Index
    counts: torch.Tensor
    repetition: torch.Tensor
    frequency: torch.Tensor
    presence: torch.Tensor

    def apply(self, logits: torch.Tensor) -> None:
        """Repetition divides positive logits and multiplies negative ones (Keskar et al., arXiv:1909.05858), over
        prompt and output; frequency and presence subtract (OpenAI's API reference), over the output."""
        values = logits[self.index]
        values = torch.where(values > 0, values / self.repetition, values * self.repetition)
        values -= self.frequency * self.counts
        values -= self.presence * (self.counts > 0)
        logits[self.index] = values


@dataclass(frozen=True)
class LogitEdits:
    """Edits of a step's rows; None where no row has one. `allowed_rows` are the rows that allow a list of ids alone."""

    bias: tuple[Index, torch.Tensor] | None
    penalties: Penalties | None
    allowed: Index | None
    allowed_rows: torch.Tensor | None
    forbidden: Index | None

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """A changed copy of float32 logits [rows, vocabulary]: bias, penalties, then -inf for what may not be sampled.

        The order gives what vLLM's does, where ids are forbidden first: an -inf survives bias and penalties.
        """
        logits = logits.clone()
        if self.bias is not None:
            index, values = self.bias
            logits[index] += values
        if self.penalties is not None:
            self.penalties.apply(logits)
        if self.allowed is not None and self.allowed_rows is not None:
            kept = logits[self.allowed]
            logits[self.allowed_rows] = -torch.inf
            logits[self.allowed] = kept
        if self.forbidden is not None:
            logits[self.forbidden] = -torch.inf
        return logits


def logit_edits(rows: Sequence[SampledRow], device: torch.device) -> LogitEdits | None:
    """Edits of rows, or None for rows without any."""
    bias, allowed, forbidden = _Pairs(), _Pairs(), _Pairs()
    for number, row in enumerate(rows):
        for token, value in row.sampling.logit_bias:
            bias.add(number, [token])
            bias.values.append(value)
        if row.sampling.allowed_ids is not None:
            allowed.add(number, row.sampling.allowed_ids)
        forbidden.add(number, _forbidden_ids(row))
    penalties = _penalties(rows, device)
    if not (bias.rows or allowed.rows or forbidden.rows or penalties):
        return None
    return LogitEdits(
        bias=(bias.index(device), torch.tensor(bias.values, device=device)) if bias.rows else None,
        penalties=penalties,
        allowed=allowed.index(device) if allowed.rows else None,
        allowed_rows=torch.tensor(sorted(set(allowed.rows)), device=device) if allowed.rows else None,
        forbidden=forbidden.index(device) if forbidden.rows else None,
    )


def _forbidden_ids(row: SampledRow) -> list[int]:
    """Banned ids, the last ids of bad words whose others were just sampled, and stop ids before min_tokens."""
    sampling, num_output = row.sampling, row.position - row.num_prompt
    ids = list(sampling.banned_ids)
    for word in sampling.bad_words:
        before = len(word) - 1
        if before <= num_output and list(row.tokens[row.position - before : row.position]) == word[:-1]:
            ids.append(word[-1])
    if num_output < sampling.min_tokens:
        ids += sampling.stop_ids
    return ids


def drawn_plainly(row: SampledRow) -> bool:
    """Whether a row's token comes of the raw logits by temperature, filters and noise, with nothing else to be done or
    told."""
    sampling = row.sampling
    edited = sampling.logit_bias or sampling.allowed_ids is not None or sampling.masked or has_penalties(sampling)
    listed = sampling.processors or sampling.bad_words or _forbidden_ids(row)
    return not (edited or sampling.logprobs >= 0 or listed)


def has_penalties(sampling: SamplingRow) -> bool:
    """Whether a sequence's tokens have to be counted."""
    return bool(sampling.presence_penalty or sampling.frequency_penalty) or sampling.repetition_penalty != 1


def _penalties(rows: Sequence[SampledRow], device: torch.device) -> Penalties | None:
    concerned = [number for number, row in enumerate(rows) if has_penalties(row.sampling)]
    if not concerned:
        return None
    entries = [_seen(rows[number]) for number in concerned]
    lengths = [len(ids) for ids, _ in entries]

    def spread(values: Sequence[float], dtype: type) -> torch.Tensor:
        return torch.from_numpy(np.repeat(np.array(values, dtype=dtype), lengths)).to(device)

    sampling = [rows[number].sampling for number in concerned]
    return Penalties(
        index=(
            spread(concerned, np.int64),
            torch.from_numpy(np.concatenate([ids for ids, _ in entries])).to(device),
        ),
        counts=torch.from_numpy(np.concatenate([counts for _, counts in entries])).to(device, torch.float32),
        repetition=spread([each.repetition_penalty for each in sampling], np.float32),
        frequency=spread([each.frequency_penalty for each in sampling], np.float32),
        presence=spread([each.presence_penalty for each in sampling], np.float32),
    )


def _seen(row: SampledRow) -> tuple[np.ndarray, np.ndarray]:
    seen = row.seen if row.seen is not None else SeenTokens(row.tokens[: row.num_prompt])
    if seen.length > row.position:
        raise RuntimeError(f"{seen.length} tokens counted for a token at position {row.position}")
    return seen.entries(row.tokens[seen.length : row.position])
