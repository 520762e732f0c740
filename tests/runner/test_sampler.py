"""The sampler: known Philox words, the distribution, filters, and that a token depends on its key and logits alone."""

from __future__ import annotations

import math

import pytest
import torch

from tokenspeed.contracts.step import SamplingRow
from tokenspeed.runner.sampler import (
    Wanted,
    gumbel,
    keep_top_k,
    keep_top_p,
    philox,
    sample_row,
    token_logprobs,
)

CPU = torch.device("cpu")


def test_philox_known_answer() -> None:
    """Counter and key zero, from the known answers of the Random123 library."""
    assert philox(0, 0, 0, 4, CPU).tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("seed", [1, 2**63 + 12345, 2**64 - 1])
def test_philox_equals_plain_integer_arithmetic(seed: int) -> None:
    assert philox(seed, 3, 2**31 + 5, 23, CPU).tolist() == [plain_philox(seed, 3, 2**31 + 5, v) for v in range(23)]


def plain_philox(seed: int, sample: int, position: int, token: int) -> int:
    mask = 2**32 - 1
    c, k = [token // 4, position & mask, sample, 0], [seed & mask, seed >> 32]
    for _ in range(10):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & mask, (p0 >> 32) ^ c[3] ^ k[1], p0 & mask]
        k = [(k[0] + 0x9E3779B9) & mask, (k[1] + 0xBB67AE85) & mask]
    return c[token % 4]


def test_gumbel_is_finite_and_has_its_moments() -> None:
    noise = torch.cat([gumbel(seed, 0, 7, 100_000, CPU) for seed in range(5)]).double()
    assert noise.isfinite().all()
    assert abs(noise.mean() - 0.5772156649) < 0.01
    assert abs(noise.var() - math.pi**2 / 6) < 0.02


def row(temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0) -> SamplingRow:
    return SamplingRow(temperature, top_k, top_p, seed)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, 8),
        ({"temperature": 0.5}, 8),
        ({"top_k": 3}, 3),
        ({"top_p": 0.7}, None),
        ({"temperature": 1.7, "top_k": 5, "top_p": 0.8}, None),
    ],
)
def test_distribution_by_chi_square(settings: dict[str, float], kept: int | None) -> None:
    """4,000 draws over eight tokens; the statistic stays under the 0.9999 quantile of its distribution."""
    logits = torch.tensor([2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -2.0])
    expected = expected_distribution(logits, row(**settings))  # type: ignore[arg-type]
    if kept is not None:
        assert int((expected > 0).sum()) == kept
    draws = 4000
    counts = torch.zeros(8, dtype=torch.float64)
    for position in range(draws):
        counts[sample_row(logits, row(seed=99, **settings), position)] += 1  # type: ignore[arg-type]
    possible = expected > 0
    assert counts[~possible].sum() == 0
    statistic = ((counts - draws * expected)[possible].square() / (draws * expected[possible])).sum()
    quantile = {1: 15.1, 2: 18.4, 3: 21.1, 4: 23.5, 5: 25.7, 6: 27.9, 7: 29.9}
    assert statistic < quantile[int(possible.sum()) - 1]


def expected_distribution(logits: torch.Tensor, sampling: SamplingRow) -> torch.Tensor:
    """Token by token, in plain Python."""
    weights = {i: math.exp(x / sampling.temperature) for i, x in enumerate(logits.tolist())}
    order = sorted(weights, key=lambda i: -weights[i])
    if sampling.top_k:
        order = order[: sampling.top_k]
    total, reached, chosen = sum(weights[i] for i in order), 0.0, []
    for i in order:
        if reached >= sampling.top_p:
            break
        chosen.append(i)
        reached += weights[i] / total
    probabilities = torch.zeros(len(logits), dtype=torch.float64)
    for i in chosen:
        probabilities[i] = weights[i] / sum(weights[j] for j in chosen)
    return probabilities


@pytest.mark.parametrize("vocab", [1, 7, 1003])
def test_key_decides(vocab: int) -> None:
    logits = torch.randn(vocab)
    assert sample_row(logits, row(seed=5), 3) == sample_row(logits.clone(), row(seed=5), 3)
    assert sample_row(logits, row(temperature=0.0, seed=1), 0) == int(logits.argmax())
    if vocab > 1000:
        keys = [(1, 0), (2, 0), (1, 1), (2**32 + 1, 0)]
        flat = torch.zeros(vocab)
        assert len({sample_row(flat, row(seed=seed), position) for seed, position in keys}) == len(keys)
        assert sample_row(flat, row(seed=1), 0, sample=0) != sample_row(flat, row(seed=1), 0, sample=1)


def test_top_k_one_and_tiny_top_p_are_greedy() -> None:
    for seed in range(20):
        logits = torch.randn(301, generator=torch.Generator().manual_seed(seed))
        best = int(logits.argmax())
        assert sample_row(logits, row(top_k=1, seed=seed), 0) == best
        assert sample_row(logits, row(top_p=1e-6, seed=seed), 0) == best


def test_filters_keep_ties_and_everything_at_their_limits() -> None:
    logits = torch.tensor([1.0, 3.0, 3.0, 2.0])
    assert keep_top_k(logits, 1).isfinite().tolist() == [False, True, True, False]
    assert keep_top_k(logits, 3).isfinite().tolist() == [False, True, True, True]
    assert keep_top_p(logits, 0.999999).isfinite().all()
    assert sample_row(logits, row(top_k=400, seed=1), 0) in range(4)


def test_logprobs_and_ranks() -> None:
    logits = torch.randn(3, 50)
    exact = logits.double().log_softmax(-1)
    found = token_logprobs(logits, [Wanted(2, 7, 4), Wanted(0, 49, 0), Wanted(2, int(logits[2].argmax()), 60)])
    for entry, (at, token, top) in zip(found, [(2, 7, 4), (0, 49, 0), (2, int(logits[2].argmax()), 50)], strict=True):
        assert entry.token_id == token
        assert entry.logprob == pytest.approx(float(exact[at, token]), abs=1e-5)
        assert entry.rank == int((exact[at] > exact[at, token]).sum()) + 1
        assert entry.top_ids == exact[at].argsort(descending=True)[:top].tolist()
        assert entry.top_logprobs == pytest.approx(exact[at][entry.top_ids].tolist(), abs=1e-5)
    assert found[2].rank == 1
    assert token_logprobs(logits, []) == []
