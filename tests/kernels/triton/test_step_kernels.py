"""The kernels around a step, against the same in plain Python, over steps that follow each other."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from tests.seeds import SEED
from tokenspeed.kernels.triton.mailbox import Mailbox, header_words, write_header
from tokenspeed.kernels.triton.sampling_state import PENALIZED, SEEN_IN_PROMPT, Field, SamplingState
from tokenspeed.kernels.triton.step import SlotLengths, count_tokens, finish, prepare

VOCAB, LENGTH, SLOTS = 50, 90, 7
MOST_ROWS, WORDS, RING = SLOTS + 2, 200, 4
NOTHING = np.zeros(0, dtype=np.int32)


@dataclass
class Device:
    """A flat state of lengths and sampling parameters, and the token pool beside it."""

    flat: torch.Tensor = field(
        default_factory=lambda: torch.zeros(2 * SLOTS + SamplingState.size(SLOTS), dtype=torch.int32)
    )
    pool: torch.Tensor = field(default_factory=lambda: torch.full((SLOTS, LENGTH), -5, dtype=torch.int32))

    @property
    def lengths(self) -> SlotLengths:
        return SlotLengths(self.flat[:SLOTS], self.flat[SLOTS : 2 * SLOTS], self.pool)

    @property
    def state(self) -> SamplingState:
        return SamplingState.over(self.flat[2 * SLOTS :], SLOTS)


@dataclass
class Post:
    """The host's side of a mailbox whose next step has `number`; what lies in slots of no concern is random."""

    rng: random.Random
    number: int = 1
    words: int = WORDS
    mailbox: Mailbox = field(init=False)

    def __post_init__(self) -> None:
        headers = torch.tensor([self.rng.randrange(1, 99) for _ in range(RING * self.words)], dtype=torch.int32)
        results = torch.full((RING, MOST_ROWS), self.number, dtype=torch.int64)
        self.mailbox = Mailbox.over(headers.view(RING, self.words), results, torch.device("cpu"))
        self.mailbox.turn.fill_(self.number - 1)

    def write(self, rows: list[tuple[int, int, int, int]], pairs: dict[int, int] | None = None) -> Mailbox:
        pairs = pairs or {}
        indices, values = np.array(list(pairs), dtype=np.int32), np.array(list(pairs.values()), dtype=np.int32)
        write_header(self.mailbox.headers[self.number % RING].numpy(), rows, indices, values)
        return self.mailbox

    def answer(self, rows: int) -> list[int]:
        """The tokens of the step written last, from words that must have its number; other slots stay as they were."""
        before = self.mailbox.results.clone()
        before[self.number % RING, :rows] = self.mailbox.results[self.number % RING, :rows]
        assert torch.equal(before, self.mailbox.results)
        pairs = self.mailbox.results.view(torch.int32).view(RING, MOST_ROWS, 2)[self.number % RING, :rows]
        number = (self.number + 2**31) % 2**32 - 2**31
        assert pairs[:, 1].tolist() == [number] * rows
        self.number += 1
        assert self.mailbox.turn.tolist() == [number]
        return pairs[:, 0].tolist()


def with_tokens(rng: random.Random) -> tuple[Device, list[list[int]]]:
    device = Device()
    tokens = [[rng.randrange(VOCAB) for _ in range(rng.randrange(1, 40))] for _ in range(SLOTS)]
    for slot, known in enumerate(tokens):
        device.pool[slot, : len(known)] = torch.tensor(known)
    return device, tokens


