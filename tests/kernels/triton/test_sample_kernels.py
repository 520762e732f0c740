"""The sampling kernels draw the tokens that the sampler draws, in Triton's interpreter."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from tests.kernels.triton.sampling_rows import MIDDLE, SMALL, check, device_rows, fitting, kernel_tokens, random_rows
from tests.runner.test_sampler import FIELDS, VOCAB, history, peaked, sampling
from tests.seeds import SEED
from tokenspeed.contracts.step import SamplingRow
from tokenspeed.kernels.triton import noise, sampling_state
from tokenspeed.kernels.triton.sample import Tiles, sample
from tokenspeed.runner import draw
from tokenspeed.runner.edits import SampledRow
from tokenspeed.runner.noise import gumbel, noise_keys

FILTERS: list[dict[str, Any]] = [
    {"top_k": 5},
    {"top_k": 50, "top_p": 0.95, "temperature": 0.7},
    {"top_p": 0.7},
    {"top_p": 0.99, "temperature": 3.0},
    {"min_p": 0.3},
    {"top_k": 9, "min_p": 0.05},
    {"top_p": 0.9, "min_p": 0.1},
    {"top_k": 700, "top_p": 0.999, "temperature": 2.0},
]


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("seed", [SEED])
def test_each_field_alone_equals_the_sampler(name: str, seed: int) -> None:
    rng = random.Random(seed)
    rows = [history(rng, VOCAB, fitting(sampling(**FIELDS[name]))) for _ in range(3)]
    check(peaked(seed % 2**31, 3), rows, rng, tiles=MIDDLE)


@pytest.mark.parametrize(
    "vocab, dtype",
    [(1, torch.float32), (3, torch.float16), (65, torch.float32), (331, torch.bfloat16), (4099, torch.float32)],
)
@pytest.mark.parametrize("seed", [SEED])
def test_random_combinations_equal_the_sampler(vocab: int, dtype: torch.dtype, seed: int) -> None:
    rng = random.Random(seed * 100 + vocab)
    check(peaked(rng.getrandbits(31), 12, vocab).to(dtype), random_rows(rng, 12, vocab), rng, tiles=MIDDLE)


@pytest.mark.slow
@pytest.mark.parametrize("tiles", [None, SMALL])
@pytest.mark.parametrize(
    "vocab, dtype", [(2, torch.float32), (64, torch.bfloat16), (1009, torch.float16), (9001, torch.float32)]
)
@pytest.mark.parametrize("seed", [SEED])
def test_many_random_combinations_equal_the_sampler(
    vocab: int, dtype: torch.dtype, tiles: Tiles | None, seed: int
) -> None:
    rng = random.Random(seed * 100 + vocab)
    rows, logits = random_rows(rng, 16, vocab), peaked(rng.getrandbits(31), 16, vocab).to(dtype)
    check(logits, rows, rng, tiles=tiles)


@pytest.mark.parametrize("vocab", [31, 64, 1003])
@pytest.mark.parametrize("seed", [SEED])
def test_a_mask_beside_all_else(vocab: int, seed: int) -> None:
    rng = random.Random(seed + vocab)
    rows = random_rows(rng, 8, vocab)
    rows = [replace(row, sampling=msgspec.structs.replace(row.sampling, masked=True)) for row in rows]
    mask = torch.rand(8, vocab, generator=torch.Generator().manual_seed(seed % 2**31)) < 0.4
    check(peaked(rng.getrandbits(31), 8, vocab), rows, rng, mask, MIDDLE)


@pytest.mark.parametrize("tiles", [SMALL, pytest.param(MIDDLE, marks=pytest.mark.slow)])
@pytest.mark.parametrize("fields", FILTERS)
@pytest.mark.parametrize("seed", [SEED])
def test_filters_by_candidates_and_by_whole_rows(fields: dict[str, Any], tiles: Tiles | None, seed: int) -> None:
    """A peaked, a flat and a rounded row each, the last with ties by the dozen, all and half of a row equal."""
    rng, vocab = random.Random(seed), 1100
    logits = peaked(rng.getrandbits(31), 6, vocab)
    logits[1] /= 30
    logits[2] = (logits[2] * 2).round() / 4
    logits[3] = 1.25
    logits[4, ::2] = -torch.inf
    logits[5] = torch.where(logits[5] > 0, 0.0, -0.0)
    rows = [SampledRow(sampling(**fields, seed=rng.getrandbits(64)), [0] * 9, 1, 9) for _ in range(6)]
    check(logits, rows, rng, tiles=tiles)


@pytest.mark.parametrize("fields", [{"top_p": 0.5}, {"top_k": 40}, {"min_p": 0.5}])
@pytest.mark.parametrize("seed", [SEED])
def test_a_floor_is_where_the_sampler_has_it(fields: dict[str, Any], seed: int) -> None:
    """Logits so flat that a token too many or too few is drawn soon."""
    rng, count = random.Random(seed), 14
    logits = (peaked(seed % 2**31, 1, 120) / 20).expand(count, -1).contiguous()
    rows = [SampledRow(sampling(**fields, seed=rng.getrandbits(64)), [0] * 9, 1, 9) for _ in range(count)]
    assert len(set(check(logits, rows, rng, tiles=MIDDLE))) > 6


def test_a_row_that_allows_nothing_and_padding_give_token_zero() -> None:
    rng = random.Random(SEED)
    kinds: list[dict[str, Any]] = [{"temperature": 0.0}, {"top_k": 4, "top_p": 0.5}, {}, {}]
    on_device = device_rows([SampledRow(sampling(**kind), [1], 1, 1) for kind in kinds], VOCAB, rng)
    logits = torch.full((4, VOCAB), -torch.inf)
    logits[3] = torch.nan
    slots = on_device.slots.clone()
    slots[3] = -1
    for edits in (False, True):
        found = sample(logits, slots, on_device.positions, on_device.state, edits=edits, pool=on_device.pool)
        assert found.tolist() == [0, 0, 0, 0]
        assert found.dtype == torch.int32


@pytest.mark.parametrize("seed", [SEED])
def test_batch_slots_and_tiles_change_nothing(seed: int) -> None:
    rng, vocab, count = random.Random(seed), 700, 6
    logits, rows = peaked(seed % 2**31, count, vocab), random_rows(rng, count, vocab)
    together = kernel_tokens(logits, rows, rng)
    assert kernel_tokens(logits, rows, rng, tiles=SMALL) == together
    for at in rng.sample(range(count), 2):
        assert kernel_tokens(logits[at : at + 1], rows[at : at + 1], rng, tiles=MIDDLE) == together[at : at + 1]
    order = rng.sample(range(count), count)
    assert kernel_tokens(logits[order], [rows[at] for at in order], rng, tiles=MIDDLE) == [together[at] for at in order]


@pytest.mark.parametrize("fields", [{}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.5}])
@pytest.mark.parametrize("tiles", [MIDDLE, SMALL])
def test_the_lowest_id_of_equals_wins(fields: dict[str, Any], tiles: Tiles) -> None:
    """Logits so large that no noise changes them, under two peaks and under many."""
    rng = random.Random(SEED)
    logits = torch.zeros(2, 2100)
    logits[0, [70, 71, 1900]] = 1e30
    logits[1, 50::20] = 1e30
    rows = [SampledRow(sampling(**fields, seed=rng.getrandbits(64)), [0] * 9, 1, 9) for _ in range(2)]
    assert check(logits, rows, rng, tiles=tiles) == [70, 50]


def test_bad_words_begin_in_what_was_sampled() -> None:
    params = sampling(temperature=0.0, bad_words=[[7, 5], [7, 7, 5], [9, 8, 7, 4]])
    logits = torch.zeros(1, 30)
    logits[0, [5, 4, 3]] = torch.tensor([3.0, 2.0, 1.0])
    found = []
    for tokens, num_prompt in (([1, 9, 7], 3), ([1, 7, 7], 2), ([9, 8, 7], 0), ([9, 8, 7], 1)):
        row = SampledRow(params, [*tokens, 7, 7], num_prompt, len(tokens))
        found += check(logits, [row], random.Random(SEED))
    assert found == [5, 4, 3, 4]


def test_logits_of_a_wider_tensor() -> None:
    rng = random.Random(SEED)
    wide = peaked(SEED % 2**31, 4, 400)
    rows = random_rows(rng, 4, VOCAB)
    on_device = device_rows(rows, VOCAB, rng)
    arguments = (on_device.slots, on_device.positions, on_device.state)
    found = sample(wide[:, :VOCAB], *arguments, edits=True, pool=on_device.pool)
    again = sample(wide[:, :VOCAB].contiguous(), *arguments, edits=True, pool=on_device.pool)
    assert found.tolist() == again.tolist()


@triton.jit
def _noise(words: tl.tensor, ids: tl.tensor, exact: tl.tensor, screen: tl.tensor, drawn: tl.tensor, N: tl.constexpr):
    at = tl.arange(0, N)
    word = tl.load(words + at).to(tl.uint32, bitcast=True)
    tl.store(exact + at, noise.gumbel(word))
    tl.store(screen + at, noise.gumbel_screen(word))
    position, sample_index, low, high = tl.load(ids), tl.load(ids + 1), tl.load(ids + 2), tl.load(ids + 3)
    tl.store(drawn + at, noise.gumbel(noise.token_words(at, (position, sample_index, low, high))))


@pytest.mark.parametrize("seed", [SEED])
def test_noise_is_the_samplers_and_its_screen_lies_above(seed: int) -> None:
    count, rng = 4096, np.random.default_rng(seed)
    words = rng.integers(0, 2**32, count, dtype=np.uint32)
    words[:70] = np.concatenate([np.arange(35), 2**32 - 1 - np.arange(35)])
    words[70:1000] >>= rng.integers(0, 32, 930, dtype=np.uint32)
    exact, screen, drawn = torch.empty(3, count)
    key = (-7, 3, 2**31 + 5, 2**32 - 2)
    numbers = torch.tensor(key, dtype=torch.int64).to(torch.int32)
    _noise[(1,)](torch.from_numpy(words.view(np.int32)), numbers, exact, screen, drawn, N=count)
    u = np.minimum((words.astype(np.float32).astype(np.float64) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    expected = torch.from_numpy(-np.log(-np.log1p(-u)))
    torch.testing.assert_close(exact.double(), expected, rtol=3e-7, atol=1e-6)
    assert bool((screen >= exact).all())
    assert float((screen - exact)[u < 0.5].max()) < 0.11
    keys = noise_keys([key[3] << 32 | key[2]], [key[1]], [key[0]], torch.device("cpu"))
    torch.testing.assert_close(drawn, gumbel(keys, torch.arange(count // 4)[None])[0], rtol=3e-7, atol=1e-6)


def test_constants_are_the_samplers() -> None:
    assert noise.REACH.value == draw._REACH
    assert torch.finfo(torch.float32).min == float(np.float32(-3.4028234663852886e38))


@pytest.mark.parametrize(
    "fields, text",
    [
        ({"logit_bias": [(v, 1.0) for v in range(65)]}, "65 logit_bias, 64 fit"),
        ({"allowed_ids": list(range(70))}, "70 allowed_token_ids"),
        ({"banned_ids": list(range(99))}, "99 banned_token_ids"),
        ({"stop_ids": list(range(65))}, "65 stop ids"),
        ({"bad_words": [[1, 2]] * 17}, "17 bad words, 16 fit"),
        ({"bad_words": [[1] * 9]}, "a bad word of 9 tokens, 8 fit"),
    ],
)
def test_what_exceeds_a_slot_is_named(fields: dict[str, Any], text: str) -> None:
    assert text in (sampling_state.excess(sampling(**fields)) or "")
    assert sampling_state.excess(fitting(SamplingRow(1.0, 0, 1.0, 1))) is None
