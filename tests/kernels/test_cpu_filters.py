"""Tokens that the native head draws under top_k, top_p and min_p: those of the sampler, whatever the logits."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from tests.kernels.blocks import random_rows
from tests.kernels.drawing import ask, check, draw, planes, sampled
from tests.kernels.test_cpu_linear import multiply, packed
from tests.kernels.tiers import TIERS_HERE
from tests.seeds import SEED
from tokenspeed.kernels.cpu import _walk
from tokenspeed.runner.edits import SampledRow
from tokenspeed.runner.sampler import settle

TEMPERATURES = (0.01, 0.3, 0.7, 1.0, 3.0)
TOP_K = (0, 1, 2, 40, 1000, 1100, 10**6)
TOP_P = (1.0, 1e-9, 0.1, 0.5, 0.95, 1 - 1e-9)
MIN_P = (0.0, 1e-6, 0.05, 0.7, 1.0)
SCREENED = (
    (40, 0.95, 0.0),
    (40, 0.5, 0.0),
    (4, 0.6, 0.0),
    (1000, 0.9, 0.0),
    (0, 1.0, 0.05),
    (5, 1.0, 0.01),
    (0, 0.95, 0.0),
    (0, 0.3, 1e-4),
)
"""top_k, top_p, min_p."""


def any_asks(count: int, rng: np.random.Generator) -> list[SampledRow]:
    """Rows with any of the filters, some with none and some greedy."""
    seed = int(rng.integers(2**63))
    rows = []
    for row in range(count):
        top_k, top_p, min_p = (rng.choice(values) for values in (TOP_K, TOP_P, MIN_P))
        temperature = 0.0 if rng.random() < 0.05 else float(rng.choice(TEMPERATURES))
        rows.append(ask(row, temperature, int(top_k), float(top_p), float(min_p), seed))
    return rows


def logits_of(kind: str, rows: int, num_tokens: int, rng: np.random.Generator) -> np.ndarray:
    values: np.ndarray = rng.normal(size=(rows, num_tokens))
    if kind == "peaked":
        values = values * 2 + 12 * (rng.random(values.shape) < 3 / num_tokens)
    elif kind == "spread":
        values *= 9
    elif kind == "ties":
        values = np.round(values * 2)
    elif kind == "equal":
        values[:] = values[:, :1]
    elif kind == "near":  # neighbours in float32: division by the temperature makes some of them equal
        values = 5 + rng.integers(-20, 20, size=values.shape) * 2.0**-21
    elif kind == "negative":
        values = -np.exp(values * 3)
    return values.astype(np.float32)


def head_of(isa: str, threads: int, logits: np.ndarray) -> tuple[_walk.Model, int, np.ndarray]:
    """A head, and rows for which it gives these logits [rows, num_tokens]."""
    data = np.ascontiguousarray(logits.T)
    model, matrix = packed(isa, threads, [("F32", data.view(np.uint8))], len(logits))
    x = np.eye(len(logits), dtype=np.float32)
    assert (multiply(model, matrix, x, logits.shape[1]) == logits).all()
    return model, matrix, x


@pytest.mark.parametrize("isa", TIERS_HERE)
@pytest.mark.parametrize("kind", ["normal", "peaked", "spread", "ties", "equal", "near", "negative"])
def test_tokens_are_the_samplers_own(isa: str, kind: str) -> None:
    rng = np.random.default_rng([SEED, len(kind)])
    left = total = 0
    for num_tokens in (1, 15, 64, 65, 1999, 9001):
        logits = logits_of(kind, 60, num_tokens, rng)
        model, matrix, x = head_of(isa, 2, logits)
        left += check(model, matrix, x, num_tokens, any_asks(60, rng))
        total += 60
    assert left <= total // (20 if kind == "near" else 100)  # with near ones top_p often cuts where masses are equal


@pytest.mark.parametrize("temperature", [0.6, 1.0])
@pytest.mark.parametrize("top_k, top_p, min_p", [(0, 0.95, 0.0), (40, 0.95, 0.0), (0, 0.5, 0.01), (1000, 0.3, 0.0)])
def test_hardly_a_row_is_left_to_the_sampler(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    rng, num_tokens, rows = np.random.default_rng([SEED, top_k]), 3001, 1000
    model, matrix, x = head_of("", 2, logits_of("spread", rows, num_tokens, rng))
    asks = [ask(row, temperature, top_k, top_p, min_p) for row in range(rows)]
    assert check(model, matrix, x, num_tokens, asks) <= 1


@pytest.mark.parametrize("top_k", [0, 4, 7])
def test_where_top_p_cuts_to_the_bit_the_sampler_decides(top_k: int) -> None:
    """Half of the mass is that of the best two, each as likely as all others together, up to rounding."""
    logits = np.full((1, 300), -50.0, np.float32)
    logits[0, [7, 100, 130, 299]] = 3.0, 3.0, 3.0 - 2.0**-20, 3.0 - 2.0**-20
    model, matrix, x = head_of("", 1, logits)
    drawn = [draw(model, matrix, x, [ask(row, 1.0, top_k, 0.5)])[0] for row in range(100)]
    wanted = [sampled(logits, [ask(row, 1.0, top_k, 0.5)])[0] for row in range(100)]
    assert [] in drawn
    for candidates, token in zip(drawn, wanted, strict=True):
        assert candidates == [] or candidates[0][0] == token in (7, 100)


@pytest.mark.parametrize("kept", [3, 4])
def test_ties_with_the_last_token_stay(kept: int) -> None:
    logits = np.full((1, 70), -1.0, np.float32)
    logits[0, [3, 20, 40, 69]] = 1.0, 0.5, 0.25, 0.25
    model, matrix, x = head_of("", 1, logits)
    found = {draw(model, matrix, x, [ask(row, 3.0, kept)])[0][0][0] for row in range(300)}
    assert found == {3, 20, 40, 69}
    found = {draw(model, matrix, x, [ask(row, 3.0, 4, 0.75)])[0][0][0] for row in range(300)}
    assert found == {3, 20, 40, 69}  # before the two equal ones lie 0.59 of the mass, before the second of them 0.80


@pytest.mark.parametrize("isa", TIERS_HERE)
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("rows, blocks", [(17, 1), (700, 3), (5003, 10)])
def test_the_screened_head_draws_what_the_full_one_does(isa: str, count: int, rows: int, blocks: int) -> None:
    rng, cols = np.random.default_rng([SEED, rows, count]), 32 * blocks
    data, values = random_rows("Q8_0", rows, cols, rng)
    model, matrix = planes(isa, 2, data, cols)
    left = 0
    for _ in range(24 // count):
        x = rng.normal(size=(count, cols)) * rng.choice([0.1, 1, 3], size=(count, 1))
        sure = rng.random((count, 1)) < 0.5
        x = np.where(sure, values[rng.integers(rows, size=count)], x).astype(np.float32)
        left += check(model, matrix, x, rows, any_asks(count, rng))
    assert left <= 1
    assert model.looked > 0


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.5])
def test_thousands_of_draws_of_a_screened_head(scale: float) -> None:
    rng, num_tokens, cols, draws = np.random.default_rng([SEED, 8]), 30011, 96, 100
    data, values = random_rows("Q8_0", num_tokens, cols, rng)
    model, matrix = planes("", 2, data, cols)
    x = (values[:1] * 0.05 + scale * rng.normal(size=(1, cols))).astype(np.float32)
    logits, left = multiply(model, matrix, x, num_tokens), 0
    for filters in SCREENED:
        asks = [ask(row, 0.8, *filters) for row in range(draws)]
        wanted = sampled(np.repeat(logits, draws, axis=0), asks)
        for row, token in zip(asks, wanted, strict=True):
            (found,) = draw(model, matrix, x, [row])
            left += not found
            assert not found or settle(found, row) == token, row.sampling
    assert left <= 2
    assert model.whole < model.looked


def test_few_rows_are_looked_at_twice_for_filters() -> None:
    rng, num_tokens, cols = np.random.default_rng([SEED, 4]), 30011, 640
    data, values = random_rows("Q8_0", num_tokens, cols, rng)
    model, matrix = planes("", 1, data, cols)
    sure, flat = values[77:78].astype(np.float32), np.zeros((1, cols), np.float32)
    few = [filters for filters in SCREENED if filters[0] <= 40]
    for filters in few:
        draw(model, matrix, sure, [ask(0, 0.8, *filters)])
    assert (model.looked, model.whole) == (len(few), 0)
    assert model.rescored < len(few) * num_tokens // 20
    draw(model, matrix, flat, [ask(0, 0.8, 40, 0.9)])
    assert (model.looked, model.whole) == (len(few) + 1, 1)


@pytest.mark.parametrize("isa", TIERS_HERE)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("filters", [(40, 1.0, 0.0), (0, 0.9, 0.0), (0, 1.0, 0.1)])
def test_logits_that_are_not_finite_are_left_to_the_sampler(
    isa: str, value: float, filters: tuple[int, float, float]
) -> None:
    rng, num_tokens = np.random.default_rng([SEED, 9]), 1003
    logits = logits_of("spread", 1, num_tokens, rng)
    logits[0, rng.integers(num_tokens)] = value
    data = np.ascontiguousarray(logits.T)
    model, matrix = packed(isa, 2, [("F32", data.view(np.uint8))], 1)
    assert draw(model, matrix, np.ones((1, 1), np.float32), [ask(0, 0.7, *filters)]) == [[]]


def test_scaled_logits_beyond_all_floats_are_left_to_the_sampler() -> None:
    logits = np.array([[1e37, 1.0, 9e36]], np.float32)
    model, matrix, x = head_of("", 1, logits)
    assert draw(model, matrix, x, [ask(0, 0.01, 2)]) == [[]]
    assert draw(model, matrix, x, [ask(0, 1.0, 2)]) == [[(0, float(np.float32(1e37)))]]


def test_rows_of_a_batch_draw_what_each_draws_alone() -> None:
    rng, num_tokens, cols = np.random.default_rng([SEED, 10]), 2011, 96
    data, _ = random_rows("Q8_0", num_tokens, cols, rng)
    for count in (2, 3, 4, 7):
        x = rng.normal(size=(count, cols)).astype(np.float32)
        x[-1, 5] = math.nan
        rows: Sequence[SampledRow] = [ask(0, 0.0), ask(1, 0.8, 40, 0.9), ask(2, 0.8), *any_asks(4, rng)][:count]
        for threads in (1, 3):
            model, matrix = planes("", threads, data, cols)
            together = draw(model, matrix, x, rows)
            alone = [draw(model, matrix, x[i : i + 1], rows[i : i + 1])[0] for i in range(count)]
            assert together == alone
            assert together[-1] == []
            assert all(together[:-1])


@pytest.mark.parametrize("isa", TIERS_HERE)
@pytest.mark.parametrize("temperature", [0.01, 0.8, 3.0])
def test_masses_are_within_what_top_p_doubts(isa: str, temperature: float) -> None:
    """Against float64, within 1e-6; the sampler's own float32 exp within 4e-7."""
    rng = np.random.default_rng([SEED, 11])
    model = _walk.Model(1, isa)
    for size in (1, 37, 64, 1000):
        logits = (rng.random(size) * -25 * temperature).astype(np.float32)
        scaled = logits / np.float32(temperature)
        best, above = scaled.max(), np.sort(scaled)[size // 3]
        terms = np.where(scaled > above, np.exp((scaled - best).astype(np.float64)), 0)
        found = model.mass(logits, temperature, best, above)
        assert abs(found - terms.sum()) <= 1e-6 * terms.sum()
        assert found > 0 or size == 1
