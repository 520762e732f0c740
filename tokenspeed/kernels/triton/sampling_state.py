"""What the device knows of each slot's sampling: int32 tensors that may be views of one flat state tensor.

A request's entries are plain (index, value) pairs, so that a step's delta can scatter them. Floats travel as bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

import numpy as np
import torch

from tokenspeed.contracts.step import SamplingRow

LIST_CAPACITY = 64
"""Most entries of each list of ids that a slot holds."""
WORD_CAPACITY, WORD_LENGTH = 16, 8
"""Most bad words of a slot, and most tokens of one."""
MAX_TOP = 64
"""Most alternatives whose log-probabilities are reported."""
SEEN_IN_PROMPT = 2**30
"""The bit of a count that says the token is in the prompt; the bits below count how often it was sampled."""
EDITED, PENALIZED, MASKED = 1, 2, 4
"""Bits of Field.FLAGS."""


class Field(IntEnum):
    """Rows of `SamplingState.params`; those with a float hold its float32 bits.

    MIN_POSITION: stop ids are forbidden at positions below it. NUM_ALLOWED, NUM_TOP: -1 for none.
    """

    FLAGS = 0
    TEMPERATURE = 1
    TOP_K = 2
    TOP_P = 3
    LOG_MIN_P = 4
    SEED_LOW = 5
    SEED_HIGH = 6
    SAMPLE_INDEX = 7
    REPETITION = 8
    FREQUENCY = 9
    PRESENCE = 10
    NUM_PROMPT = 11
    MIN_POSITION = 12
    NUM_BIAS = 13
    NUM_ALLOWED = 14
    NUM_BANNED = 15
    NUM_STOP = 16
    NUM_WORDS = 17
    NUM_TOP = 18


class List(IntEnum):
    """Lists of `SamplingState.lists`; BIAS_VALUES holds float32 bits."""

    BIAS_IDS = 0
    BIAS_VALUES = 1
    ALLOWED = 2
    BANNED = 3
    STOP = 4


@dataclass(frozen=True)
class SamplingState:
    """Sampling parameters of all slots, on the device.

    params: int32 [fields, slots]. lists: int32 [slots, lists, LIST_CAPACITY]. words: int32 [slots, WORD_CAPACITY,
    WORD_LENGTH], bad words against the right edge, -1 before them. counts: int32 [slots, vocabulary], see
    SEEN_IN_PROMPT; None while no request has penalties.
    """

    params: torch.Tensor
    lists: torch.Tensor
    words: torch.Tensor
    counts: torch.Tensor | None = None

    @staticmethod
    def size(slots: int) -> int:
        """Elements of a flat tensor that `over` needs."""
        return slots * (len(Field) + len(List) * LIST_CAPACITY + WORD_CAPACITY * WORD_LENGTH)

    @staticmethod
    def over(flat: torch.Tensor, slots: int) -> SamplingState:
        """Views of the first `size(slots)` elements of a flat int32 tensor."""
        sizes = (slots * len(Field), slots * len(List) * LIST_CAPACITY, slots * WORD_CAPACITY * WORD_LENGTH)
        params, lists, words = flat[: sum(sizes)].split(sizes)
        return SamplingState(
            params.view(len(Field), slots),
            lists.view(slots, len(List), LIST_CAPACITY),
            words.view(slots, WORD_CAPACITY, WORD_LENGTH),
        )

    def with_counts(self, vocab_size: int) -> SamplingState:
        """With room for counts, all zero."""
        if self.counts is not None:
            return self
        shape = (self.params.shape[1], vocab_size)
        return replace(self, counts=torch.zeros(shape, dtype=torch.int32, device=self.params.device))


def excess(sampling: SamplingRow) -> str | None:
    """What of a request exceeds a slot's capacity, as a text for people; None where all of it fits."""
    lists = {
        "logit_bias": sampling.logit_bias,
        "allowed_token_ids": sampling.allowed_ids or (),
        "banned_token_ids": sampling.banned_ids,
        "stop ids before min_tokens": sampling.stop_ids,
    }
    for name, ids in lists.items():
        if len(ids) > LIST_CAPACITY:
            return f"{len(ids)} {name}, {LIST_CAPACITY} fit"
    if len(sampling.bad_words) > WORD_CAPACITY:
        return f"{len(sampling.bad_words)} bad words, {WORD_CAPACITY} fit"
    longest = max(map(len, sampling.bad_words), default=0)
    return f"a bad word of {longest} tokens, {WORD_LENGTH} fit" if longest > WORD_LENGTH else None


