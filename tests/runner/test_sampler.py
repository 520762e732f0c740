"""The sampler against a plain reference, for every field alone and in random combinations, and what batches must not
change."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import msgspec
import pytest
import torch

from tests.runner.sampler_reference import reference_tokens
from tests.seeds import SEED
from tokenspeed.contracts.step import SamplingRow
from tokenspeed.runner.edits import SampledRow, SeenTokens, has_penalties
from tokenspeed.runner.sampler import sample, sampler_inputs

CPU = torch.device("cpu")
VOCAB = 331
NUM_PROMPT = 7
PLAIN: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
FIELDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "greedy": {"temperature": 0.0},
    "cold": {"temperature": 0.3},
    "hot": {"temperature": 2.5},
    "top_k": {"top_k": 5},
    "top_k 1": {"top_k": 1},
    "top_k above the vocabulary": {"top_k": 5000},
    "top_k that leaves few out": {"top_k": VOCAB - 3},
    "top_p": {"top_p": 0.6},
    "top_p near 1": {"top_p": 0.999},
    "top_p tiny": {"top_p": 1e-6},
    "min_p": {"min_p": 0.2},
    "min_p 1": {"min_p": 1.0},
    "presence": {"presence_penalty": 2.0},
    "negative presence": {"presence_penalty": -2.0},
    "frequency": {"frequency_penalty": 1.5},
    "repetition": {"repetition_penalty": 3.0},
    "repetition below 1": {"repetition_penalty": 0.4},
    "bias": {"logit_bias": [(3, 5.0), (200, -4.0), (330, 6.0)]},
    "greedy bias": {"temperature": 0.0, "logit_bias": [(17, 100.0)]},
    "allowed": {"allowed_ids": [2, 64, 65, 330]},
    "banned": {"banned_ids": list(range(0, VOCAB, 2))},
    "allowed and banned": {"allowed_ids": [2, 64, 65], "banned_ids": [64]},
    "bad words": {"bad_words": [[a, b] for a in range(9) for b in range(0, VOCAB, 2)] + [[1, 2, 3], [200]]},
    "greedy bad words": {"temperature": 0.0, "bad_words": [[a, b] for a in range(9) for b in range(1, VOCAB, 2)]},
    "min_tokens": {"min_tokens": 100, "stop_ids": list(range(300))},
    "min_tokens reached": {"min_tokens": 1, "stop_ids": list(range(300))},
    "seed": {"seed": 2**64 - 1},
    "negative seed": {"seed": -12345},
    "sample index": {"sample_index": 3},
}


def sampling(**fields: Any) -> SamplingRow:
    return SamplingRow(**{**PLAIN, "seed": 9, **fields})


def peaked(seed: int, rows: int, vocab: int = VOCAB) -> torch.Tensor:
    """Logits with a few large ones among many small, positive and negative."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, vocab, generator=generator) * 3


def history(rng: random.Random, vocab: int, params: SamplingRow, length: int | None = None) -> SampledRow:
    """A row after a prompt and some sampled tokens with repetitions."""
    length = NUM_PROMPT + rng.randrange(1, 12) if length is None else length
    tokens = [rng.choice((rng.randrange(vocab), rng.randrange(min(vocab, 9)))) for _ in range(length + 5)]
    return SampledRow(params, tokens, NUM_PROMPT, length)


def tokens_of(logits: torch.Tensor, rows: list[SampledRow], mask: torch.Tensor | None = None) -> list[int]:
    """The sampler's tokens, by both of its ways, which must agree; the logits stay as they were."""
    inputs, before = sampler_inputs(rows, logits.shape[1], CPU), logits.clone()
    found = sample(logits, inputs, mask).tokens
    assert found.tolist() == sample(logits, inputs, mask, narrow=False).tokens.tolist()
    assert torch.equal(logits, before)
    return [int(token) for token in found]


def check(logits: torch.Tensor, rows: list[SampledRow], mask: torch.Tensor | None = None) -> list[int]:
    found = tokens_of(logits, rows, mask)
    for at, (row, token) in enumerate(zip(rows, found, strict=True)):
        allowed = None if mask is None else mask[at].tolist()
        expected = reference_tokens(
            logits[at].double().tolist(), row.sampling, row.tokens, row.num_prompt, row.position, allowed
        )
        assert token in expected, (at, row)
    return found


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("seed", [SEED])
def test_each_field_alone_equals_the_reference(name: str, seed: int) -> None:
    rng = random.Random(seed)
    rows = [history(rng, VOCAB, sampling(**FIELDS[name])) for _ in range(24)]
    assert len(set(check(peaked(seed % 2**31, 24), rows))) > 1 or name == "greedy bias"


