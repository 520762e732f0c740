"""Noise: known words and moments; and the distribution of what is drawn, by chi-square."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.runner.sampler_reference import edited, kept_tokens, plain_philox
from tests.seeds import SEED
from tokenspeed.contracts.step import SamplingRow
from tokenspeed.runner.edits import SampledRow
from tokenspeed.runner.noise import HIGHEST_NOISE, LOWEST_NOISE, NoiseKeys, _gumbel_of_words, gumbel, noise_keys, philox
from tokenspeed.runner.sampler import sample, sampler_inputs

CPU = torch.device("cpu")
QUANTILE = {1: 23.9, 2: 27.6, 3: 30.7, 4: 33.4, 5: 35.9, 6: 38.3, 7: 40.5}
"""0.999999 of the chi-square distribution, by degrees of freedom."""


def one_key(seed: int, sample_index: int, position: int) -> NoiseKeys:
    return noise_keys([seed], [sample_index], [position], CPU)


def test_philox_known_answer() -> None:
    """Counter and key zero, from the known answers of the Random123 library."""
    words = philox(one_key(0, 0, 0), torch.zeros(1, 1, dtype=torch.int64))
    assert words.flatten().tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("seed", [1, 2**63 + 12345, 2**64 - 1, -1])
def test_philox_equals_plain_integer_arithmetic(seed: int) -> None:
    """Rows of different keys, and blocks in any order."""
    position = 2**31 + 5
    keys = noise_keys([seed, 77], [3, 2**32 - 1], [position, 0], CPU)
    words = philox(keys, torch.tensor([[4, 0, 65535], [2**20, 1, 1]])).tolist()
    expected = [
        [[plain_philox(seed, 3, position, 4 * block + i) for i in range(4)] for block in (4, 0, 65535)],
        [[plain_philox(77, 2**32 - 1, 0, 4 * block + i) for i in range(4)] for block in (2**20, 1, 1)],
    ]
    assert words == expected


def test_philox_is_the_same_in_torch() -> None:
    """The way of devices other than the CPU."""
    from tokenspeed.runner.noise import _rounds

    keys, blocks = noise_keys([SEED, 5], [0, 1], [9, 2**20], CPU), torch.arange(50).expand(2, -1)
    words = torch.stack(_rounds(blocks, keys.positions, keys.samples, keys.round_keys), dim=-1)
    assert torch.equal(words, philox(keys, blocks))


def test_gumbel_has_its_moments_and_bounds() -> None:
    noise = torch.cat([gumbel(one_key(seed, 0, 7), torch.arange(25_000)[None]) for seed in range(5)], 1).double()
    assert noise.isfinite().all()
    assert abs(noise.mean() - 0.5772156649) < 0.01
    assert abs(noise.var() - math.pi**2 / 6) < 0.02
    ends = _gumbel_of_words(torch.tensor([0, 2**32 - 1]))
    assert HIGHEST_NOISE - 0.01 < ends[0] < HIGHEST_NOISE
    assert LOWEST_NOISE < ends[1] < LOWEST_NOISE + 0.01


@pytest.mark.parametrize("seed", [SEED])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_k": 3},
        {"top_p": 0.7},
        {"min_p": 0.15},
        {"temperature": 1.7, "top_k": 5, "top_p": 0.8},
        {"logit_bias": [(7, 3.0)], "banned_ids": [0]},
        {"repetition_penalty": 1.5, "presence_penalty": 0.5, "frequency_penalty": 0.3},
        {"allowed_ids": [1, 2, 4, 7], "min_tokens": 9, "stop_ids": [2]},
    ],
    ids=str,
)
def test_distribution_by_chi_square(fields: dict[str, Any], seed: int) -> None:
    """8,000 draws over eight tokens, at positions, seeds and sample indices in turn; the statistic stays under the
    0.999999 quantile of its distribution."""
    logits, tokens, draws = [2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -2.0], [0, 1, 1, 2], 8000
    rows = []
    for i in range(draws):
        settings = {
            "temperature": 1.0,
            "top_k": 0,
            "top_p": 1.0,
            "seed": seed + i // 2,
            "sample_index": i % 2,
            **fields,
        }
        rows.append(SampledRow(SamplingRow(**settings), [3, *tokens][i % 2 :], 2 - i % 2, 5 - i % 2))
    found = sample(torch.tensor([logits] * draws), sampler_inputs(rows, 8, CPU)).tokens
    by_history = [found[0::2], found[1::2]]
    for half, row in zip(by_history, rows, strict=False):
        counts = half.bincount(minlength=8).tolist()
        expected = distribution(logits, row)
        assert all(count == 0 for count, share in zip(counts, expected, strict=True) if share == 0)
        possible = [(c, share * len(half)) for c, share in zip(counts, expected, strict=True) if share]
        assert sum((c - e) ** 2 / e for c, e in possible) < QUANTILE[len(possible) - 1]


def distribution(logits: list[float], row: SampledRow) -> list[float]:
    params = row.sampling
    scores = edited(logits, params, row.tokens, row.num_prompt, row.position, None)
    scaled = [score / params.temperature for score in scores]
    kept = kept_tokens(scaled, params)[0]
    total = sum(math.exp(scaled[v]) for v in kept)
    return [math.exp(scaled[v]) / total if v in kept else 0.0 for v in range(len(logits))]