def slot_entries(slot: int, slots: int, sampling: SamplingRow, num_prompt: int) -> tuple[np.ndarray, np.ndarray]:
    """What to write for a request that enters `slot` of `slots`: indices into the flat tensor of
    `SamplingState.over`, and values, int32 [n] each. The request must fit (see `excess`)."""
    pairs = [
        *_params(slot, slots, sampling, num_prompt),
        *_lists(slot, slots, sampling),
        *_words(slot, slots, sampling),
    ]
    indices, values = np.array(pairs, dtype=np.int64).T
    return indices.astype(np.int32), values.astype(np.uint32).view(np.int32)


def is_edited(sampling: SamplingRow) -> bool:
    """Whether a request's logits are changed before they are scaled: its steps need `sample(..., edits=True)`."""
    lists = (
        sampling.logit_bias or sampling.banned_ids or sampling.bad_words or (sampling.min_tokens and sampling.stop_ids)
    )
    return bool(lists) or sampling.allowed_ids is not None or sampling.masked or _is_penalized(sampling)


def _is_penalized(sampling: SamplingRow) -> bool:
    return bool(sampling.presence_penalty or sampling.frequency_penalty) or sampling.repetition_penalty != 1


def _bits(value: float) -> int:
    return int(np.float32(value).view(np.int32))


Pairs = Iterator[tuple[int, int]]


def _params(slot: int, slots: int, sampling: SamplingRow, num_prompt: int) -> Pairs:
    flags = EDITED * is_edited(sampling) | PENALIZED * _is_penalized(sampling) | MASKED * sampling.masked
    allowed = sampling.allowed_ids
    values = {
        Field.FLAGS: flags,
        Field.TEMPERATURE: _bits(sampling.temperature),
        Field.TOP_K: sampling.top_k,
        Field.TOP_P: _bits(sampling.top_p),
        Field.LOG_MIN_P: _bits(math.log(sampling.min_p) if sampling.min_p else -math.inf),
        Field.SEED_LOW: sampling.seed & 0xFFFFFFFF,
        Field.SEED_HIGH: sampling.seed >> 32 & 0xFFFFFFFF,
        Field.SAMPLE_INDEX: sampling.sample_index & 0xFFFFFFFF,
        Field.REPETITION: _bits(sampling.repetition_penalty),
        Field.FREQUENCY: _bits(sampling.frequency_penalty),
        Field.PRESENCE: _bits(sampling.presence_penalty),
        Field.NUM_PROMPT: num_prompt,
        Field.MIN_POSITION: min(num_prompt + sampling.min_tokens, 2**31 - 1),
        Field.NUM_BIAS: len(sampling.logit_bias),
        Field.NUM_ALLOWED: -1 if allowed is None else len(allowed),
        Field.NUM_BANNED: len(sampling.banned_ids),
        Field.NUM_STOP: len(sampling.stop_ids),
        Field.NUM_WORDS: len(sampling.bad_words),
        Field.NUM_TOP: sampling.logprobs,
    }
    for field, value in values.items():
        yield field * slots + slot, value & 0xFFFFFFFF


def _lists(slot: int, slots: int, sampling: SamplingRow) -> Pairs:
    lists: dict[List, Sequence[int]] = {
        List.BIAS_IDS: [token for token, _ in sampling.logit_bias],
        List.BIAS_VALUES: [_bits(value) & 0xFFFFFFFF for _, value in sampling.logit_bias],
        List.ALLOWED: sampling.allowed_ids or (),
        List.BANNED: sampling.banned_ids,
        List.STOP: sampling.stop_ids,
    }
    for which, values in lists.items():
        first = slots * len(Field) + (slot * len(List) + which) * LIST_CAPACITY
        yield from zip(range(first, first + LIST_CAPACITY), values, strict=False)


def _words(slot: int, slots: int, sampling: SamplingRow) -> Pairs:
    first = slots * (len(Field) + len(List) * LIST_CAPACITY) + slot * WORD_CAPACITY * WORD_LENGTH
    for number, word in enumerate(sampling.bad_words):
        padded = [0xFFFFFFFF] * (WORD_LENGTH - len(word)) + list(word)
        yield from zip(range(first + number * WORD_LENGTH, first + (number + 1) * WORD_LENGTH), padded, strict=True)