@pytest.mark.parametrize("temperature", [0.5, 1.9])
@pytest.mark.parametrize(
    "fields", [{"top_k": 5}, {"top_k": 64}, {"top_p": 0.5}, {"min_p": 0.8}, {"min_p": 0.7, "top_k": 9}]
)
@pytest.mark.parametrize("seed", [SEED])
def test_filters_keep_exactly_what_the_reference_keeps(fields: dict[str, Any], temperature: float, seed: int) -> None:
    """Logits so flat that every token that is kept is drawn now and then."""
    logits = peaked(seed % 2**31, 1, 67) / 20
    rows = [SampledRow(sampling(temperature=temperature, **fields), [0] * p, 1, p) for p in range(1, 301)]
    drawn = tokens_of(logits.expand(300, -1).contiguous(), rows)
    for row, token in zip(rows, drawn, strict=True):
        assert token in reference_tokens(logits[0].double().tolist(), row.sampling, row.tokens, 1, row.position)


def random_sampling(rng: random.Random, vocab: int) -> SamplingRow:
    def some(value: Any, default: Any) -> Any:
        return value if rng.random() < 0.4 else default

    ids = list(range(vocab))
    return SamplingRow(
        temperature=rng.choice((0.0, 0.2, 0.7, 1.0, 1.8)),
        top_k=some(rng.choice((1, 2, 5, vocab // 2 + 1, 2 * vocab)), 0),
        top_p=some(rng.uniform(0.01, 1), 1.0),
        seed=rng.getrandbits(64),
        sample_index=rng.randrange(4),
        min_p=some(rng.uniform(0, 0.5), 0.0),
        presence_penalty=some(rng.uniform(-2, 2), 0.0),
        frequency_penalty=some(rng.uniform(-2, 2), 0.0),
        repetition_penalty=some(rng.uniform(0.3, 2), 1.0),
        min_tokens=some(rng.randrange(20), 0),
        stop_ids=rng.sample(ids, vocab // 3),
        logit_bias=some([(v, rng.uniform(-9, 9)) for v in rng.sample(ids, min(vocab, 5))], []),
        allowed_ids=some(rng.sample(ids, max(1, vocab // 2)), None),
        banned_ids=some(rng.sample(ids, vocab // 4), []),
        bad_words=some([[rng.randrange(min(vocab, 9)) for _ in range(2)] for _ in range(9)], []),
    )


@pytest.mark.parametrize("vocab", [1, 3, 64, 65, 331, 1500])
@pytest.mark.parametrize("seed", [SEED, SEED + 1])
def test_random_combinations_equal_the_reference(vocab: int, seed: int) -> None:
    """Mixed in one batch, with and without a mask; rows that allow nothing are left out."""
    rng = random.Random(seed * 10_000 + vocab)
    rows: list[SampledRow] = []
    masks: list[torch.Tensor] = []
    logits = peaked(rng.getrandbits(31), 24, vocab)
    while len(rows) < 24:
        row = history(rng, vocab, random_sampling(rng, vocab))
        mask = torch.tensor([rng.random() < 0.8 for _ in range(vocab)])
        forbidden = {*row.sampling.banned_ids, *row.sampling.stop_ids, *(w[-1] for w in row.sampling.bad_words)}
        allowed = set(range(vocab)) if row.sampling.allowed_ids is None else set(row.sampling.allowed_ids)
        if (allowed - forbidden) & set(mask.nonzero().flatten().tolist()) or vocab == 1:
            rows.append(row)
            masks.append(mask)
    if vocab == 1:
        assert tokens_of(logits, rows) == [0] * 24
        return
    check(logits, rows)
    check(logits, rows, torch.stack(masks))


@pytest.mark.parametrize("seed", [SEED])
def test_top_p_alone_over_a_flat_vocabulary(seed: int) -> None:
    """Past the tokens that are looked at first; ties by the thousand."""
    vocab = 20_001
    generator = torch.Generator().manual_seed(seed % 2**31)
    logits = (torch.randn(3, vocab, generator=generator) * 4).round() / 8
    rows = [
        SampledRow(sampling(top_p=top_p, top_k=top_k), [1], 1, 1) for top_p, top_k in [(0.9, 0), (0.97, 0), (0.5, 9)]
    ]
    check(logits, rows)


def test_ties_with_the_last_kept_token_stay_and_the_lowest_id_wins() -> None:
    logits = torch.full((1, 200), -5.0)
    logits[0, [3, 70, 71, 130]] = torch.tensor([1.0, 2.0, 2.0, 2.0])
    for fields in ({"top_k": 1}, {"top_p": 0.3}, {"top_k": 2, "top_p": 0.01}, {"min_p": 1.0}):
        rows = [SampledRow(sampling(**fields), [0] * p, 1, p) for p in range(1, 80)]
        assert set(tokens_of(logits.expand(79, -1).contiguous(), rows)) == {70, 71, 130}
    assert tokens_of(logits, [SampledRow(sampling(temperature=0.0), [0], 1, 1)]) == [70]


def test_a_row_that_allows_nothing_gives_token_zero() -> None:
    logits = peaked(1, 3)
    kinds = [{"temperature": 0.0}, {"top_k": 4, "top_p": 0.5}, {}]
    rows = [SampledRow(sampling(**kind), [1], 1, 1) for kind in kinds]
    assert tokens_of(logits, rows, torch.zeros(3, VOCAB, dtype=torch.bool)) == [0, 0, 0]


@pytest.mark.parametrize("seed", [SEED])
def test_batch_and_order_change_nothing(seed: int) -> None:
    """Each row alone, in a batch, and in the batch shuffled, among rows of every kind."""
    rng = random.Random(seed)
    vocab, count = 3001, 40
    logits = peaked(seed % 2**31, count, vocab)
    rows = [history(rng, vocab, random_sampling(rng, vocab)) for _ in range(count)]
    together = tokens_of(logits, rows)
    assert [tokens_of(logits[i : i + 1], [rows[i]])[0] for i in range(count)] == together
    order = rng.sample(range(count), count)
    assert tokens_of(logits[order], [rows[i] for i in order]) == [together[i] for i in order]
    part = order[: count // 3]
    assert tokens_of(logits[part], [rows[i] for i in part]) == [together[i] for i in part]


@pytest.mark.parametrize("seed", [SEED])
def test_rows_of_one_sequence_equal_single_steps(seed: int) -> None:
    """Four rows at positions p .. p + 3 see the drafts before them, in penalties, bad words and min_tokens."""
    rng = random.Random(seed)
    for trial in range(12):
        params = msgspec.structs.replace(
            random_sampling(rng, VOCAB), repetition_penalty=1.7, frequency_penalty=0.9, presence_penalty=0.5
        )
        first = history(rng, VOCAB, params)
        logits = peaked(seed % 2**31 + trial, 4)
        logits[1:] = logits[0]
        seen = SeenTokens(first.tokens[:NUM_PROMPT])
        seen.extend(first.tokens[NUM_PROMPT : first.position])
        rows = [replace(first, position=first.position + r, seen=seen) for r in range(4)]
        together = tokens_of(logits, rows)
        alone = [tokens_of(logits[:1], [replace(row, seen=None)])[0] for row in rows]
        assert together == alone
        if params.allowed_ids is None and not params.bad_words and not params.banned_ids:
            check(logits, rows)


def test_key_decides() -> None:
    logits = torch.zeros(1, 1003)

    def token(position: int = 3, **fields: int) -> int:
        return tokens_of(logits, [SampledRow(sampling(**fields), [0] * position, 1, position)])[0]

    assert token(seed=5) == token(seed=5)
    drawn = [token(), token(seed=10), token(seed=9 + 2**32), token(position=4), token(sample_index=1)]
    assert len(set(drawn)) == len(drawn)


@pytest.mark.parametrize("vocab", [31, 32, 77])
def test_bitmask_equals_bool_mask(vocab: int) -> None:
    generator = torch.Generator().manual_seed(SEED % 2**31)
    mask = torch.rand(6, vocab, generator=generator) < 0.3
    mask[:, 7] = True
    padded = torch.nn.functional.pad(mask, (0, -vocab % 32)).unflatten(1, (-1, 32)).long()
    words = (padded << torch.arange(32)).sum(-1).to(torch.int32)
    logits = peaked(SEED % 2**31, 6, vocab)
    rows = [SampledRow(sampling(temperature=r % 2), [0] * (r + 1), 1, r + 1) for r in range(6)]
    found = tokens_of(logits, rows, words)
    assert found == tokens_of(logits, rows, mask)
    assert all(mask[r, token] for r, token in enumerate(found))


def test_seen_tokens_count_prompt_and_output_apart() -> None:
    seen = SeenTokens([5, 6, 5])
    seen.extend([6, 7, 7])
    assert seen.length == 6

    def counts(*more: int) -> dict[int, int]:
        return dict(zip(*(part.tolist() for part in seen.entries(more)), strict=True))

    assert counts() == {5: 0, 6: 1, 7: 2}
    assert counts(9, 5, 9) == {5: 1, 6: 1, 7: 2, 9: 2}
    assert counts() == {5: 0, 6: 1, 7: 2}
    row = SampledRow(sampling(presence_penalty=1.0), [5, 6, 5, 6], 3, 4, seen)
    with pytest.raises(RuntimeError, match="6 tokens counted"):
        sampler_inputs([row], 10, CPU)
    assert has_penalties(row.sampling)
    assert not has_penalties(sampling())


def test_greedy_rows_pay_for_no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("noise for a greedy row")

    monkeypatch.setattr("tokenspeed.runner.draw.gumbel", refuse)
    logits = peaked(2, 5)
    rows = [SampledRow(sampling(temperature=0.0), [1], 1, 1)] * 5
    assert tokens_of(logits, rows) == logits.argmax(-1).tolist()
    with pytest.raises(AssertionError, match="greedy"):
        tokens_of(logits, [*rows[:4], SampledRow(sampling(), [1], 1, 1)])