@pytest.mark.parametrize("seed, first_number", [(SEED, 1), (SEED + 1, 2**31 - 2)], ids=["first", "numbers wrap"])
def test_steps_that_follow_each_other(seed: int, first_number: int) -> None:
    """Random rows each step; lengths and new parameters come in as pairs of the first."""
    rng = random.Random(seed)
    post = Post(rng, first_number)
    device, tokens = with_tokens(rng)
    computed = [rng.randrange(len(known)) for known in tokens]
    pairs = {slot: computed[slot] for slot in range(SLOTS)} | {SLOTS + slot: len(tokens[slot]) for slot in range(SLOTS)}
    for _ in range(4):
        chosen = rng.sample(range(SLOTS), rng.randrange(1, SLOTS + 1))
        rows, offset = [], 0
        for slot in chosen:
            most = rng.randrange(1, 45)
            rows.append((slot, most, offset, computed[slot] + rng.choice((0, 3, 99))))
            offset += most
        bucket, max_rows = offset + rng.randrange(70), SLOTS + rng.randrange(3)
        inputs = prepare(post.write(rows, pairs), device.flat, device.lengths, bucket, max_rows)
        pairs = {}
        drawn = torch.tensor([rng.randrange(VOCAB) for _ in range(max_rows)], dtype=torch.int32)
        expected_tokens, positions, slots = [0] * bucket, [0] * bucket, [-1] * bucket
        result = []
        for number, (slot, most, first, reserved) in enumerate(rows):
            start, known = computed[slot], tokens[slot]
            count = max(0, min(most, len(known) - start, reserved - start))
            ends = count > 0 and start + count == len(known)
            for i in range(count):
                expected_tokens[first + i], positions[first + i], slots[first + i] = known[start + i], start + i, slot
            assert [inputs.row_starts[number].item(), inputs.row_firsts[number].item()] == [first, start]
            assert inputs.sample_rows[number] == (first + count - 1 if ends else -1)
            assert inputs.sample_slots[number] == (slot if ends else -1)
            assert inputs.sample_positions[number] == (len(known) if ends else 0)
            computed[slot] += count
            if ends:
                known.append(int(drawn[number]))
            result.append(known[-1] if ends else -1)
        assert inputs.tokens.tolist() == expected_tokens
        assert inputs.positions.tolist() == positions
        assert inputs.slots.tolist() == slots
        assert inputs.sample_rows[len(rows) :].tolist() == [-1] * (max_rows - len(rows))
        assert inputs.row_slots.tolist() == chosen + [-1] * (max_rows - len(rows))
        finish(drawn, inputs, device.lengths, device.state, post.mailbox)
        assert post.answer(max_rows) == result + [-1] * (max_rows - len(rows))
        assert device.lengths.num_computed.tolist() == computed
        assert device.lengths.num_tokens.tolist() == [len(known) for known in tokens]
        assert [device.pool[slot, : len(known)].tolist() for slot, known in enumerate(tokens)] == tokens
        assert all(bool((device.pool[slot, len(known) :] == -5).all()) for slot, known in enumerate(tokens))


def test_pairs_land_where_they_say_and_nowhere_else() -> None:
    rng = random.Random(SEED)
    size = 2 * SLOTS + SamplingState.size(SLOTS)
    beyond = torch.zeros(size + 1, dtype=torch.int32)
    device = Device(beyond[:size])
    indices = rng.sample(range(size), 3000)
    values = [rng.randrange(-(2**31), 2**31) for _ in indices]
    post = Post(rng, words=header_words(0, 3002))
    mailbox = post.write([], dict(zip([*indices, size, -1], [*values, 7, 7], strict=True)))
    pool = device.pool.clone()
    inputs = prepare(mailbox, device.flat, device.lengths, 3, 2)
    expected = torch.zeros(size, dtype=torch.int32)
    expected[indices] = torch.tensor(values, dtype=torch.int32)
    assert torch.equal(device.flat, expected)
    assert beyond[size] == 0
    assert torch.equal(device.pool, pool)
    assert inputs.slots.tolist() == [-1] * 3


def test_a_header_that_is_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match="2 rows and 0 pairs need a header of 10, it has 9"):
        write_header(np.zeros(9, np.int32), [(0, 1, 0, 1)] * 2, NOTHING, NOTHING)


@pytest.mark.parametrize("seed", [SEED])
def test_tokens_are_counted_anew_and_as_they_come(seed: int) -> None:
    rng = random.Random(seed)
    device, tokens = with_tokens(rng)
    for slot, known in enumerate(tokens):
        device.lengths.num_tokens[slot] = len(known)
        device.lengths.num_computed[slot] = len(known) - 1
    state = device.state.with_counts(VOCAB)
    assert state.counts is not None
    state.counts.fill_(9)
    counted, prompts = [2, 5], [rng.randrange(len(tokens[2]) + 1), rng.randrange(len(tokens[5]) + 1)]
    state.params[Field.FLAGS, 2] = PENALIZED
    count_tokens(
        torch.tensor(counted, dtype=torch.int32), torch.tensor(prompts, dtype=torch.int32), device.lengths, state.counts
    )
    rows = [(slot, 1, number, 99) for number, slot in enumerate([5, 2, 0])]
    post = Post(rng)
    inputs = prepare(post.write(rows), device.flat, device.lengths, 3, 3)
    drawn = torch.tensor([tokens[2][0], tokens[2][0], 4], dtype=torch.int32)
    finish(drawn, inputs, device.lengths, state, post.mailbox)
    for slot, prompt in zip(counted, prompts, strict=True):
        more = [tokens[2][0]] if slot == 2 else []
        sampled = Counter(tokens[slot][prompt:] + more)
        expected = [sampled[v] + SEEN_IN_PROMPT * (v in tokens[slot][:prompt]) for v in range(VOCAB)]
        assert state.counts[slot].tolist() == expected
    assert bool((state.counts[[0, 1, 3, 4, 6]] == 9).all())
